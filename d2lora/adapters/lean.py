"""Have a model compute what it always computes with fewer operations, and save less for the backward pass, in training.

Modules get a forward of their own for the time of a training; the model's classes stay as they are. Replaced are adapted
linear layers (`products`), and norms, gated MLPs, rotary embeddings and whole decoder layers where a family's code is
Llama's, instruction for instruction. Whatever else a model has goes on as it is: adapters with dropout, DoRA's, those on
Conv1D, embeddings or experts, and any layer while an adapter is disabled or merged.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, TypeGuard, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama

from d2lora.adapters.coverage import layers
from d2lora.adapters.layers import ADAPTER, OWN
from d2lora.adapters.products import (
    Adapted,
    AfterAttention,
    BeforeAttention,
    GatedMlp,
    Mlp,
    Norm,
    Project,
    RmsNorm,
    Rotary,
    SharedInput,
)
from d2lora.layouts.by_text import BY_TEXT
from d2lora.layouts.packing import FLEX

# Children of one module that read the same input, by the names that transformers gives them.
_SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_WITH_MASK = ("sdpa", FLEX, BY_TEXT)  # attention that learns nothing of a layer's window but through its mask


@contextlib.contextmanager
def lean(wrapped: PeftModel) -> Iterator[None]:
    """Replace the forwards of a model's modules inside the `with` block."""
    replaced: list[nn.Module] = []
    cleanup = contextlib.ExitStack()
    try:
        groups = _groups({name: Adapted(layer) for name, layer in layers(wrapped).items() if _replaceable(layer)})
        weights = _Weights(list(groups.values()))
        outputs = [_Outputs(group, weights) for group in groups.values()]
        for module in _entries(wrapped):
            cleanup.callback(module.register_forward_pre_hook(functools.partial(_begin, weights, outputs)).remove)
        for one in outputs:
            for index, member in enumerate(one.group.members):
                _replace(member.layer, functools.partial(one.forward, index), replaced)
        for name, module in wrapped.named_modules():
            if _same_code(type(module).forward, llama.LlamaRMSNorm.forward):
                _replace(module, functools.partial(_norm, module), replaced)
            elif (mlp := _mlp_of(module, name, groups)) is not None:
                _replace(module, functools.partial(_mlp, module, mlp, weights), replaced)
        angles = _Angles(2)
        for name, module in wrapped.named_modules():
            if (decoder := _decoder_layer(module, name, groups, weights, angles)) is not None:
                _replace(module, decoder.forward, replaced)
        _replace_rotary(wrapped, cleanup)
        yield
    finally:
        cleanup.close()
        for module in replaced:
            del module.forward


def _entries(wrapped: PeftModel) -> set[nn.Module]:
    """Return the modules that a pass may begin with: PEFT's, the model with its head, and without it."""
    model = wrapped.get_base_model()
    return {wrapped, wrapped.base_model, model, model.base_model}


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


def _replace(module: nn.Module, forward: Callable[..., Any], replaced: list[nn.Module]) -> None:
    module.forward = forward
    replaced.append(module)


def _same_code(function: Any, known: Any) -> bool:
    """Tell whether a function's instructions, names and constants are those of one of transformers' own."""
    function, known = inspect.unwrap(function) if callable(function) else function, inspect.unwrap(known)
    if not getattr(known, "__module__", "").startswith(
        "transformers.models."
    ):  # something has put another in its place
        return False
    code, other = (getattr(f, "__code__", None) for f in (function, known))
    if code is None or other is None:
        return False
    parts = ("co_code", "co_names", "co_varnames")
    return all(getattr(code, part) == getattr(other, part) for part in parts) and _constants(code) == _constants(other)


def _constants(code: Any) -> list[Any]:
    """Return a function's constants without its docstring."""
    return [constant for constant in code.co_consts if not (isinstance(constant, str) and " " in constant)]


# --- adapted linear layers -------------------------------------------------------------------------------------------


def _replaceable(layer: object) -> TypeGuard[Linear]:
    """Tell whether an adapter's layer computes W x + b + s B A x on a plain linear layer."""
    if type(layer) is not Linear or type(base := layer.get_base_layer()) is not nn.Linear:
        return False
    dropout = layer.lora_dropout[ADAPTER] if ADAPTER in layer.lora_dropout else nn.Dropout()
    known = isinstance(layer.lora_variant.get(ADAPTER), OWN) and not layer.lora_bias.get(ADAPTER)
    return known and not getattr(dropout, "p", 0) and not base.weight.requires_grad


_Groups = dict[tuple[str, tuple[str, ...]], SharedInput]  # by the module that they belong to, and their names in it


