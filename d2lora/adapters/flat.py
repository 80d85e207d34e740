"""Lay trained weights one behind the other in one tensor, and their gradients in another.

The parameters are views of them, so that clipping, AdamW and copies in another dtype are one operation where they would be
one for each of hundreds of matrices.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn


class Stacked(NamedTuple):
    """Weights that lie one behind the other, as one matrix (rows, columns) with its gradients, and the parts of the latter."""

    weights: torch.Tensor
    gradients: torch.Tensor
    parts: list[tuple[nn.Parameter, torch.Tensor]]

    def learn(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add the product of left (rows, tokens) and right (tokens, columns) to the gradients."""
        if left.dtype == self.gradients.dtype:
            self.gradients.addmm_(left, right, beta=1 if self._begun() else 0)
        else:
            self.add(torch.mm(left, right))

    def add(self, values: torch.Tensor, scale: float = 1.0) -> None:
        """Add s times values (rows, columns) to the gradients."""
        if self._begun():
            self.gradients.add_(values, alpha=scale)
        elif scale == 1:
            self.gradients.copy_(values)
        else:
            torch.mul(values, scale, out=self.gradients)

    def _begun(self) -> bool:
        """Make the gradients those of the weights, and tell whether there is something in them already."""
        first, own = self.parts[0]
        if first.grad is own:
            return True
        nothing = all(weight.grad is None for weight, _ in self.parts)
        for weight, gradient in self.parts:
            if not nothing:  # autograd has put gradients elsewhere
                gradient.zero_() if weight.grad is None else gradient.copy_(weight.grad)
            weight.grad = gradient
        return not nothing


class Flat:
    """Parameters of one dtype and device, in an order that the caller chooses, until `release`."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.weights = torch.cat([weight.detach().reshape(-1) for weight in self.parameters])
        self.gradients = torch.zeros_like(self.weights)
        self._gradients = self.views(self.gradients)
        for weight, view in zip(self.parameters, self.views(self.weights), strict=True):
            weight.data = view
        self._addresses = self._current_addresses()
        self._index = {id(weight): index for index, weight in enumerate(self.parameters)}

    def views(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Return each parameter's part of a tensor as long as all of them, in the parameter's shape."""
        parts = values.split([weight.numel() for weight in self.parameters])
        return [part.view(weight.shape) for part, weight in zip(parts, self.parameters, strict=True)]

    def _current_addresses(self) -> list[int]:
        return [weight.data_ptr() for weight in self.parameters]

    def intact(self) -> bool:
        """Tell whether the parameters still are views: a model that is moved gets others."""
        return self._current_addresses() == self._addresses

    def stacked(self, weights: Sequence[torch.Tensor]) -> Stacked:
        """Return matrices (rows, columns) that follow each other in the order of parameters, one below the other."""
        first = self._index[id(weights[0])]
        members = self.parameters[first : first + len(weights)]
        assert all(a is b for a, b in zip(members, weights, strict=True)), "they follow each other"
        start = sum(weight.numel() for weight in self.parameters[:first])
        size, columns = sum(weight.numel() for weight in weights), weights[0].shape[-1]
        whole, of_whole = (values[start : start + size].view(-1, columns) for values in (self.weights, self.gradients))
        return Stacked(whole, of_whole, list(zip(members, self._gradients[first:], strict=False)))

    def gather(self) -> bool:
        """Bring the gradients of all parameters into `gradients`; False if one has none."""
        elsewhere: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []
        for weight, own in zip(self.parameters, self._gradients, strict=True):
            gradient = weight.grad
            if gradient is None:
                return False
            if gradient is not own:
                elsewhere.append((weight, own, gradient))
        if elsewhere:
            torch._foreach_copy_([own for _, own, _ in elsewhere], [gradient for *_, gradient in elsewhere])
        for weight, own, _ in elsewhere:
            weight.grad = own
        return True

    def forget(self) -> None:
        """Leave the parameters without gradients."""
        for weight in self.parameters:
            weight.grad = None

    def release(self) -> None:
        """Give each parameter memory of its own again, and no gradient."""
        self.forget()
        for weight in self.parameters:
            weight.data = weight.data.clone()
