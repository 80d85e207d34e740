"""A copy of an adapter that has one scale, alpha / rank, in every layer: programs that read no other give its answers too.

EVA's layers have alphas of their own (`alpha_pattern`), rsLoRA's scale is alpha / sqrt(rank). llama.cpp's converter reads neither, and
says nothing.
"""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from d2lora.adapters.merging import scale_of
from d2lora.errors import UserError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write(folder: Path, copy: Path) -> int:
    """Copy an adapter in PEFT's format, with what differs from alpha / rank multiplied into B; return how many layers that are.

    UserError where `folder` has no such adapter, where `copy` exists, and for adapters with more than A and B (DoRA, experts).
    """
    if not (folder / _CONFIG).is_file():
        raise UserError(f"{folder}: no adapter here: a record's is <output>/store/adapt/<key>/adapter")
    if copy.exists():
        raise UserError(f"{copy}: exists already: name a folder that does not")
    config, tensors = LoraConfig.from_pretrained(str(folder)), load_file(folder / _WEIGHTS)
    assert isinstance(config, LoraConfig), "ours"
    changed = _rescale(tensors, config, folder)
    part = copy.with_name(f"{copy.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part)
    if changed:
        save_file(tensors, part / _WEIGHTS, {"format": "pt"})
        content = json.loads((folder / _CONFIG).read_text()) | {"alpha_pattern": {}, "use_rslora": False}
        (part / _CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True))
    part.rename(copy)  # whole or not at all: scaled weights beside the old configuration would be scaled twice
    return changed


def _rescale(tensors: dict[str, torch.Tensor], config: LoraConfig, folder: Path) -> int:
    """Multiply each B by its layer's scale over alpha / rank, in place; return how many are changed."""
    if not config.alpha_pattern and not config.use_rslora:
        return 0
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    if len(tensors) != 2 * len(names) or config.target_parameters:
        raise UserError(f"{folder}: an adapter with more than A and B, as of DoRA or of experts, has no such copy")
    changed = 0
    for name in names:
        rank = len(tensors[f"{name}.lora_A.weight"])
        factor = scale_of(config, name) * rank / config.lora_alpha
        if factor != 1:
            tensors[f"{name}.lora_B.weight"] *= factor
            changed += 1
    return changed
