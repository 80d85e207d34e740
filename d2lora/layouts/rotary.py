"""Rotate queries and keys as Llama does, and their gradients back."""

from typing import NamedTuple

import torch


class Angles(NamedTuple):
    """Cosines and sines of rotary embeddings (rows or 1, 1, length, head), sines negated in their first half."""

    cos: torch.Tensor
    sin: torch.Tensor
    turned_sin: torch.Tensor  # with its halves exchanged

    @classmethod
    def of(cls, cos: torch.Tensor, sin: torch.Tensor) -> "Angles":
        """Return them of transformers' cos and sin (rows or 1, length, head)."""
        first, second = sin.unsqueeze(1).chunk(2, -1)
        return cls(cos.unsqueeze(1), torch.cat([-first, second], -1), torch.cat([second, -first], -1))

    def rotate_(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate queries or keys (rows, heads, length, head) in place."""
        turned = (x * self.turned_sin).roll(x.shape[-1] // 2, -1)
        return x.mul_(self.cos).add_(turned)

    def rotate_back_(self, gradient: torch.Tensor) -> torch.Tensor:
        """Make the gradient of what `rotate_` has returned that of what it was given, in place."""
        turned = (gradient * self.sin).roll(gradient.shape[-1] // 2, -1)
        return gradient.mul_(self.cos).add_(turned)
