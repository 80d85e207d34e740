"""Compute adapted linear layers in one autograd function, W x + b + s B A x, with W frozen.

PEFT's layer is a dozen differentiable operations, each with its own backward. Under autocast it also casts its input to
float32 and back, so that each layer saves a copy of its own. Here layers that read the same input (q, k, v; gate, up)
multiply it with their A matrices at once and save the input and the r-wide A x. The sum is the same up to rounding: in
bfloat16 s B A x is added to W x before the result is rounded, where PEFT rounds s B A x first.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

Gradient = torch.Tensor | None


class Weights(NamedTuple):
    """The weights of one adapted layer: W (out, in), b (out), A (r, in), B (out, r), and views W^T and B^T."""

    W: torch.Tensor
    bias: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    W_t: torch.Tensor
    B_t: torch.Tensor


_FIELDS = len(Weights._fields)


class _Layers:
    """Layers that read the same input. It keeps what their backward pass takes from the forward pass."""

    def __init__(self, flat: Sequence[Any], scales: tuple[float, ...], dtype: torch.dtype) -> None:
        self.each = [Weights(*flat[i : i + _FIELDS]) for i in range(0, len(flat), _FIELDS)]
        self.scales, self.dtype = scales, dtype
        self.ranks = [len(layer.A) for layer in self.each]

    def _split(self, stacked: torch.Tensor, dim: int) -> Sequence[torch.Tensor]:
        """Return each layer's part of what has the ranks of all layers in a dimension."""
        return (stacked,) if len(self.each) == 1 else stacked.split(self.ranks, dim)

    def _cast(self, weight: torch.Tensor, transposed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a weight and its transpose in the dtype to compute in."""
        if weight.dtype == self.dtype:
            return weight, transposed
        weight = weight.to(self.dtype)
        return weight, weight.t()

    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return outputs (tokens, out) for x (tokens, in), and what to save beside x and the weights.

        That is all A below each other (ranks, in), then the B in the dtype to compute in, then A x of each layer.
        """
        A = self.each[0].A if len(self.each) == 1 else torch.cat([layer.A for layer in self.each])
        A = A.to(self.dtype)
        inner = self._split(x @ A.t(), 1)
        outputs, all_B = [], []
        for layer, part, s in zip(self.each, inner, self.scales, strict=True):
            B, B_t = self._cast(layer.B, layer.B_t)
            wide = x @ layer.W_t if layer.bias is None else torch.addmm(layer.bias, x, layer.W_t)
            outputs.append(wide.addmm_(part, B_t, alpha=s))
            all_B.append(B)
        return outputs, [A, *all_B, *inner]

    def backward(
        self, gradients: Sequence[torch.Tensor], x: torch.Tensor, saved: Sequence[torch.Tensor], of_input: bool
    ) -> tuple[Gradient, list[Gradient]]:
        """Return the gradient of x (None unless wanted), and those of each layer's weights, in Weights' order."""
        count = len(self.each)
        A, all_B, inner = saved[0], saved[1 : 1 + count], saved[1 + count :]
        of_B, of_inner = [], []
        for g, layer, B, part, s in zip(gradients, self.each, all_B, inner, self.scales, strict=True):
            outer, through = g.t() @ part, g @ B
            of_B.append((outer if s == 1 else outer.mul_(s)).to(layer.B.dtype))
            of_inner.append(through if s == 1 else through.mul_(s))
        through = of_inner[0] if count == 1 else torch.cat(of_inner, 1)
        of_A = self._split((through.t() @ x).to(self.each[0].A.dtype), 0)
        rest = [part for pair in zip(of_A, of_B, strict=True) for part in (None, None, *pair, None, None)]
        return self._of_input(gradients, through, A) if of_input else None, rest

    def _of_input(self, gradients: Sequence[torch.Tensor], through: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        of_x = gradients[0] @ self.each[0].W
        for g, layer in zip(gradients[1:], self.each[1:], strict=True):
            of_x.addmm_(g, layer.W)
        return of_x.addmm_(through, A)


def _flat(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor (..., width) as (tokens, width)."""
    return tensor.reshape(-1, tensor.shape[-1]).to(dtype)


class SharedInput(torch.autograd.Function):
    """The outputs of layers that read the same input.

    `apply(x, dtype, scales, *weights)` with x (..., in), the dtype to compute in, s of each layer, and the weights of one
    layer after the other; returns a tuple of outputs (..., out).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dtype: torch.dtype, scales: tuple[float, ...], *weights: Any
    ) -> tuple[torch.Tensor, ...]:
        flat = _flat(x, dtype)
        outputs, saved = _Layers(weights, scales, dtype).forward(flat)
        ctx.save_for_backward(flat, *weights, *saved)
        ctx.dtype, ctx.scales, ctx.x = dtype, scales, (x.shape, x.dtype)
        ctx.weights = len(weights)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Gradient, ...]:
        x, *rest = ctx.saved_tensors
        layers = _Layers(rest[: ctx.weights], ctx.scales, ctx.dtype)
        flat = [_flat(g, ctx.dtype) for g in gradients]
        of_x, of_weights = layers.backward(flat, x, rest[ctx.weights :], ctx.needs_input_grad[0])
        shape, dtype = ctx.x
        return None if of_x is None else of_x.view(shape).to(dtype), None, None, *of_weights


class GatedMlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)). It saves what `gate` and `up` give; their product is computed again.

    `apply(x, dtype, scales, *weights)` as in SharedInput, of gate, up and down in this order; returns (..., out).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dtype: torch.dtype, scales: tuple[float, ...], *weights: Any
    ) -> torch.Tensor:
        flat, last = _flat(x, dtype), 2 * _FIELDS
        (gate, up), first_saved = _Layers(weights[:last], scales[:2], dtype).forward(flat)
        (output,), saved = _Layers(weights[last:], scales[2:], dtype).forward(silu(gate).mul_(up))
        ctx.save_for_backward(flat, gate, up, *weights, *saved, *first_saved)
        ctx.dtype, ctx.scales, ctx.x = dtype, scales, (x.shape, x.dtype)
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Gradient, ...]:
        x, gate, up, *rest = ctx.saved_tensors
        weights, saved = rest[: 3 * _FIELDS], rest[3 * _FIELDS :]
        last, flat, active = (
            _Layers(weights[2 * _FIELDS :], ctx.scales[2:], ctx.dtype),
            _flat(gradient, ctx.dtype),
            silu(gate),
        )
        inner, of_last = last.backward([flat], active * up, saved[:3], True)
        assert inner is not None, "wanted"
        of_up, of_gate = active.mul_(inner), torch.ops.aten.silu_backward(inner.mul_(up), gate)
        first = _Layers(weights[: 2 * _FIELDS], ctx.scales[:2], ctx.dtype)
        of_x, of_first = first.backward([of_gate, of_up], x, saved[3:], ctx.needs_input_grad[0])
        shape, dtype = ctx.x
        return None if of_x is None else of_x.view(shape).to(dtype), None, None, *of_first, *of_last
