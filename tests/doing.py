"""Cells done for real, in this process, and what they leave."""

from collections.abc import Callable

import torch
from safetensors.torch import load_file

from d2lora import pipeline
from d2lora.plan import Cell
from d2lora.store import Store


def do(cell: Cell, progress: Callable[[int, int], None] = lambda done, total: None) -> Store:
    """The store with the cell's stages done; what failed is shown."""
    store = Store(pipeline.output(cell.config))
    lost = pipeline.do(cell.config, cell, store, lambda stage: progress)
    assert not lost, [f.read_text() for f in (pipeline.output(cell.config) / "failed").glob("*")]
    return store


def alone(cell: Cell) -> Cell:
    """The cell's adaptation alone: no evaluation, nor what it starts from."""
    return Cell(cell.config.model_copy(update={"job": [cell.chain.adapt.key]}), cell.chain)


def adapter(cell: Cell) -> dict[str, torch.Tensor]:
    """The weights that the cell has trained."""
    place = Store(pipeline.output(cell.config)).place(cell.chain.adapter)
    return load_file(place / "adapter" / "adapter_model.safetensors")
