"""Write adapters to disk: record/adapter for everyone, and record/state if training needs other matrices to go on."""

import copy
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file

from d2lora.adapters.coverage import layers
from d2lora.adapters.layers import ADAPTER, MultiLora, Residual, config_of, magnitudes, plain_matrices


def save(wrapped: PeftModel, record: Path) -> None:
    """Save the adapter as record/adapter, in PEFT's format for the original base.

    If the trained one has other matrices (of rank r), it is also saved as record/state.
    """
    config = config_of(wrapped)
    if isinstance(config.target_modules, set):  # a set's order, and with it the file, would be another in each process
        config.target_modules = sorted(config.target_modules)
    variants = {name: layer.lora_variant.get(ADAPTER) for name, layer in layers(wrapped).items()}
    folded = any(isinstance(variant, Residual | MultiLora) for variant in variants.values())
    _save_peft(wrapped, record / ("state" if folded else "adapter"))
    start = {f"{n}.{part}": getattr(v, part) for n, v in variants.items() if isinstance(v, Residual) for part in "AB"}
    if start:
        save_file({name: tensor.contiguous() for name, tensor in start.items()}, record / "state" / "start.safetensors")
    if folded:
        _save_folded(wrapped, record / "adapter")


Weights = dict[str, tuple[torch.Tensor, ...]]  # by the layer's name


def plain_weights(wrapped: PeftModel) -> Weights:
    """Return A (r, in) and B (out, r) of each layer's plain adapter, and DoRA's m (out), copied."""
    return {name: _copied((*plain_matrices(layer), *magnitudes(layer))) for name, layer in layers(wrapped).items()}


def _copied(weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(weight.detach().float().cpu().clone() for weight in weights)


def _save_peft(wrapped: PeftModel, folder: Path) -> None:
    wrapped.save_pretrained(str(folder), selected_adapters=[ADAPTER], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def _save_folded(wrapped: PeftModel, folder: Path) -> None:
    """Save a plain adapter with the same output, in PEFT's format."""
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    rank = 0
    for name, layer in layers(wrapped).items():
        down, up = plain_matrices(layer)
        tensors |= {f"{name}.lora_A.weight": down.contiguous(), f"{name}.lora_B.weight": up.contiguous()}
        rank = len(down)
    save_file({k: t.detach().cpu() for k, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    config = copy.deepcopy(config_of(wrapped))
    config.lora_alpha, config.r = config.lora_alpha * rank // config.r, rank  # alpha / r stays
    config.inference_mode = True
    config.save_pretrained(str(folder))
