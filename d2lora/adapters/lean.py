"""Have a model compute what it always computes with fewer operations, and save less for the backward pass, in training.

Modules get a forward of their own for the time of a training; the model's classes stay as they are. Replaced are adapted
linear layers (`products`), and norms, gated MLPs and rotary embeddings where a family's code is Llama's, instruction for
instruction. Whatever else a model has goes on as it is: adapters with dropout, DoRA's, those on Conv1D, embeddings or
experts, and any layer while its adapter is disabled or merged.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, TypeGuard, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from d2lora.adapters.coverage import layers
from d2lora.adapters.layers import ADAPTER, OWN, matrices, plain_matrices
from d2lora.adapters.products import GatedMlp, Gradient, SharedInput, Weights

# Children of one module that read the same input, by the names that transformers gives them.
_SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_MLP = ("gate_proj", "up_proj", "down_proj")


@contextlib.contextmanager
def lean(wrapped: PeftModel) -> Iterator[None]:
    """Replace the forwards of a model's modules inside the `with` block."""
    replaced: list[nn.Module] = []
    cleanup = contextlib.ExitStack()
    try:
        own = {name: _Adapted(layer) for name, layer in layers(wrapped).items() if _replaceable(layer)}
        groups = _groups(own)
        cleanup.callback(wrapped.register_forward_pre_hook(functools.partial(_forget, groups)).remove)
        for group in groups:
            for index, one in enumerate(group.members):
                _replace(one.layer, functools.partial(group.forward, index), replaced)
        for name, module in wrapped.named_modules():
            if _same_code(type(module).forward, llama.LlamaRMSNorm.forward):
                _replace(module, functools.partial(_norm, module), replaced)
            elif _same_code(type(module).forward, llama.LlamaMLP.forward) and isinstance(
                module.act_fn, nn.SiLU | SiLUActivation
            ):
                parts = [own[f"{name}.{part}"] for part in _MLP if f"{name}.{part}" in own]
                if len(parts) == len(_MLP):
                    _replace(module, functools.partial(_mlp, module, parts), replaced)
        _replace_rotary(wrapped, cleanup)
        yield
    finally:
        cleanup.close()
        for module in replaced:
            del module.forward


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


def _same_code(function: Any, of_llama: Any) -> bool:
    """Tell whether a function's instructions, names and constants are those of Llama's, and Llama's is transformers'."""
    if getattr(of_llama, "__module__", None) != llama.__name__:  # something has put another in its place
        return False
    code, other = (getattr(f, "__code__", None) for f in (function, of_llama))
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


