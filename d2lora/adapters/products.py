"""Compute parts of a decoder layer in one autograd function each: adapted linear layers, W x + b + s B A x with W frozen,
alone or with the norm, the rotary embedding and the activation around them.

PEFT's layer is a dozen differentiable operations, each with its own backward. Under autocast it also casts its input to
float32 and back, so that each layer saves a copy of its own. Here layers that read the same input (q, k, v; gate, up)
multiply it with their A matrices at once and save the r-wide A x; what a norm or an activation gives is computed again.
The sum is the same up to rounding: in bfloat16 s B A x is added to W x before the result is rounded, where PEFT rounds
s B A x first.

Gradients of A and B are added to their `.grad` in the backward pass itself, without a node of autograd for each matrix.
So the functions take one of the matrices, `anchor`, as an argument: autograd skips a function of which no argument needs
a gradient, as in the first layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from d2lora.adapters.layers import ADAPTER, Matrices, Plain, plain_matrices

Gradient = torch.Tensor | None


class Adapted:
    """An adapter's layer, and its parameters without the way through its modules."""

    def __init__(self, layer: Linear) -> None:
        self.layer, self.base = layer, cast(nn.Linear, layer.get_base_layer())
        self.scale = layer.scaling[ADAPTER]
        self.plain = isinstance(layer.lora_variant.get(ADAPTER), Plain)
        modules = self.base, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        self._of_W, self._of_A, self._of_B = (module._parameters for module in modules)

    @property
    def W(self) -> nn.Parameter:
        """Return the base's weight (out, in)."""
        return cast(nn.Parameter, self._of_W["weight"])

    @property
    def A(self) -> nn.Parameter:
        """Return the trained A (r, in)."""
        return cast(nn.Parameter, self._of_A["weight"])

    @property
    def B(self) -> nn.Parameter:
        """Return the trained B (out, r)."""
        return cast(nn.Parameter, self._of_B["weight"])

    def applies(self) -> bool:
        """Tell whether the layer's one adapter is now added to its output."""
        return not self.layer.disable_adapters and not self.layer.merged and self.layer.active_adapters == [ADAPTER]

    def matrices(self) -> Matrices:
        """Return A and B of the plain adapter with the layer's output."""
        return (self.A, self.B) if self.plain else plain_matrices(self.layer)

    def learn(self, of_A: torch.Tensor, of_B: torch.Tensor) -> None:
        """Add gradients of what `matrices` returns to those of the layer's parameters."""
        if self.plain:
            _add_gradient(self.A, of_A)
            _add_gradient(self.B, of_B)
            return
        with torch.enable_grad():
            folded = self.matrices()
            torch.autograd.backward(folded, [g.to(m.dtype) for g, m in zip((of_A, of_B), folded, strict=True)])


def _add_gradient(weight: nn.Parameter, gradient: torch.Tensor) -> None:
    so_far = weight.grad
    if so_far is None:
        weight.grad = gradient if gradient.dtype == weight.dtype else gradient.to(weight.dtype)
    else:
        so_far.add_(gradient)


class Weights(NamedTuple):
    """What a pass multiplies with: W (out, in), b (out) and B (out, r) in the dtype to compute in, their transposes, and s."""

    W: torch.Tensor
    W_t: torch.Tensor
    bias: torch.Tensor | None
    B: torch.Tensor
    B_t: torch.Tensor
    scale: float


