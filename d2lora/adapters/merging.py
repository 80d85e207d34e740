"""The sum of two adapters as an adapter: A of both one above the other, B of both side by side."""

import json
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

_WEIGHTS = "adapter_model.safetensors"


def add(first: Path, second: Path, weight: float, folder: Path) -> int:
    """Write the adapter in `first` plus `weight` times that in `second`; return its largest rank.

    All three are folders in PEFT's format. ValueError where the two are on different layers.
    """
    (one, one_config), (two, two_config) = _read(first), _read(second)
    if one.keys() != two.keys():
        raise ValueError(f"adapters on different layers: {len(one)} and {len(two)} of them")
    matrices: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name in one:
        (A, B), (other_A, other_B) = one[name], two[name]
        up = torch.cat([B * scale_of(one_config, name), weight * other_B * scale_of(two_config, name)], 1)
        matrices |= {f"{name}.lora_A.weight": torch.cat([A, other_A]).contiguous(), f"{name}.lora_B.weight": up}
        ranks[name] = up.shape[1]
    folder.mkdir(parents=True)
    save_file(matrices, folder / _WEIGHTS, {"format": "pt"})
    _config(first, ranks, folder)
    return max(ranks.values())


def _read(folder: Path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], LoraConfig]:
    """Return A (r, in) and B (out, r) of each layer in float32, and PEFT's config."""
    tensors = load_file(folder / _WEIGHTS)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    if len(tensors) != 2 * len(names):
        raise ValueError(f"{folder}: an adapter with more than A and B has no sum that is one")
    pairs = {name: tuple(tensors[f"{name}.lora_{part}.weight"].float() for part in "AB") for name in names}
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig), "ours"
    return {name: (A, B) for name, (A, B) in pairs.items()}, config


def scale_of(config: LoraConfig, name: str) -> float:
    """Return a layer's scale, alpha / r: EVA gives layers ranks and alphas of their own, rsLoRA takes the root of r."""
    layer = name.removeprefix("base_model.model.")
    rank = (config.rank_pattern or {}).get(layer, config.r)
    scale = (config.alpha_pattern or {}).get(layer, config.lora_alpha) / (rank**0.5 if config.use_rslora else rank)
    return float(scale)


def _config(first: Path, ranks: dict[str, int], folder: Path) -> None:
    """Write PEFT's config of the sum: scales are in B already, so alpha is the rank in each layer."""
    content = json.loads((first / "adapter_config.json").read_text())
    largest = max(ranks.values())
    others = {n.removeprefix("base_model.model."): rank for n, rank in ranks.items() if rank != largest}
    content |= {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=2, sort_keys=True))
