"""Have a model compute what it always computes with fewer operations, and save less for the backward pass, in training.

Modules get a forward of their own for the time of a training; the model's classes stay as they are. Replaced are adapted
linear layers (`products`), norms, gated MLPs and rotary embeddings (`parts`), and whole decoder layers (`decoder`) where a
family's code is Llama's (`layouts.recognize`). Whatever else a model has goes on as it is: adapters with dropout, DoRA's, those on
Conv1D, embeddings or experts, modules with a hook on one of their parts, and any layer while an adapter is disabled or merged.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from d2lora.adapters.coverage import layers
from d2lora.adapters.decoder import (
    SHORT,
    After,
    AfterAttention,
    Before,
    BeforeAttention,
    ShortAttention,
    WithShortAttention,
)
from d2lora.adapters.flat import Flat
from d2lora.adapters.layers import ADAPTER, OWN, matrices
from d2lora.adapters.parts import GatedMlp, Mlp, Norm, RmsNorm, Rotary
from d2lora.adapters.products import Adapted, Project, SharedInput
from d2lora.layouts import recognize
from d2lora.layouts.by_text import BY_TEXT
from d2lora.layouts.packing import FLEX
from d2lora.layouts.rotary import Angles

# Children of one module that read the same input, by the names that transformers gives them.
_SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_SDPA = "sdpa"
_WITH_MASK = (_SDPA, FLEX, BY_TEXT)  # attention that learns nothing of a layer's window but through its mask


@contextlib.contextmanager
def lean(wrapped: PeftModel) -> Iterator[Flat | None]:
    """Replace the forwards of a model's modules inside the `with` block.

    Yields the trained weights, which lie in one tensor there; None if they are of several dtypes or devices, where adapted layers
    go on as they are.
    """
    with contextlib.ExitStack() as stack:
        groups = _groups({name: Adapted(layer) for name, layer in layers(wrapped).items() if _replaceable(layer)})
        flat = _flattened(wrapped, groups)
        if flat is None:
            groups = {}
        else:
            stack.callback(flat.release)
        for group in groups.values():
            group.join()
            stack.callback(group.part)
        _replace_forwards(wrapped, groups, _Weights(list(groups.values()), flat), stack)
        _replace_rotary(wrapped, stack)
        yield flat


_suspended = False


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Have every module compute by PEFT's and transformers' own code inside the `with` block, replaced or not."""
    global _suspended
    before, _suspended = _suspended, True
    try:
        yield
    finally:
        _suspended = before


def _usual() -> bool:
    """Tell whether a module must compute by its family's own code: a compiler fuses operations better."""
    return _suspended or torch.compiler.is_compiling()


# --- what is replaced ------------------------------------------------------------------------------------------------

_Groups = dict[tuple[str, tuple[str, ...]], SharedInput]  # by the module that they belong to, and their names in it


def _replaceable(layer: object) -> TypeGuard[Linear]:
    """Tell whether an adapter's layer computes W x + b + s B A x on a plain linear layer, and trains A and B."""
    if type(layer) is not Linear or type(base := layer.get_base_layer()) is not nn.Linear or recognize.hooked(layer):
        return False
    dropout = layer.lora_dropout[ADAPTER] if ADAPTER in layer.lora_dropout else nn.Dropout()
    known = isinstance(layer.lora_variant.get(ADAPTER), OWN) and not layer.lora_bias.get(ADAPTER)
    trained = not base.weight.requires_grad and all(weight.requires_grad for weight in matrices(layer))
    return known and trained and not getattr(dropout, "p", 0)


def _groups(own: dict[str, Adapted]) -> _Groups:
    """Return layers in groups that read the same input and are computed alike, most of them of one layer."""
    groups: dict[tuple[Any, ...], dict[str, Adapted]] = {}
    for name, one in own.items():
        parent, _, child = name.rpartition(".")
        siblings = next((names for names in _SHARED if child in names), child)
        alike = one.scale, one.plain, one.W.dtype, one.W.device, one.base.bias is None
        groups.setdefault((parent, siblings, alike), {})[child] = one
    return {(parent, tuple(members)): SharedInput(list(members.values())) for (parent, *_), members in groups.items()}


