"""Multiply by a model's large weights in the order of memory that oneDNN reads them in.

PyTorch's products on a CPU order a weight anew in each pass. With the few rows of a step of decoding, that takes as long
as the product itself.
"""

import contextlib
import functools
from collections.abc import Iterator

import psutil
import torch
from torch import nn

_LARGE = 2**18  # elements of a weight from which on it pays
_ROWS = 32  # for which the order is chosen; with 4 to 1,000 rows it is faster than PyTorch's as well


@contextlib.contextmanager
def weights(model: nn.Module) -> Iterator[None]:
    """Have the large linear layers of a float32 model on a CPU use such weights inside the `with` block.

    They are copies: nothing is changed where these would take more than half of the free memory.
    """
    large = [layer for layer in model.modules() if type(layer) is nn.Linear and layer.weight.numel() >= _LARGE]
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in large)
    if not torch.backends.mkldnn.is_available() or size > psutil.virtual_memory().available / 2:
        large = []
    for layer in large:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
        layer.forward = functools.partial(_product, packed, layer.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in large:
            layer.__dict__.pop("forward", None)


def _product(weight: torch.Tensor, bias: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product