class _Adapted:
    """An adapter's layer, with views of its weights that would be made in every pass."""

    def __init__(self, layer: Linear) -> None:
        self.layer, self.base = layer, cast(nn.Linear, layer.get_base_layer())
        self.W_t = self.B_t = torch.empty(0)

    def applies(self) -> bool:
        """Tell whether the layer's one adapter is now added to its output."""
        return not self.layer.disable_adapters and not self.layer.merged and self.layer.active_adapters == [ADAPTER]

    def weights(self) -> Weights:
        """Return the layer's weights for the functions of `products`."""
        W, (A, B) = self.base.weight, plain_matrices(self.layer)
        if self.W_t.data_ptr() != W.data_ptr():
            self.W_t = W.detach().t()
        if self.B_t.data_ptr() != B.data_ptr():
            self.B_t = B.detach().t()
        return Weights(W, self.base.bias, A, B, self.W_t, self.B_t)

    def of_peft(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what PEFT's own forward does."""
        return Linear.forward(self.layer, x, *args, **kwargs)


def _computes_in(members: list[_Adapted], x: torch.Tensor) -> torch.dtype | None:
    """Return the dtype that layers compute in together: autocast's, or that of everything.

    None if dtypes are mixed, an adapter is disabled or merged, or PEFT's own code must run.
    """
    if _usual() or not all(one.applies() for one in members):
        return None
    kind, W, A = x.device.type, members[0].base.weight, matrices(members[0].layer)[0]
    if torch.is_autocast_enabled(kind):
        return W.dtype if W.dtype == torch.get_autocast_dtype(kind) else None
    return W.dtype if x.dtype == W.dtype == A.dtype else None


def _arguments(members: list[_Adapted], x: torch.Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the arguments of a function of `products`."""
    scales = tuple(one.layer.scaling[ADAPTER] for one in members)
    return x, dtype, scales, *(part for one in members for part in one.weights())


class _Group:
    """Layers that read the same input: the first that is called computes the outputs of all."""

    def __init__(self, members: list[_Adapted]) -> None:
        self.members = members
        self.read: torch.Tensor | None = None
        self.outputs: dict[int, torch.Tensor] = {}

    def forget(self) -> None:
        """Drop outputs that were not taken: after a pass that failed half-way, they hold all that it had computed."""
        self.read, self.outputs = None, {}

    def forward(self, index: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return a layer's output (..., out) of x (..., in); with anything unusual, PEFT's own."""
        if x is not self.read or index not in self.outputs:
            dtype = None if args or kwargs else _computes_in(self.members, x)
            if dtype is None:
                return self.members[index].of_peft(x, *args, **kwargs)
            self.outputs = dict(enumerate(SharedInput.apply(*_arguments(self.members, x, dtype))))
        output = self.outputs.pop(index)
        self.read = x if self.outputs else None
        return output


def _forget(groups: list[_Group], *_: Any) -> None:
    """Begin a pass of the model with nothing of an earlier one."""
    for group in groups:
        group.forget()


def _groups(own: dict[str, _Adapted]) -> list[_Group]:
    """Return layers in groups that read the same input, most of them of one layer."""
    groups: dict[tuple[str, Any], list[_Adapted]] = {}
    for name, one in own.items():
        parent, _, child = name.rpartition(".")
        siblings = next((names for names in _SHARED if child in names), child)
        groups.setdefault((parent, siblings), []).append(one)
    return [_Group(members) for members in groups.values()]


def _mlp(module: nn.Module, members: list[_Adapted], x: torch.Tensor) -> torch.Tensor:
    """Return a gated MLP's output (..., width) of x (..., width)."""
    dtype = _computes_in(members, x)
    if dtype is None:
        return type(module).forward(module, x)
    return GatedMlp.apply(*_arguments(members, x, dtype))


# --- norms -----------------------------------------------------------------------------------------------------------


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    if _usual() or module.weight.requires_grad:
        return type(module).forward(module, x)
    return RmsNorm.apply(x, module.weight, module.variance_epsilon)


class RmsNorm(torch.autograd.Function):
    """Llama's RMSNorm with a frozen weight. It saves its input, not a float32 copy of it.

    `apply(x, weight, eps)` with x (..., width) and weight (width); returns (..., width), bit for bit Llama's.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(torch.float32)
        inverse = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Gradient, None, None]:
        x, inverse, weight = ctx.saved_tensors
        normed, g = x.to(torch.float32) * inverse, (gradient * weight).to(x.dtype).to(torch.float32)
        share = (g * normed).mean(-1, keepdim=True)
        return torch.addcmul(g, normed, share, value=-1).mul_(inverse).to(x.dtype), None, None


# --- rotary embeddings -----------------------------------------------------------------------------------------------


class Rotary(torch.autograd.Function):
    """Rotary position embedding of queries or keys: `apply(x, cos, sin)`, all (..., tokens, head), sin negated in its first half."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Gradient, None, None]:
        cos, sin = ctx.saved_tensors
        turned = (gradient * sin).roll(gradient.shape[-1] // 2, -1)
        return turned.add_(gradient * cos), None, None


class _Rotate:
    """Llama's apply_rotary_pos_emb. All layers of a pass get the same cos and sin, so these are set up once a pass."""

    def __init__(self, of_family: Callable[..., Any]) -> None:
        self.of_family, self.given = of_family, (torch.empty(0), torch.empty(0))
        self.cos = self.sin = torch.empty(0)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if _usual() or unsqueeze_dim != 1 or cos.requires_grad or q.dtype != cos.dtype:
            return self.of_family(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        if self.given[0] is not cos or self.given[1] is not sin:
            first, second = sin.chunk(2, -1)
            self.given, self.cos = (cos, sin), cos.unsqueeze(1)
            self.sin = torch.cat([-first, second], -1).unsqueeze(1)
        return Rotary.apply(q, self.cos, self.sin), Rotary.apply(k, self.cos, self.sin)


def _replace_rotary(wrapped: PeftModel, stack: contextlib.ExitStack) -> None:
    """Replace the function in the modules of Python that the model's attention is defined in, until the stack closes."""
    for module in {sys.modules[type(m).__module__] for m in wrapped.modules()}:
        function, rotate_half = (getattr(module, name, None) for name in ("apply_rotary_pos_emb", "rotate_half"))
        known = isinstance(function, FunctionType) and _same_code(function, llama.apply_rotary_pos_emb)
        if known and _same_code(rotate_half, llama.rotate_half):
            setattr(module, "apply_rotary_pos_emb", _Rotate(cast(FunctionType, function)))  # noqa: B010
            stack.callback(setattr, module, "apply_rotary_pos_emb", function)
