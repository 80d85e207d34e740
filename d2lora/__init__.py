"""d2lora: grids of two-phase LoRA training (D2LoRA), from one command to a table."""

import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2lora.report.frames import curves, items, results, table

__all__ = ["curves", "items", "results", "table"]

__version__ = "0.1.0"

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # TRL keeps ORPO there; its notice would stand among our lines
# On a CPU bitsandbytes asks each process for kernels that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Import the functions that give frames when they are first used: pandas takes longer than a plan."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from d2lora.report import frames

    return getattr(frames, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
