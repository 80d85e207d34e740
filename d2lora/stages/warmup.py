"""Phase 1: fine-tune a fresh adapter on m general samples. Its spec has no n, method or task, so one warm-up serves the
whole grid.
"""

from dataclasses import dataclass
from typing import ClassVar

from d2lora.keys import Identity
from d2lora.records import Result
from d2lora.settings import Config, Sft, amount
from d2lora.settings.controls import PlaceboControl
from d2lora.settings.recipe import WARMUP
from d2lora.stages import rows, training
from d2lora.stages.run import Run
from d2lora.stages.stage import Spec, Stage
from d2lora.stages.training import TrainingSpec


@dataclass(frozen=True)
class WarmupSpec(TrainingSpec):
    """A training on m conversations; `reading` has the settings by which rows become conversations."""

    reading: Identity
    m: int | str
    placebo: bool = False  # answers exchanged among the rows

    KIND: ClassVar[str] = "warmup"
    VERSION: ClassVar[int] = 2

    def content(self) -> Identity:
        placebo = {"placebo": True} if self.placebo else {}
        return super().content() | self.reading | {"m": self.m} | placebo


def stage(config: Config, parent: Stage[Spec] | None) -> Stage[WarmupSpec] | None:
    """Return a cell's warm-up, if it has one."""
    control = config.effective_control
    if config.m == 0 or not control.warms_up:
        return None
    warmup = config.warmup
    shared = training.shared(config, WARMUP, Sft(epochs=warmup.epochs), warmup.data)
    placebo = isinstance(control, PlaceboControl)
    label = f"{'placebo ' * placebo}warm-up m={amount(config.m)} of {warmup.name}{rows.seed_text(config)}"
    spec = WarmupSpec(**shared, reading=rows.reading(warmup), m=config.m, placebo=placebo)
    return Stage(spec, parent, label, rows.samples(config, warmup.data, config.m, warmup.epochs))


def work(run: Run[WarmupSpec]) -> Result:
    """Train on the warm-up's rows."""
    spec = run.stage.spec
    subset = rows.general(run, spec.m, spec.max_length)
    return training.train(run, rows.exchanged(run, subset, spec.max_length) if spec.placebo else subset, None)
