"""Read from an adapter's files whether vLLM computes what PEFT does, and which rank and layers it needs room for."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as max_lora_rank
_WEIGHTS = "adapter_model.safetensors"
_MATRIX = re.compile(r"\.([^.]+)\.lora_[AB]\.weight$")
_HEADS = ("lm_head", "embed_tokens")
# Settings of PEFT's LoraConfig that change what an adapted layer computes, or of which matrices there are.
_OTHERS = (
    *("use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices"),
    *("layer_replication", "alora_invocation_tokens", "use_bdlora", "use_qalora"),
)


def why_not(folder: Path, quantizes: bool = False) -> str | None:
    """Return why an adapter in PEFT's format can't be evaluated by vLLM; None if it can.

    `quantizes`: it was trained on a quantized base (LoftQ), which vLLM is not given.
    """
    if quantizes:
        return "it is for a quantized base"
    try:
        return _why_not(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return f"its files can't be read: {type(error).__name__}"


def _why_not(folder: Path) -> str | None:
    config = _config(folder)
    if other := next((name for name in _OTHERS if config.get(name)), None):
        return f"vLLM does not do {other}={config[other]}"
    if config.get("bias", "none") != "none":
        return f"vLLM does not do bias={config['bias']}"
    if head := next((name for name in _HEADS if name in layers(folder)), None):
        return f"it adapts {head}"
    if unknown := [name for name in _tensors(folder) if not _MATRIX.search(name)]:
        return f"it has {unknown[0]}, which is not A or B of a layer"
    return f"its rank {rank(folder)} is above {RANKS[-1]}" if rank(folder) > RANKS[-1] else None


def rank(folder: Path) -> int:
    """Return the largest rank of an adapter's layers: EVA gives them ranks of their own."""
    config = _config(folder)
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def room(rank: int) -> int:
    """Return the smallest rank that vLLM can be opened with for adapters of up to this one."""
    return next(size for size in RANKS if size >= rank)


def layers(folder: Path) -> set[str]:
    """Return the names of the layers that an adapter is on, without their path: q_proj, down_proj ..."""
    return {match[1] for name in _tensors(folder) if (match := _MATRIX.search(name))}


def _config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return content


def _tensors(folder: Path) -> list[str]:
    with safe_open(folder / _WEIGHTS, "pt") as file:
        return list(file.keys())
