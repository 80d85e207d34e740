"""Compute adapted linear layers, W x + b + s B A x with W frozen, in one autograd function.

PEFT's layer is a dozen differentiable operations, each with its own backward. Under autocast it also casts its input to
float32 and back, so that each layer saves a copy of its own. Here layers that read the same input (q, k, v; gate, up)
are one: their W, A and B are one matrix each, and of the input and the r-wide A x one copy is saved.
The sum is the same up to rounding: in bfloat16 s B A x is added to W x before the result is rounded, where PEFT rounds
s B A x first.

Gradients of A and B are added to their `.grad` in the backward pass itself, without a node of autograd for each matrix.
So the functions take one of the matrices, `anchor`, as an argument: autograd skips a function of which no argument needs
a gradient, as in the first layer.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.autograd.function import once_differentiable

from d2lora.adapters.flat import Flat
from d2lora.adapters.layers import ADAPTER, Matrices, Plain, matrices, plain_matrices

Gradient = torch.Tensor | None


class Adapted:
    """An adapter's layer with its weights W (out, in), A (r, in) and B (out, r), and s."""

    def __init__(self, layer: Linear) -> None:
        self.layer, self.base = layer, cast(nn.Linear, layer.get_base_layer())
        self.W, (self.A, self.B) = self.base.weight, matrices(layer)
        self.scale = layer.scaling[ADAPTER]
        self.plain = isinstance(layer.lora_variant.get(ADAPTER), Plain)

    def applies(self) -> bool:
        """Tell whether the layer's one adapter is now added to its output."""
        layer = self.layer
        return not layer._disable_adapters and not layer.merged_adapters and layer.active_adapters == [ADAPTER]

    def matrices(self) -> Matrices:
        """Return A and B of the plain adapter with the layer's output."""
        return (self.A, self.B) if self.plain else plain_matrices(self.layer)

    def learn(self, of_A: torch.Tensor, of_B: torch.Tensor) -> None:
        """Add gradients of what `matrices` returns to those of the layer's parameters."""
        with torch.enable_grad():
            folded = self.matrices()
            torch.autograd.backward(folded, [g.to(m.dtype) for g, m in zip((of_A, of_B), folded, strict=True)])


