"""Multiply by a model's large weights in the order of memory that oneDNN reads them in.

PyTorch's products on a CPU order a weight anew in each pass. With the few rows of a step of decoding, that takes as long
as the product itself.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import psutil
import torch
from torch import nn
from torch.nn.functional import linear

_LARGE = 2**18  # elements of a weight from which on it pays
_ROWS = 32  # for which the order is chosen; with 4 to 1,000 rows it is faster than PyTorch's as well


@contextlib.contextmanager
def weights(model: nn.Module) -> Iterator[None]:
    """Have the large linear layers of a float32 model on a CPU use such weights inside the `with` block.

    They are copies: nothing is changed where these would take more than half of the free memory.
    """
    large = [layer for layer in _linear(model) if layer.weight.numel() >= _LARGE]
    if not torch.backends.mkldnn.is_available() or not _fit(large):
        large = []
    for layer in large:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
        layer.forward = functools.partial(_product, packed, layer.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in large:
            layer.__dict__.pop("forward", None)


def fits(model: nn.Module) -> bool:
    """Tell whether copies of all linear layers' weights take at most half of the free memory."""
    return _fit(_linear(model))


def _linear(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if type(layer) is nn.Linear]


def _fit(layers: Sequence[nn.Linear]) -> bool:
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    return size <= psutil.virtual_memory().available / 2


def _product(weight: torch.Tensor, bias: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


def _side_by_side(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([one.detach() for one in parameters]) if len(parameters) > 1 else parameters[0].detach()


def product(layers: Sequence[nn.Linear]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that computes the outputs of layers that read the same input, side by side."""
    weights, biases = ([getattr(layer, name) for layer in layers] for name in ("weight", "bias"))
    weight, bias = (_side_by_side(weights), None if biases[0] is None else _side_by_side(biases))
    if weight.numel() < _LARGE or not torch.backends.mkldnn.is_available():
        return lambda x: linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return functools.partial(_product, packed, bias)
