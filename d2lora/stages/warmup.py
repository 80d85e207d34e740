"""Phase 1: a fresh adapter is fine-tuned on m general samples. Its spec knows no n, method or task: one warm-up serves the whole grid."""

from dataclasses import dataclass
from typing import ClassVar

from d2lora.records import Result
from d2lora.settings import Config, Sft, amount
from d2lora.settings.recipe import WARMUP
from d2lora.stages import rows, training
from d2lora.stages.run import Run
from d2lora.stages.stage import Identity, Spec, Stage
from d2lora.stages.training import TrainingSpec


@dataclass(frozen=True)
class WarmupSpec(TrainingSpec):
    """A training on m conversations; `reading` is what turns rows into them."""

    reading: Identity
    m: int | str

    KIND: ClassVar[str] = "warmup"
    VERSION: ClassVar[int] = 2

    def content(self) -> Identity:
        return super().content() | self.reading | {"m": self.m}


def stage(config: Config, parent: Stage[Spec] | None) -> Stage[WarmupSpec] | None:
    """Return a cell's warm-up, if it has one."""
    if config.m == 0:
        return None
    warmup = config.warmup
    shared = training.shared(config, WARMUP, Sft(epochs=warmup.epochs), warmup.data)
    label = f"warm-up m={amount(config.m)} of {warmup.name}{rows.seed_text(config)}"
    spec = WarmupSpec(**shared, reading=rows.reading(warmup), m=config.m)
    return Stage(spec, parent, label, rows.samples(config, warmup.data, config.m, warmup.epochs))


def work(run: Run[WarmupSpec]) -> Result:
    """Train on the warm-up's rows."""
    return training.train(run, rows.general(run, run.stage.spec.m, run.stage.spec.max_length), None)