class SharedInput:
    """Adapted layers that read the same input, as one: their W (outs, in), b (outs) and A (ranks, in) lie one below the other.

    All layers have the same s and dtype, and all or none have b. Gradients of B and of A x are computed transposed: on a CPU a
    product with few rows is up to four times as fast as one with few columns.
    """

    def __init__(self, members: list[Adapted]) -> None:
        self.members = members
        self.scale, self.plain, self.anchor = members[0].scale, members[0].plain, members[0].A
        self.outs = [len(member.W) for member in members]
        self.W = members[0].W.detach()
        self.bias: torch.Tensor | None = members[0].base.bias
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def join(self) -> None:
        """Lay the layers' W one below the other in memory, without a second copy, until `part`."""
        if len(self.members) > 1:
            self.W = torch.cat([member.W.detach() for member in self.members])
            for member, W in zip(self.members, self.W.split(self.outs), strict=True):
                member.W.data = W
            if self.bias is not None:
                self.bias = torch.cat([member.base.bias.detach() for member in self.members])

    def part(self) -> None:
        """Give each layer's W memory of its own again."""
        if len(self.members) > 1:
            for member in self.members:
                member.W.data = member.W.data.clone()

    def set_up(self, dtype: torch.dtype, flat: Flat) -> None:
        """Make the matrices of a pass in a dtype; plain A and B in the dtype of the weights are the weights themselves."""
        self._copies = []
        if self.plain:
            self._of_A = flat.stacked([member.A for member in self.members])
            of_B = [flat.stacked([member.B]) for member in self.members]
            self._of_B_t = [one._replace(gradients=one.gradients.t()) for one in of_B]
            self.ranks = [len(member.A) for member in self.members]
            self.A, *Bs = (self._in(dtype, stacked.weights) for stacked in (self._of_A, *of_B))
        else:
            folded = [member.matrices() for member in self.members]
            self.ranks = [len(A) for A, _ in folded]
            self.A, *Bs = (
                torch.empty_like(m, dtype=dtype) for m in (torch.cat([A for A, _ in folded]), *(B for _, B in folded))
            )
        self.A_t, self.B_t, self.W_t = self.A.t(), [B.t() for B in Bs], self.W.t()

    def _in(self, dtype: torch.dtype, weights: torch.Tensor) -> torch.Tensor:
        """Return weights in a dtype, to be copied before each pass if they have another."""
        if weights.dtype == dtype:
            return weights
        self._copies.append((torch.empty_like(weights, dtype=dtype), weights))
        return self._copies[-1][0]

    def copies(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what must be copied before a pass: each copy, and what it is of."""
        if self.plain:
            return self._copies
        folded = [member.matrices() for member in self.members]
        of_A = zip(self.A.split(self.ranks), (A for A, _ in folded), strict=True)
        return [*of_A, *zip((B_t.t() for B_t in self.B_t), (B for _, B in folded), strict=True)]

    def forward(self, x: torch.Tensor, added: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output (tokens, outs) for x (tokens, in), plus `added`, and A x (tokens, ranks), to be saved."""
        inner = torch.mm(x, self.A_t)
        first = self.bias if added is None else added
        y = torch.mm(x, self.W_t) if first is None else torch.addmm(first, x, self.W_t)
        if added is not None and self.bias is not None:
            y.add_(self.bias)
        for its_y, its_inner, B_t in zip(_split(y, self.outs, 1), _split(inner, self.ranks, 1), self.B_t, strict=True):
            its_y.addmm_(its_inner, B_t, alpha=self.scale)
        return y, inner

    def backward(self, gradient: torch.Tensor, x: torch.Tensor, inner: torch.Tensor, of_input: bool = True) -> Gradient:
        """Add the gradients of A and B, and return that of x, or None if it is not wanted."""
        of_inner = gradient.new_empty(sum(self.ranks), len(x))
        for its_part, g_t, B_t in zip(
            _split(of_inner, self.ranks), _split(gradient.t(), self.outs), self.B_t, strict=True
        ):
            torch.mm(B_t, g_t, out=its_part)
        if self.scale != 1:
            of_inner.mul_(self.scale)
        pairs = zip(_split(inner.t(), self.ranks), _split(gradient, self.outs, 1), strict=True)
        of_B_t = [torch.mm(inner_t, g) for inner_t, g in pairs]
        if self.plain:
            self._of_A.learn(of_inner, x)
            for stacked, its_B_t in zip(self._of_B_t, of_B_t, strict=True):
                stacked.add(its_B_t, self.scale)
        else:
            of_A = _split(torch.mm(of_inner, x), self.ranks)
            for member, its_A, its_B_t in zip(self.members, of_A, of_B_t, strict=True):
                member.learn(its_A, its_B_t.t() * self.scale)
        return torch.mm(of_inner.t(), self.A).addmm_(gradient, self.W) if of_input else None


def _split(values: torch.Tensor, sizes: list[int], dimension: int = 0) -> Sequence[torch.Tensor]:
    """Return each layer's part of values in a dimension."""
    return (values,) if len(sizes) == 1 else values.split_with_sizes(sizes, dimension)


def flattened(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor (..., width) as (tokens, width)."""
    return tensor.reshape(-1, tensor.shape[-1]).to(dtype)


class Project(torch.autograd.Function):
    """The outputs of layers that read the same input: `apply(x, anchor, layers)` with x (..., in) returns each (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, layers: SharedInput) -> tuple[torch.Tensor, ...]:
        flat = flattened(x, layers.A.dtype)
        output, inner = layers.forward(flat)
        ctx.save_for_backward(flat, inner)
        ctx.layers, ctx.x = layers, (x.shape, x.dtype)
        parts = output.view(*x.shape[:-1], output.shape[-1]).split(layers.outs, -1)
        return tuple(part.contiguous() for part in parts)  # of which the model may keep one, or change it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Gradient, None, None]:
        x, inner = ctx.saved_tensors
        gradient = joined(gradients, x.dtype)
        of_x = ctx.layers.backward(gradient, x, inner, ctx.needs_input_grad[0])
        shape, dtype = ctx.x
        return None if of_x is None else of_x.view(shape).to(dtype), None, None


def joined(gradients: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return gradients (..., out) of several layers side by side, as (tokens, outs)."""
    return flattened(gradients[0] if len(gradients) == 1 else torch.cat(list(gradients), -1), dtype)