def _groups(own: dict[str, Adapted]) -> _Groups:
    """Return layers in groups that read the same input, most of them of one layer."""
    groups: dict[tuple[str, Any], dict[str, Adapted]] = {}
    for name, one in own.items():
        parent, _, child = name.rpartition(".")
        siblings = next((names for names in _SHARED if child in names), child)
        groups.setdefault((parent, siblings), {})[child] = one
    return {(parent, tuple(members)): SharedInput(list(members.values())) for (parent, _), members in groups.items()}


class _Weights:
    """The weights that a pass computes with: copies of all A and B, made when its first layer is called."""

    def __init__(self, groups: list[SharedInput]) -> None:
        self.groups = groups
        self.members = [member for group in groups for member in group.members]
        self.begun = False
        self._dtype: torch.dtype | None = None
        self._casts = False
        self._copies: list[torch.Tensor] = []
        self._of: list[Any] = []  # what the copies were made for

    def ready(self, x: torch.Tensor) -> bool:
        """Tell whether layers compute x by the functions of `products` now, and not by PEFT's and transformers' code."""
        if _usual() or not self.members:
            return False
        if not self.begun:
            self._begin()
        return self._dtype is not None and (self._casts or x.dtype == self._dtype)

    @torch.no_grad()
    def _begin(self) -> None:
        """Find the dtype of a pass, and copy A and B; the copies themselves are made anew where anything else changed."""
        self.begun = True
        weights, matrices = [one.W for one in self.members], [m for one in self.members for m in one.matrices()]
        self._dtype = self._common_dtype(weights, matrices)
        if self._dtype is None:
            return
        of = [self._dtype, *(W.data_ptr() for W in weights), *(m.shape for m in matrices)]
        if of != self._of:
            self._of, self._copies = of, [copy for group in self.groups for copy in group.set_up(self._dtype)]
        torch._foreach_copy_(self._copies, matrices)

    def _common_dtype(self, weights: list[nn.Parameter], matrices: list[torch.Tensor]) -> torch.dtype | None:
        """Return the dtype that all layers compute in, autocast's or that of everything.

        None if dtypes are mixed, or an adapter is disabled or merged.
        """
        if not all(one.applies() for one in self.members):
            return None
        kind, dtype = weights[0].device.type, weights[0].dtype
        self._casts = torch.is_autocast_enabled(kind)
        dtypes = {W.dtype for W in weights} | ({torch.get_autocast_dtype(kind)} if self._casts else set())
        if not self._casts:
            dtypes |= {matrix.dtype for matrix in matrices}
        return dtype if dtypes == {dtype} else None


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


# --- norms and MLPs --------------------------------------------------------------------------------------------------


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    if _usual() or module.weight.requires_grad:
        return type(module).forward(module, x)
    return RmsNorm.apply(x, module.weight, module.variance_epsilon)


def _mlp_of(module: nn.Module, name: str, groups: _Groups) -> Mlp | None:
    """Return the layers of a module that is Llama's gated MLP; None if it is not, or they are not all adapted."""
    if not _same_code(type(module).forward, llama.LlamaMLP.forward):
        return None
    gate_up, down = groups.get((name, ("gate_proj", "up_proj"))), groups.get((name, ("down_proj",)))
    known = isinstance(module.act_fn, nn.SiLU | SiLUActivation)
    return Mlp(gate_up, down) if known and gate_up is not None and down is not None else None


def _mlp(module: nn.Module, mlp: Mlp, weights: _Weights, x: torch.Tensor) -> torch.Tensor:
    """Return a gated MLP's output (..., width) of x (..., width)."""
    if not weights.ready(x):
        return type(module).forward(module, x)
    return GatedMlp.apply(x, mlp.down.anchor, mlp)


# --- rotary embeddings -----------------------------------------------------------------------------------------------


