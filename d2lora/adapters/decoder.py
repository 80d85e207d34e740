"""Compute a decoder layer like Llama's in few autograd functions: one up to its attention and one from it on, or one in all.

Attention itself is what the model runs with, but for short rows in float32 on a CPU. There a kernel's calls, one for each
row and head, cost more than the products that it saves, and attention is three products of all rows and heads at once.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from d2lora.adapters.parts import Mlp, Norm
from d2lora.adapters.products import Gradient, SharedInput, flattened
from d2lora.layouts.rotary import Angles

SHORT = 48  # tokens of a row; at 64 PyTorch's kernel is as fast


class Before(NamedTuple):
    """A decoder layer up to its attention: norm, q, k and v, rotary embedding."""

    norm: Norm
    qkv: SharedInput
    heads: tuple[int, int, int]  # of queries, keys and values

    def forward(
        self, x: torch.Tensor, angles: Angles, compact: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return queries, keys and values one behind the other (rows, heads, length, head), and what `backward` takes.

        x is (rows, length, width). They are contiguous if they are to be `compact`, else only over heads and head.
        """
        rows, length, width = x.shape
        flat = x.reshape(-1, width)
        normed, inverse = self.norm.forward(flat)
        output, inner = self.qkv.forward(normed)
        states = output.view(rows, length, sum(self.heads), -1).transpose(1, 2)
        states = states.contiguous() if compact else states
        angles.rotate_(self._rotated(states))
        return states, (flat, inverse, inner)

    def backward(
        self,
        of_states: torch.Tensor,
        angles: Angles,
        saved: tuple[torch.Tensor, ...],
        of_input: bool,
        added: torch.Tensor | None = None,
    ) -> Gradient:
        """Add the gradients of the adapters, and return that of x (tokens, width) in float32, plus `added`.

        None if it is not wanted.

        `of_states` (rows, heads, length, head) is changed.
        """
        x, inverse, inner = saved
        angles.rotate_back_(self._rotated(of_states))
        output, normed = self.norm.again(x, inverse)
        of_output = self.qkv.backward(of_states.transpose(1, 2).reshape(x.shape[0], -1), output, inner, of_input)
        return None if of_output is None else self.norm.backward(of_output, normed, inverse, added)

    def _rotated(self, states: torch.Tensor) -> torch.Tensor:
        """Return a view of queries and keys."""
        return states.narrow(1, 0, self.heads[0] + self.heads[1])