def _flattened(wrapped: PeftModel, groups: _Groups) -> Flat | None:
    """Lay the trained weights into one tensor, in it the A of a group one below the other."""
    trained = [weight for weight in wrapped.parameters() if weight.requires_grad]
    if len({(weight.dtype, weight.device) for weight in trained}) != 1:
        return None
    grouped = [cast(nn.Parameter, member.A) for group in groups.values() for member in group.members]
    return Flat(list(dict.fromkeys([*grouped, *trained])))


def _replace_forwards(wrapped: PeftModel, groups: _Groups, weights: "_Weights", stack: contextlib.ExitStack) -> None:
    """Give modules forwards of their own until the stack closes; those of whole decoder layers come last."""
    outputs = [_Outputs(group, weights) for group in weights.groups]
    for module in _entries(wrapped):
        stack.callback(module.register_forward_pre_hook(functools.partial(_begin, weights, outputs)).remove)
    for one in outputs:
        for index, member in enumerate(one.group.members):
            _replace(member.layer, functools.partial(one.forward, index), stack)
    for name, module in wrapped.named_modules():
        if recognize.is_norm(module):
            _replace(module, functools.partial(_norm, module), stack)
        elif (mlp := _mlp_of(module, name, groups)) is not None:
            _replace(module, functools.partial(_mlp, module, mlp, weights), stack)
    shared = _Shared(_Once(Angles.of), _Once(ShortAttention.of))
    for name, module in wrapped.named_modules():
        if (decoder := _decoder_layer(module, name, groups, weights, shared)) is not None:
            _replace(module, decoder.forward, stack)


def _entries(wrapped: PeftModel) -> set[nn.Module]:
    """Return the modules that a pass may begin with: PEFT's, the model with its head, and without it."""
    model = wrapped.get_base_model()
    return {wrapped, wrapped.base_model, model, cast(nn.Module, model.base_model)}


def _replace(module: nn.Module, forward: Callable[..., Any], stack: contextlib.ExitStack) -> None:
    module.forward = forward
    stack.callback(module.__dict__.pop, "forward")


# --- adapted linear layers -------------------------------------------------------------------------------------------


class _Weights:
    """The weights that a pass computes with, set up when its first layer is called."""

    def __init__(self, groups: list[SharedInput], flat: Flat | None) -> None:
        self.groups, self.flat = groups, flat
        self.members = [member for group in groups for member in group.members]
        self.begun = False
        self._dtype: torch.dtype | None = None
        self._casts = False
        self._set_up_in: torch.dtype | None = None
        self._addresses = self._current_addresses()
        self._dtypes = {one.W.dtype for one in self.members}

    def _current_addresses(self) -> list[int]:
        return [one.W.data_ptr() for one in self.members]

    def ready(self, x: torch.Tensor) -> bool:
        """Tell whether layers compute x by our functions now, and not by PEFT's and transformers' code."""
        if _usual() or not self.members:
            return False
        if not self.begun:
            self._begin()
        return self._dtype is not None and (self._casts or x.dtype == self._dtype)

    @torch.no_grad()
    def _begin(self) -> None:
        """Find the dtype of a pass, and make its copies of A and B."""
        self.begun = True
        flat = self.flat
        same_memory = flat is not None and flat.intact() and self._current_addresses() == self._addresses
        self._dtype = self._common_dtype(flat) if flat is not None and same_memory else None
        if self._dtype is None or flat is None:
            return
        if self._set_up_in != self._dtype:
            for group in self.groups:
                group.set_up(self._dtype, flat)
            self._set_up_in = self._dtype
        if pairs := [pair for group in self.groups for pair in group.copies()]:
            torch._foreach_copy_([copy for copy, _ in pairs], [matrix for _, matrix in pairs])

    def _common_dtype(self, flat: Flat) -> torch.dtype | None:
        """Return the dtype that all layers compute in, autocast's or that of everything.

        None if dtypes are mixed, or an adapter is disabled or merged.
        """
        if not all(one.applies() for one in self.members):
            return None
        kind = self.members[0].W.device.type
        self._casts = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if self._casts else flat.weights.dtype
        return dtype if self._dtypes == {dtype} else None


