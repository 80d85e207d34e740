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
    """Adapted layers that read the same input, as one: W (outs, in), b (outs), A (ranks, in) and B (outs, ranks).

    W, b and A are those of the layers one below the other. B has each layer's B in a block of its own, and zeros beside it.
    All layers have the same s and dtype, and all or none have b.
    """

    def __init__(self, members: list[Adapted]) -> None:
        self.members = members
        self.scale, self.plain, self.anchor = members[0].scale, members[0].plain, members[0].A
        self.outs = [len(member.W) for member in members]
        self.W = members[0].W.detach()
        self.bias: torch.Tensor | None = members[0].base.bias
        self._copied: list[tuple[torch.Tensor, torch.Tensor]] = []  # of plain adapters: the copy, and what it is of
        self._copies: list[torch.Tensor] = []  # of others

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
        """Make the matrices of a pass in a dtype; A and B are the weights themselves where neither dtype nor shape differ."""
        folded = [member.matrices() for member in self.members]
        self.ranks = [len(A) for A, _ in folded]
        self._of_blocks = _blocks(self.outs, self.ranks)
        self.W_t = self.W.t()
        self.A = self.W.new_empty(sum(self.ranks), self.W.shape[1], dtype=dtype)
        self.B = self.W.new_zeros(sum(self.outs), sum(self.ranks), dtype=dtype)
        self._copies, self._copied = [], []
        if self.plain:
            self._set_up_plain(flat)
        else:
            self._copies = [
                copy for pair in zip(self.A.split(self.ranks), self._blocks(self.B), strict=True) for copy in pair
            ]
        self.A_t, self.B_t = self.A.t(), self.B.t()

    def _set_up_plain(self, flat: Flat) -> None:
        self._of_A = flat.stacked([member.A for member in self.members])
        self._of_B = [flat.stacked([member.B]) for member in self.members]
        if self.A.dtype == self._of_A.weights.dtype:
            self.A = self._of_A.weights
        else:
            self._copied = [(self.A, self._of_A.weights)]
        if len(self.members) == 1 and self.B.dtype == self._of_B[0].weights.dtype:
            self.B = self._of_B[0].weights
        else:
            self._copied += zip(self._blocks(self.B), [B.weights for B in self._of_B], strict=True)

    def _blocks(self, B: torch.Tensor) -> list[torch.Tensor]:
        """Return each layer's block of B."""
        return [B.as_strided(*block) for block in self._of_blocks]

    def copies(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what must be copied before a pass: each copy, and what it is of."""
        if self.plain:
            return self._copied
        return list(zip(self._copies, (matrix for member in self.members for matrix in member.matrices()), strict=True))

    def forward(self, x: torch.Tensor, added: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output (tokens, outs) for x (tokens, in), plus `added`, and A x (tokens, ranks), to be saved."""
        inner = torch.mm(x, self.A_t)
        first = self.bias if added is None else added
        y = torch.mm(x, self.W_t) if first is None else torch.addmm(first, x, self.W_t)
        if added is not None and self.bias is not None:
            y.add_(self.bias)
        return y.addmm_(inner, self.B_t, alpha=self.scale), inner

    def backward(self, gradient: torch.Tensor, x: torch.Tensor, inner: torch.Tensor, of_input: bool = True) -> Gradient:
        """Add the gradients of A and B, and return that of x, or None if it is not wanted."""
        through = torch.mm(gradient, self.B)
        if self.scale != 1:
            through.mul_(self.scale)
        (self._learn if self.plain else self._learn_folded)(gradient, x, inner, through)
        return torch.mm(through, self.A).addmm_(gradient, self.W) if of_input else None

    def _learn(self, gradient: torch.Tensor, x: torch.Tensor, inner: torch.Tensor, through: torch.Tensor) -> None:
        self._of_A.learn(through.t(), x)
        if len(self.members) == 1:
            self._of_B[0].learn(gradient.t(), inner, self.scale)
            return
        blocks = self._blocks(torch.mm(gradient.t(), inner))
        for B, block in zip(self._of_B, blocks, strict=True):
            B.add(block, self.scale)

    def _learn_folded(
        self, gradient: torch.Tensor, x: torch.Tensor, inner: torch.Tensor, through: torch.Tensor
    ) -> None:
        of_A = torch.mm(through.t(), x).split(self.ranks)
        of_B = self._blocks(torch.mm(gradient.t(), inner).mul_(self.scale))
        for member, its_A, its_B in zip(self.members, of_A, of_B, strict=True):
            member.learn(its_A, its_B)


def _blocks(heights: Sequence[int], widths: Sequence[int]) -> list[tuple[tuple[int, int], tuple[int, int], int]]:
    """Return size, stride and offset of the blocks of a block diagonal matrix."""
    blocks, row, column = [], 0, 0
    for height, width in zip(heights, widths, strict=True):
        blocks.append(((height, width), (sum(widths), 1), row * sum(widths) + column))
        row, column = row + height, column + width
    return blocks


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