class After(NamedTuple):
    """A decoder layer from its attention on: o, the sum with the layer's input, norm, gated MLP, and the sum again."""

    o: SharedInput
    norm: Norm
    mlp: Mlp

    def forward(self, attended: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the layer's output, and what `backward` takes, for attention's output and the layer's input, all (tokens, width)."""
        middle, inner = self.o.forward(attended, x)
        normed, inverse = self.norm.forward(middle)
        output, of_mlp = self.mlp.forward(normed, middle)
        return output, (attended, inner, middle, inverse, *of_mlp)

    def backward(
        self, gradient: torch.Tensor, saved: tuple[torch.Tensor, ...], of_attended: bool = True
    ) -> tuple[Gradient, torch.Tensor]:
        """Add the gradients of the adapters, and return those of attention's output, if it is wanted, and of the layer's input."""
        attended, inner, middle, inverse, *of_mlp = saved
        output, normed = self.norm.again(middle, inverse)
        of_output = self.mlp.backward(gradient, output, tuple(of_mlp))
        assert of_output is not None, "wanted"
        of_middle = self.norm.backward(of_output, normed, inverse, gradient).to(middle.dtype)
        return self.o.backward(of_middle, attended, inner, of_attended), of_middle


class BeforeAttention(torch.autograd.Function):
    """`apply(x, anchor, before, angles)` with x (rows, length, width) returns queries, keys and values (rows, heads, length, head)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor, before: Before, angles: Angles
    ) -> tuple[torch.Tensor, ...]:
        states, saved = before.forward(x, angles)
        ctx.save_for_backward(*saved)
        ctx.before, ctx.angles, ctx.shape = before, angles, x.shape
        return states.split_with_sizes(before.heads, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Gradient, None, None, None]:
        x, *_ = saved = ctx.saved_tensors
        of_states = torch.cat([gradient.transpose(1, 2) for gradient in gradients], 2).transpose(1, 2)
        of_x = ctx.before.backward(of_states, ctx.angles, saved, ctx.needs_input_grad[0])
        return None if of_x is None else of_x.to(x.dtype).view(ctx.shape), None, None, None


class AfterAttention(torch.autograd.Function):
    """`apply(attended, x, anchor, after)` with attention's output (rows, length, heads, head) and the layer's input x
    (rows, length, width) returns (rows, length, width).
    """

    @staticmethod
    def forward(ctx: Any, attended: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, after: After) -> torch.Tensor:
        flat = flattened(x, x.dtype)
        output, saved = after.forward(attended.reshape(len(flat), -1), flat)
        ctx.save_for_backward(*saved)
        ctx.after, ctx.shapes = after, (attended.shape, x.shape)
        return output.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Gradient, Gradient, None, None]:
        flat = flattened(gradient, gradient.dtype)
        of_read, of_x = ctx.after.backward(flat, ctx.saved_tensors, ctx.needs_input_grad[0])
        attended, x = ctx.shapes
        return None if of_read is None else of_read.view(attended), of_x.view(x), None, None


# --- with attention in short rows ------------------------------------------------------------------------------------


class ShortAttention(NamedTuple):
    """Attention with all scores in memory; `mask` (rows x groups, keys, heads of a group x queries) is added to them.

    A group is the heads of queries that share one of keys and values. Scores have a key a row: PyTorch's softmax over short
    columns is many times faster than over short rows.
    """

    mask: torch.Tensor
    heads: tuple[int, int, int]  # of queries, keys and values
    scaling: float

    @classmethod
    def of(cls, mask: torch.Tensor, heads: tuple[int, int, int], scaling: float) -> "ShortAttention":
        """Return it for a mask (rows, 1, length, length)."""
        rows, _, length, _ = mask.shape
        expanded = mask.expand(rows, heads[0], length, length).reshape(rows * heads[1], -1, length)
        return cls(expanded.transpose(1, 2).contiguous(), heads, scaling)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the output (tokens, width) for all (rows, heads, length, head), and what `backward` takes."""
        groups, head = self.mask.shape[0], states.shape[-1]
        q, k, v = (part.reshape(groups, -1, head) for part in states.split_with_sizes(self.heads, 1))
        shares = torch.baddbmm(self.mask, k, q.transpose(1, 2), alpha=self.scaling).softmax(1)
        rows, _, length, _ = states.shape
        output = torch.bmm(shares.transpose(1, 2), v).view(rows, -1, length, head).transpose(1, 2)
        return output.reshape(rows * length, -1), (q, k, v, shares)

    def backward(self, gradient: torch.Tensor, saved: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the gradient of queries, keys and values (rows, heads, length, head) for that of the output (tokens, width)."""
        q, k, v, shares = saved
        rows, length, head = len(gradient) // k.shape[1], k.shape[1], k.shape[2]
        g = gradient.view(rows, length, -1, head).transpose(1, 2).reshape(q.shape)
        of_shares = torch.bmm(v, g.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_shares, shares, 1, shares.dtype).mul_(self.scaling)
        parts = torch.bmm(of_scores.transpose(1, 2), k), torch.bmm(of_scores, q), torch.bmm(shares, g)
        return torch.cat([part.view(rows, -1, length, head) for part in parts], 1)


class WithShortAttention(torch.autograd.Function):
    """A whole decoder layer: `apply(x, anchor, before, after, angles, attention)` with x (rows, length, width) returns the same."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor | None,
        before: Before,
        after: After,
        angles: Angles,
        attention: ShortAttention,
    ) -> torch.Tensor:
        states, of_before = before.forward(x, angles, compact=True)
        attended, of_attention = attention.forward(states)
        output, of_after = after.forward(attended, of_before[0])
        ctx.save_for_backward(*of_before, *of_attention, *of_after)
        ctx.layer = before, after, angles, attention
        return output.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Gradient, None, None, None, None, None]:
        before, after, angles, attention = ctx.layer
        saved = ctx.saved_tensors
        of_before, of_attention, of_after = saved[:3], saved[3:7], saved[7:]
        of_attended, of_sum = after.backward(flattened(gradient, gradient.dtype), of_after)
        assert of_attended is not None, "wanted"
        of_states = attention.backward(of_attended, of_attention)
        of_x = before.backward(of_states, angles, of_before, ctx.needs_input_grad[0], of_sum)
        return None if of_x is None else of_x.view(gradient.shape), None, None, None, None, None