class _Angles:
    """Cosines and sines of rotary embeddings. All layers of a pass get the same ones, so these are set up once a pass."""

    def __init__(self, heads: int) -> None:
        """Add a dimension of heads at this index."""
        self.heads, self.given = heads, (torch.empty(0), torch.empty(0))
        self.cos = self.sin = torch.empty(0)

    def of(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin with the dimension of heads, sin negated in its first half."""
        if self.given[0] is not cos or self.given[1] is not sin:
            first, second = sin.chunk(2, -1)
            self.given, self.cos = (cos, sin), cos.unsqueeze(self.heads)
            self.sin = torch.cat([-first, second], -1).unsqueeze(self.heads)
        return self.cos, self.sin


class _Rotate:
    """Llama's apply_rotary_pos_emb."""

    def __init__(self, of_family: Callable[..., Any]) -> None:
        self.of_family, self.angles = of_family, _Angles(1)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if _usual() or unsqueeze_dim != 1 or cos.requires_grad or q.dtype != cos.dtype:
            return self.of_family(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        angles = self.angles.of(cos, sin)
        return Rotary.apply(q, *angles), Rotary.apply(k, *angles)


def _rotates_as_llama(module: Any) -> bool:
    """Tell whether a module of Python defines Llama's rotary embedding."""
    function, rotate_half = (getattr(module, name, None) for name in ("apply_rotary_pos_emb", "rotate_half"))
    known = isinstance(function, FunctionType) and _same_code(function, llama.apply_rotary_pos_emb)
    return known and _same_code(rotate_half, llama.rotate_half)


def _replace_rotary(wrapped: PeftModel, stack: contextlib.ExitStack) -> None:
    """Replace the function in the modules of Python that the model's attention is defined in, until the stack closes."""
    for module in {sys.modules.get(type(m).__module__) for m in wrapped.modules()}:
        if _rotates_as_llama(module):
            function = cast(FunctionType, getattr(module, "apply_rotary_pos_emb"))  # noqa: B009
            setattr(module, "apply_rotary_pos_emb", _Rotate(function))  # noqa: B010
            stack.callback(setattr, module, "apply_rotary_pos_emb", function)


# --- decoder layers --------------------------------------------------------------------------------------------------


class _DecoderLayer:
    """A decoder layer of Llama's: two functions of `products`, and the attention that the model runs with between them."""

    def __init__(
        self,
        layer: Any,
        parts: tuple[SharedInput, SharedInput, Mlp],
        weights: _Weights,
        angles: _Angles,
    ) -> None:
        self.layer, self.weights, self.angles = layer, weights, angles
        self.qkv, self.o, self.mlp = parts
        self.attention = layer.self_attn
        self.children = (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp)
        self.forwards = [child.forward for child in self.children]
        self.norms = [Norm(norm.weight, norm.variance_epsilon) for norm in self.children[:2]]

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
        attention = self._attention()
        usual = attention is None or cache is not None or position_embeddings is None
        if usual or not self._ready(hidden_states, *cast(tuple[torch.Tensor, torch.Tensor], position_embeddings)):
            given = {"attention_mask": attention_mask, "cache": cache, "position_embeddings": position_embeddings}
            return type(self.layer).forward(self.layer, hidden_states, **given, **own)
        first, second = self.norms
        angles = self.angles.of(*cast(tuple[torch.Tensor, torch.Tensor], position_embeddings))
        q, k, v = BeforeAttention.apply(hidden_states, self.qkv.anchor, first, self.qkv, *angles)
        scaling = {"dropout": 0.0, "scaling": self.attention.scaling}
        attended, _ = cast(Any, attention)(self.attention, q, k, v, attention_mask, **scaling, **own)
        return AfterAttention.apply(attended, hidden_states, self.o.anchor, self.o, second, self.mlp)

    def _attention(self) -> Callable[..., Any] | None:
        kind = self.attention.config._attn_implementation
        return ALL_ATTENTION_FUNCTIONS.get(kind) if kind in _WITH_MASK else None

    def _ready(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        """Tell whether the layer computes x by the functions of `products` now."""
        own = [child.__dict__.get("forward") for child in self.children]
        replaced = own != self.forwards  # by a kernel from the Hub, say
        one_dtype = x.dtype == cos.dtype == self.qkv.members[0].W.dtype and not cos.requires_grad
        return one_dtype and not replaced and not self.attention.training and self.weights.ready(x)


def _decoder_layer(module: Any, name: str, groups: _Groups, weights: _Weights, angles: _Angles) -> _DecoderLayer | None:
    """Return a module that is Llama's decoder layer with all its linear layers adapted; None if it is anything else."""
    if not _same_code(type(module).forward, llama.LlamaDecoderLayer.forward):
        return None
    attention, mlp = module.self_attn, _mlp_of(module.mlp, f"{name}.mlp", groups)
    qkv = groups.get((f"{name}.self_attn", ("q_proj", "k_proj", "v_proj")))
    o = groups.get((f"{name}.self_attn", ("o_proj",)))
    norms = (module.input_layernorm, module.post_attention_layernorm)
    known = (
        all(_same_code(type(n).forward, llama.LlamaRMSNorm.forward) and not n.weight.requires_grad for n in norms)
        and _attends_as_llama(attention)
        and _rotates_as_llama(sys.modules.get(type(attention).__module__))
    )
    if not known or qkv is None or o is None or mlp is None:
        return None
    return _DecoderLayer(module, (qkv, o, mlp), weights, angles)


def _attends_as_llama(attention: nn.Module) -> bool:
    """Tell whether attention is Llama's; Mistral's and Qwen2's name a window too, which is in the mask already."""
    from transformers.models.mistral import modeling_mistral as mistral
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    known = (llama.LlamaAttention, mistral.MistralAttention, qwen2.Qwen2Attention)
    return any(_same_code(type(attention).forward, one.forward) for one in known)