class SharedInput:
    """Adapted layers that read the same input. Their A and B are copied once a pass, in the dtype to compute in."""

    def __init__(self, members: list[Adapted]) -> None:
        self.members = members
        self.weights: list[Weights] = []
        self.A = self.A_t = torch.empty(0)
        self._ranks: list[int] = []

    @property
    def anchor(self) -> nn.Parameter:
        """Return a parameter that is trained."""
        return self.members[0].A

    def set_up(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Make copies of A and B in a dtype, and views of W. Return the copies, A and B of one layer after the other."""
        matrices = [member.matrices() for member in self.members]
        self._ranks = [len(A) for A, _ in matrices]
        self.A = torch.cat([A.detach() for A, _ in matrices]).to(dtype)
        self.A_t, self.weights = self.A.t(), []
        for member, (_, B) in zip(self.members, matrices, strict=True):
            W, own_B = member.W.detach(), B.detach().to(dtype, copy=True)
            self.weights.append(Weights(W, W.t(), member.base.bias, own_B, own_B.t(), member.scale))
        parts = self.A.split(self._ranks)
        return [copy for part, one in zip(parts, self.weights, strict=True) for copy in (part, one.B)]

    def _each(self, stacked: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return each layer's columns of what has the ranks of all."""
        return (stacked,) if len(self._ranks) == 1 else stacked.split_with_sizes(self._ranks, 1)

    def forward(
        self, x: torch.Tensor, added: torch.Tensor | None = None, into: Sequence[torch.Tensor | None] = ()
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return outputs (tokens, out) for x (tokens, in), and A x of all layers (tokens, ranks), to be saved.

        `added` (tokens, out) is added to the output of a single layer; `into` has tensors that take outputs.
        """
        inner = torch.mm(x, self.A_t)
        outputs = []
        for index, (one, part) in enumerate(zip(self.weights, self._each(inner), strict=True)):
            out = into[index] if index < len(into) else None
            first = one.bias if added is None else added
            y = torch.mm(x, one.W_t, out=out) if first is None else torch.addmm(first, x, one.W_t, out=out)
            if added is not None and one.bias is not None:
                y.add_(one.bias)
            outputs.append(y.addmm_(part, one.B_t, alpha=one.scale))
        return outputs, inner

    def backward(
        self, gradients: Sequence[torch.Tensor], x: torch.Tensor, inner: torch.Tensor, of_input: bool = True
    ) -> Gradient:
        """Add the gradients of A and B, and return that of x, or None if it is not wanted."""
        of_B, of_inner = [], []
        for g, one, part in zip(gradients, self.weights, self._each(inner), strict=True):
            outer, through = torch.mm(g.t(), part), torch.mm(g, one.B)
            of_B.append(outer if one.scale == 1 else outer.mul_(one.scale))
            of_inner.append(through if one.scale == 1 else through.mul_(one.scale))
        through = of_inner[0] if len(of_inner) == 1 else torch.cat(of_inner, 1)
        all_A = torch.mm(through.t(), x)
        of_A = (all_A,) if len(of_inner) == 1 else all_A.split_with_sizes(self._ranks)
        for member, its_A, its_B in zip(self.members, of_A, of_B, strict=True):
            member.learn(its_A, its_B)
        return self._of_input(gradients, through) if of_input else None

    def _of_input(self, gradients: Sequence[torch.Tensor], through: torch.Tensor) -> torch.Tensor:
        of_x = torch.mm(through, self.A)
        for g, one in zip(gradients, self.weights, strict=True):
            of_x.addmm_(g, one.W)
        return of_x


def _flat(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor (..., width) as (tokens, width)."""
    return tensor.reshape(-1, tensor.shape[-1]).to(dtype)


class Project(torch.autograd.Function):
    """The outputs of layers that read the same input: `apply(x, anchor, layers)` with x (..., in) returns each (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, layers: SharedInput) -> tuple[torch.Tensor, ...]:
        flat = _flat(x, layers.A.dtype)
        outputs, inner = layers.forward(flat)
        ctx.save_for_backward(flat, inner)
        ctx.layers, ctx.x = layers, (x.shape, x.dtype)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Gradient, None, None]:
        x, inner = ctx.saved_tensors
        flat = [_flat(g, x.dtype) for g in gradients]
        of_x = ctx.layers.backward(flat, x, inner, ctx.needs_input_grad[0])
        shape, dtype = ctx.x
        return None if of_x is None else of_x.view(shape).to(dtype), None, None


# --- gated MLPs ------------------------------------------------------------------------------------------------------


class Mlp(NamedTuple):
    """The layers of a gated MLP, down(silu(gate(x)) * up(x)). Of its activations, what `gate` and `up` give is saved."""

    gate_up: SharedInput
    down: SharedInput

    def forward(
        self, x: torch.Tensor, added: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the output (tokens, width) for x (tokens, width), plus `added`, and what `backward` takes."""
        (gate, up), inner = self.gate_up.forward(x)
        (output,), last_inner = self.down.forward(silu(gate).mul_(up), added)
        return output, (gate, up, inner, last_inner)

    def backward(
        self, gradient: torch.Tensor, x: torch.Tensor, saved: Sequence[torch.Tensor], of_input: bool = True
    ) -> Gradient:
        """Add the gradients of the adapters, and return that of x, or None if it is not wanted."""
        gate, up, inner, last_inner = saved
        active = silu(gate)
        of_product = self.down.backward([gradient], active * up, last_inner)
        assert of_product is not None, "wanted"
        of_up, of_gate = active.mul_(of_product), torch.ops.aten.silu_backward(of_product.mul_(up), gate)
        return self.gate_up.backward([of_gate, of_up], x, inner, of_input)


class GatedMlp(torch.autograd.Function):
    """A gated MLP: `apply(x, anchor, mlp)` with x (..., width) returns (..., width)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, mlp: Mlp) -> torch.Tensor:
        flat = _flat(x, mlp.down.A.dtype)
        output, saved = mlp.forward(flat)
        ctx.save_for_backward(flat, *saved)
        ctx.mlp, ctx.x = mlp, (x.shape, x.dtype)
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Gradient, None, None]:
        x, *saved = ctx.saved_tensors
        of_x = ctx.mlp.backward(_flat(gradient, x.dtype), x, saved, ctx.needs_input_grad[0])
        shape, dtype = ctx.x
        return None if of_x is None else of_x.view(shape).to(dtype), None, None


# --- norms -----------------------------------------------------------------------------------------------------------


def _of_norm(gradient: torch.Tensor, normed: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return an RMSNorm's gradient of its input, in float32; `normed` is its output before the product with its weight."""
    g = (gradient * weight).to(torch.float32)
    share = (g * normed).mean(-1, keepdim=True)
    return torch.addcmul(g, normed, share, value=-1).mul_(inverse)


class Norm(NamedTuple):
    """The weight (width) of an RMSNorm, and its epsilon."""

    weight: torch.Tensor
    eps: float

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output for x (..., width), and 1 / root mean square (..., 1) in float32, which `again` takes."""
        wide = x.to(torch.float32)
        inverse = wide.pow(2).mean(-1, keepdim=True).add_(self.eps).rsqrt_()  # 1 / root mean square
        return self.weight * (wide * inverse).to(x.dtype), inverse

    def again(self, x: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output once more, and it before the product with the weight, in float32."""
        normed = x.to(torch.float32) * inverse
        return self.weight * normed.to(x.dtype), normed


class RmsNorm(torch.autograd.Function):
    """Llama's RMSNorm with a frozen weight. It saves its input, not a float32 copy of it.

    `apply(x, weight, eps)` with x (..., width) and weight (width); returns (..., width), bit for bit Llama's.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        output, inverse = Norm(weight, eps).forward(x)
        ctx.save_for_backward(x, inverse, weight)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Gradient, None, None]:
        x, inverse, weight = ctx.saved_tensors
        return _of_norm(gradient, x.to(torch.float32) * inverse, inverse, weight).to(x.dtype), None, None


# --- rotary embeddings -----------------------------------------------------------------------------------------------


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))


def _rotated_back(gradient: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return (gradient * sin).roll(gradient.shape[-1] // 2, -1).add_(gradient * cos)


class Rotary(torch.autograd.Function):
    """Rotary position embedding of queries or keys: `apply(x, cos, sin)`, all (..., head), sin negated in its first half."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Gradient, None, None]:
        return _rotated_back(gradient, *ctx.saved_tensors), None, None


# --- a decoder layer, but for its attention --------------------------------------------------------------------------


class BeforeAttention(torch.autograd.Function):
    """A decoder layer up to its attention: norm, q, k and v, rotary embedding.

    `apply(x, anchor, norm, qkv, cos, sin)` with x (rows, length, width), cos and sin (rows or 1, length, 1, head), sin negated
    in its first half; returns queries, keys and values (rows, heads, length, head).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        norm: Norm,
        qkv: SharedInput,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        rows, length, width = x.shape
        flat = x.reshape(-1, width)
        normed, inverse = norm.forward(flat)
        sizes = [len(one.W) for one in qkv.weights]
        both = flat.new_empty(len(flat), sizes[0] + sizes[1])  # queries and keys side by side, to be rotated at once
        (_, _, v), inner = qkv.forward(normed, into=both.split_with_sizes(sizes[:2], 1))
        shape, heads = (rows, length, -1, cos.shape[-1]), [size // cos.shape[-1] for size in sizes]
        q, k = _rotated(both.view(shape), cos, sin).transpose(1, 2).split_with_sizes(heads[:2], 1)
        ctx.save_for_backward(flat, inverse, inner, cos, sin)
        ctx.norm, ctx.qkv, ctx.shape, ctx.sizes = norm, qkv, x.shape, sizes
        return q, k, v.view(shape).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_q: torch.Tensor, of_k: torch.Tensor, of_v: torch.Tensor) -> tuple[Gradient, ...]:
        x, inverse, inner, cos, sin = ctx.saved_tensors
        both = torch.cat([of_q.transpose(1, 2), of_k.transpose(1, 2)], 2)
        back = _rotated_back(both, cos, sin).reshape(len(x), -1).split_with_sizes(ctx.sizes[:2], 1)
        gradients = [*back, of_v.transpose(1, 2).reshape(len(x), -1)]
        output, normed = ctx.norm.again(x, inverse)
        of_output = ctx.qkv.backward(gradients, output, inner, ctx.needs_input_grad[0])
        if of_output is None:
            return (None,) * 6
        of_x = _of_norm(of_output, normed, inverse, ctx.norm.weight).to(x.dtype)
        return of_x.view(ctx.shape), *(None,) * 5


class AfterAttention(torch.autograd.Function):
    """A decoder layer from its attention on: o, the sum with the layer's input, norm, gated MLP, and the sum again.

    `apply(attended, x, anchor, o, norm, mlp)` with attention's output (rows, length, heads, head) and the layer's input
    x (rows, length, width); returns (rows, length, width).
    """

    @staticmethod
    def forward(
        ctx: Any,
        attended: torch.Tensor,
        x: torch.Tensor,
        anchor: torch.Tensor,
        o: SharedInput,
        norm: Norm,
        mlp: Mlp,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        read = attended.reshape(len(flat), -1)
        (middle,), inner = o.forward(read, flat)
        normed, inverse = norm.forward(middle)
        output, saved = mlp.forward(normed, middle)
        ctx.save_for_backward(read, inner, middle, inverse, *saved)
        ctx.o, ctx.norm, ctx.mlp, ctx.shapes = o, norm, mlp, (attended.shape, x.shape)
        return output.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Gradient, ...]:
        read, inner, middle, inverse, *saved = ctx.saved_tensors
        flat = gradient.reshape(middle.shape)
        output, normed = ctx.norm.again(middle, inverse)
        of_output = ctx.mlp.backward(flat, output, saved)
        assert of_output is not None, "wanted"
        of_middle = _of_norm(of_output, normed, inverse, ctx.norm.weight).add_(flat).to(middle.dtype)
        of_read = ctx.o.backward([of_middle], read, inner, ctx.needs_input_grad[0])
        attended, x = ctx.shapes
        return None if of_read is None else of_read.view(attended), of_middle.view(x), *(None,) * 4
