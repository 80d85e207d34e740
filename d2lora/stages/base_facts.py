"""Find facts about a cell's base in the output folder: what an adapter reaches of it, and its size."""

from pathlib import Path
from typing import TYPE_CHECKING

from d2lora import data
from d2lora.keys import digest
from d2lora.outputs import Outputs, cached
from d2lora.records import Coverage
from d2lora.settings import Config

if TYPE_CHECKING:
    from peft import PeftModel


def coverage_file(config: Config) -> Path:
    """Return the file that caches what the cell's adapter reaches of its base (records.Coverage)."""
    identity = {"model": data.model_identity(config.model), "target_modules": config.recipe.lora.target_modules}
    return Outputs.of(config).fingerprint(f"coverage-{digest(identity)}")


def shape_file(config: Config) -> Path:
    """Return the file that caches the size of the cell's base (adapters/empty.py), for the forecast of a plan."""
    return Outputs.of(config).fingerprint(f"shape-{digest({'model': data.model_identity(config.model)})}")


def coverage(config: Config, wrapped: "PeftModel") -> Coverage:
    """Return what the cell's adapter reaches of its base, computed once for each base and choice of layers."""
    from d2lora.adapters import coverage

    return Coverage.model_validate(cached(coverage_file(config), lambda: coverage.of(wrapped).as_read()))
