"""Compute the parts of a decoder layer in one autograd function each: norms, rotary embeddings, gated MLPs.

What a norm or an activation gives is not saved for the backward pass, but computed again.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from d2lora.adapters.products import Gradient, SharedInput, flattened
from d2lora.layouts.rotary import Angles

# --- norms -----------------------------------------------------------------------------------------------------------


class Norm(NamedTuple):
    """The weight (width) of an RMSNorm, and its epsilon."""

    weight: torch.Tensor
    eps: float

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output for x (..., width), and 1 / root mean square (..., 1) in float32, which `again` takes."""
        wide = x.to(torch.float32)
        inverse = wide.pow(2).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return self.weight * (wide * inverse).to(x.dtype), inverse

    def again(self, x: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output once more, and it before the product with the weight, in float32."""
        normed = x.to(torch.float32) * inverse
        return self.weight * normed.to(x.dtype), normed

    def backward(
        self, gradient: torch.Tensor, normed: torch.Tensor, inverse: torch.Tensor, added: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the gradient of the input in float32, plus `added`.

        `normed` is the output before the product with the weight.
        """
        g = (gradient * self.weight).to(torch.float32)
        shared = (g * normed).sum(-1, keepdim=True)
        g = torch.addcmul(g, normed, shared, value=-1 / g.shape[-1])
        return g.mul_(inverse) if added is None else torch.addcmul(added.to(torch.float32), g, inverse)


class RmsNorm(torch.autograd.Function):
    """Llama's RMSNorm with a frozen weight. It saves its input, not a float32 copy of it.

    `apply(x, weight, eps)` with x (..., width) and weight (width); returns (..., width), bit for bit Llama's.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.norm = Norm(weight, eps)
        output, inverse = ctx.norm.forward(x)
        ctx.save_for_backward(x, inverse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Gradient, None, None]:
        x, inverse = ctx.saved_tensors
        return ctx.norm.backward(gradient, x.to(torch.float32) * inverse, inverse).to(x.dtype), None, None


# --- rotary embeddings -----------------------------------------------------------------------------------------------


class Rotary(torch.autograd.Function):
    """Rotary position embedding of queries or keys: `apply(x, angles)` with x (rows, heads, length, head)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, angles: Angles) -> torch.Tensor:
        ctx.angles = angles
        return angles.rotate_(x.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Gradient, None]:
        return ctx.angles.rotate_back_(gradient.clone()), None


# --- gated MLPs ------------------------------------------------------------------------------------------------------


class Mlp(NamedTuple):
    """The layers of a gated MLP, down(silu(gate(x)) * up(x)). Of its activations, what `gate` and `up` give is saved."""

    gate_up: SharedInput
    down: SharedInput

    def forward(
        self, x: torch.Tensor, added: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the output (tokens, width) for x (tokens, width), plus `added`, and what `backward` takes."""
        both, inner = self.gate_up.forward(x)
        gate, up = both.split_with_sizes(self.gate_up.outs, 1)
        output, last_inner = self.down.forward(silu(gate).mul_(up), added)
        return output, (gate, up, inner, last_inner)

    def backward(
        self, gradient: torch.Tensor, x: torch.Tensor, saved: tuple[torch.Tensor, ...], of_input: bool = True
    ) -> Gradient:
        """Add the gradients of the adapters, and return that of x, or None if it is not wanted."""
        gate, up, inner, last_inner = saved
        active = silu(gate)
        of_product = self.down.backward(gradient, active * up, last_inner)
        assert of_product is not None, "wanted"
        of_both = gate.new_empty(gate.shape[0], 2 * gate.shape[1])
        of_gate, of_up = of_both.split_with_sizes(self.gate_up.outs, 1)
        torch.mul(active, of_product, out=of_up)
        torch.ops.aten.silu_backward.grad_input(of_product.mul_(up), gate, grad_input=of_gate)
        return self.gate_up.backward(of_both, x, inner, of_input)


class GatedMlp(torch.autograd.Function):
    """A gated MLP: `apply(x, anchor, mlp)` with x (..., width) returns (..., width)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, mlp: Mlp) -> torch.Tensor:
        flat = flattened(x, mlp.down.A.dtype)
        output, saved = mlp.forward(flat)
        ctx.save_for_backward(flat, *saved)
        ctx.mlp, ctx.x = mlp, (x.shape, x.dtype)
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Gradient, None, None]:
        x, *saved = ctx.saved_tensors
        of_x = ctx.mlp.backward(flattened(gradient, x.dtype), x, tuple(saved), ctx.needs_input_grad[0])
        shape, dtype = ctx.x
        return None if of_x is None else of_x.view(shape).to(dtype), None, None
