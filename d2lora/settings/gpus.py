"""Define what a forecast is for: a GPU by its data sheet, and a price."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from d2lora.settings.values import Positive, Strict, Text


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVIDIA's data sheet has it (SXM modules): dense bfloat16 FLOP/s, bytes/s and bytes of its memory."""

    name: str  # in lower case, as a driver's name for the GPU contains it
    flops: float
    bandwidth: float
    memory: float

    @property
    def label(self) -> str:
        """Return the name as people write it."""
        return self.name.upper()


GPUS: tuple[Gpu, ...] = (
    Gpu("a100", 312e12, 2.04e12, 80e9),
    Gpu("h100", 989e12, 3.35e12, 80e9),
    Gpu("h200", 989e12, 4.8e12, 141e9),
)


def gpu_in(name: str) -> Gpu | None:
    """Return the GPU of the table that a driver's name contains ("NVIDIA H100 80GB HBM3"); None if there is none."""
    return next((gpu for gpu in GPUS if gpu.name in name.lower()), None)


def _gpu_name(name: Any) -> Any:
    """Validate the name of a GPU."""
    if name not in [gpu.name for gpu in GPUS]:
        raise ValueError(f"one of {', '.join(gpu.name for gpu in GPUS)}, or null for the one that is here")
    return name


class Planning(Strict):
    """Settings of a plan and its forecast. None of them changes a result, so they are in no key and no manifest."""

    gpu: Annotated[Text, AfterValidator(_gpu_name)] | None = None  # null: the one that is here
    price: Annotated[float, Field(gt=0)] | None = None  # of an hour of it, in dollars
    # Jobs among which the evaluations that ask an engine are divided; null: what the launcher has.
    engines: Positive | None = None
