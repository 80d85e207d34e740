"""What tests train with: cells composed and done for real in this process, a tiny model, and what they leave."""

from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from d2lora import cli, data, pipeline
from d2lora.plan import Cell
from d2lora.store import Store


def compose_cell(*overrides: str) -> Cell:
    """The checked cell that the command line would give."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(data.ROOT / "conf"), version_base="1.3"):
        return cli.cell(compose("config", overrides=list(overrides)))


def save_tiny(folder: Path) -> Path:
    """The folder, now with a random Llama of two layers and the lab's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(data.ROOT / "d2lora/lab/base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
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