class _Outputs:
    """The outputs of layers that read the same input: the first that is called computes those of all."""

    def __init__(self, group: SharedInput, weights: _Weights) -> None:
        self.group, self.weights = group, weights
        self.read: torch.Tensor | None = None
        self.outputs: dict[int, torch.Tensor] = {}

    def forget(self) -> None:
        """Drop outputs that were not taken: after a pass that failed half-way, they hold all that it had computed."""
        self.read, self.outputs = None, {}

    def forward(self, index: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return a layer's output (..., out) of x (..., in); with anything unusual, PEFT's own."""
        if x is not self.read or index not in self.outputs:
            if args or kwargs or not self.weights.ready(x):
                return Linear.forward(self.group.members[index].layer, x, *args, **kwargs)
            self.outputs = dict(enumerate(Project.apply(x, self.group.anchor, self.group)))
        output = self.outputs.pop(index)
        self.read = x if self.outputs else None
        return output


def _begin(weights: _Weights, outputs: list[_Outputs], *_: Any) -> None:
    """Begin a pass of the model with nothing of an earlier one."""
    weights.begun = False
    for one in outputs:
        one.forget()


# --- norms, MLPs, rotary embeddings ----------------------------------------------------------------------------------


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    if _usual() or module.weight.requires_grad:
        return type(module).forward(module, x)
    return RmsNorm.apply(x, module.weight, module.variance_epsilon)


def _mlp_of(module: nn.Module, name: str, groups: _Groups) -> Mlp | None:
    """Return the layers of a module that is Llama's gated MLP; None if it is not, or they are not all adapted."""
    gate_up, down = groups.get((name, ("gate_proj", "up_proj"))), groups.get((name, ("down_proj",)))
    if gate_up is None or down is None or not recognize.is_mlp(module) or recognize.hooked(module):
        return None
    return Mlp(gate_up, down)


def _mlp(module: nn.Module, mlp: Mlp, weights: _Weights, x: torch.Tensor) -> torch.Tensor:
    """Return a gated MLP's output (..., width) of x (..., width)."""
    if not weights.ready(x):
        return type(module).forward(module, x)
    return GatedMlp.apply(x, mlp.down.anchor, mlp)


class _Once:
    """The result of a function for the same arguments, kept for the next layer: all layers of a pass are given the same."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.result = function, None
        self.given: tuple[Any, ...] = ()

    def __call__(self, *given: Any) -> Any:
        if len(given) != len(self.given) or any(a is not b for a, b in zip(given, self.given, strict=True)):
            self.given, self.result = given, self.function(*given)
        return self.result


class _Rotate:
    """Llama's apply_rotary_pos_emb."""

    def __init__(self, of_family: Callable[..., Any]) -> None:
        self.of_family, self.angles = of_family, _Once(Angles.of)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if _usual() or unsqueeze_dim != 1 or cos.requires_grad or q.dtype != cos.dtype:
            return self.of_family(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        angles = self.angles(cos, sin)
        return Rotary.apply(q, angles), Rotary.apply(k, angles)


def _replace_rotary(wrapped: PeftModel, stack: contextlib.ExitStack) -> None:
    """Replace the function in the modules of Python that the model's attention is defined in, until the stack closes."""
    for module in {sys.modules.get(type(m).__module__) for m in wrapped.modules()}:
        if recognize.rotates(module):
            function = cast(FunctionType, getattr(module, "apply_rotary_pos_emb"))  # noqa: B009
            setattr(module, "apply_rotary_pos_emb", _Rotate(function))  # noqa: B010
            stack.callback(setattr, module, "apply_rotary_pos_emb", function)


# --- decoder layers --------------------------------------------------------------------------------------------------


class _Shared(NamedTuple):
    """What the decoder layers of a pass share: angles and attention in short rows."""

    angles: _Once
    short: _Once


class _DecoderLayer:
    """A decoder layer of Llama's: functions of `decoder`, and the attention that the model runs with."""

    def __init__(self, layer: Any, before: Before, after: After, weights: _Weights, shared: _Shared) -> None:
        self.layer, self.weights, self.shared = layer, weights, shared
        self.before, self.after = before, after
        self.attention = layer.self_attn
        self.children = (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp)
        self.forwards = [child.forward for child in self.children]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the layer's output (rows, length, width), as transformers calls it; with anything unusual, its own."""
        own = {"position_ids": position_ids, "use_cache": use_cache, **kwargs}
        kind = self.attention.config._attn_implementation
        known = kind in _WITH_MASK and cache is None and position_embeddings is not None
        if not known or not self._ready(hidden_states, *cast(tuple[torch.Tensor, torch.Tensor], position_embeddings)):
            given = {"attention_mask": attention_mask, "cache": cache, "position_embeddings": position_embeddings}
            return type(self.layer).forward(self.layer, hidden_states, **given, **own)
        angles = self.shared.angles(*cast(tuple[torch.Tensor, torch.Tensor], position_embeddings))
        anchor = None if hidden_states.requires_grad else self.before.qkv.anchor
        if kind == _SDPA and _short(hidden_states, attention_mask):
            short = self.shared.short(attention_mask, self.before.heads, self.attention.scaling)
            return WithShortAttention.apply(hidden_states, anchor, self.before, self.after, angles, short)
        q, k, v = BeforeAttention.apply(hidden_states, anchor, self.before, angles)
        scaling = {"dropout": 0.0, "scaling": self.attention.scaling}
        attended, _ = ALL_ATTENTION_FUNCTIONS[kind](self.attention, q, k, v, attention_mask, **scaling, **own)
        return AfterAttention.apply(attended, hidden_states, self.after.o.anchor, self.after)

    def _ready(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        """Tell whether the layer computes x by our functions now."""
        own = [child.__dict__.get("forward") for child in self.children]
        replaced = own != self.forwards  # by a kernel from the Hub, say
        one_dtype = x.dtype == cos.dtype == self.before.qkv.W.dtype and not cos.requires_grad
        return one_dtype and not replaced and not self.attention.training and self.weights.ready(x)


def _short(x: torch.Tensor, mask: Any) -> bool:
    """Tell whether rows x (rows, length, width) are short ones on a CPU in float32, with a mask to be added for each of them."""
    rows, length, _ = x.shape
    whole = isinstance(mask, torch.Tensor) and mask.shape == (rows, 1, length, length)
    return whole and length <= SHORT and x.dtype == mask.dtype == torch.float32 and x.device.type == "cpu"


def _decoder_layer(module: Any, name: str, groups: _Groups, weights: _Weights, shared: _Shared) -> _DecoderLayer | None:
    """Return a module that is Llama's decoder layer with all its linear layers adapted; None if it is anything else."""
    qkv = groups.get((f"{name}.self_attn", ("q_proj", "k_proj", "v_proj")))
    o = groups.get((f"{name}.self_attn", ("o_proj",)))
    if qkv is None or o is None or not recognize.is_decoder_layer(module) or recognize.hooked(module):
        return None
    norms = module.input_layernorm, module.post_attention_layernorm
    mlp = _mlp_of(module.mlp, f"{name}.mlp", groups)
    if mlp is None or any(norm.weight.requires_grad for norm in norms):
        return None
    first, second = (Norm(norm.weight, norm.variance_epsilon) for norm in norms)
    queries, keys, values = (out // module.self_attn.head_dim for out in qkv.outs)
    before, after = Before(first, qkv, (queries, keys, values)), After(o, second, mlp)
    return _DecoderLayer(module, before, after, weights, shared)
