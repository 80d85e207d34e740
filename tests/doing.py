"""Run cells in this process, with a tiny model, and read their results."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from d2lora import data, worker
from d2lora.outputs import Outputs
from d2lora.plan import Cell
from d2lora.stages import Stage
from d2lora.store import Store


def save_tiny(folder: Path, width: int = 32) -> Path:
    """Save a random Llama of two layers with the lab's tokenizer in the folder, and return the folder."""
    tokenizer = AutoTokenizer.from_pretrained(data.ROOT / "d2lora/lab/base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def do(cell: Cell, progress: Callable[[int, int], None] = lambda done, total: None) -> Store:
    """Do the cell's stages and return the store; checks of data and base only if `only` names them.

    A failure is an assertion error.
    """
    cell = cell if cell.config.job is not None else only(cell, *cell.chain.results)
    store = Store(Outputs.of(cell.config).root)
    lost = worker.do(cell.config, cell, store, lambda stage: progress)
    assert not lost, [f.read_text() for f in (Outputs.of(cell.config).root / "failed").glob("*")]
    return store


def only(cell: Cell, *stages: Stage) -> Cell:
    """Return the cell with only these stages to do."""
    return Cell(cell.config.model_copy(update={"job": [s.key for s in stages]}), cell.chain)


def alone(cell: Cell) -> Cell:
    """Return the cell with only its trainings and preparation to do: no evaluation."""
    return only(cell, *cell.chain.trainings)


def adapter(cell: Cell) -> dict[str, torch.Tensor]:
    """Return the weights that the cell has trained."""
    place = Store(Outputs.of(cell.config).root).folder(cell.chain.adapter)
    return load_file(place / "adapter" / "adapter_model.safetensors")
