"""Pass rows through the base for preparations, and remove what PEFT's preparations leave on it."""

import contextlib
from collections.abc import Iterator
from typing import Any, TypedDict

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from d2lora.adapters.coverage import layers
from d2lora.settings.recipe import Lora

# Attributes that PEFT's preparations of CorDA and LoRA-GA put on the base's layers.
_LEFT_BY_PEFT = (
    *("eigens", "sample_count", "covariance_matrix", "corda_method", "rank"),
    *("_peft_loraga_grad", "_peft_loraga_grad_count"),
)


class Sequence(TypedDict):
    """A tokenized row, as SFT trains on it: token ids, and the same as labels where they are learned, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def one_row(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """Return ids (1, tokens) on the model's device."""
    return torch.tensor([ids], device=next(model.parameters()).device)


def of_base_layers(wrapped: PeftModel, lora: Lora, **settings: Any) -> LoraConfig:
    """Return a config whose targets are the base layers by name: PEFT's preparations do not know what "all-linear" is."""
    names = [f"{name}.base_layer" for name in layers(wrapped)]
    return LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=names, **settings)


@contextlib.contextmanager
def cleaned_up(wrapped: PeftModel) -> Iterator[None]:
    """Remove what PEFT's preparations leave on the base's layers when the `with` block ends, also after an error.

    The base stays in memory for later stages of the process, in which a hook that is left would raise.
    """
    modules = [layer.get_base_layer() for layer in layers(wrapped).values()]
    tables = [table for module in modules for table in (module._forward_hooks, module._backward_hooks)]
    before = [set(table) for table in tables]
    try:
        yield
    finally:
        for table, handles in zip(tables, before, strict=True):
            for left in table.keys() - handles:
                del table[left]
        for module in modules:
            module.weight.grad = None
            for name in _LEFT_BY_PEFT:
                module.__dict__.pop(name, None)
