"""The control arm `merged`: the warm-up's adapter added to an adapter that was trained on the task from scratch."""

from dataclasses import dataclass
from typing import ClassVar

from d2lora.keys import Identity
from d2lora.records import Result
from d2lora.settings import Config, amount
from d2lora.settings.controls import MergedControl
from d2lora.stages import rows
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.run import Run
from d2lora.stages.stage import Spec, Stage
from d2lora.stages.warmup import WarmupSpec


@dataclass(frozen=True)
class MergeSpec(Spec):
    """What is added to the parent's adapter: that of the warm-up with the key `warmup`, times `weight`."""

    warmup: str
    weight: float

    KIND: ClassVar[str] = "merge"
    VERSION: ClassVar[int] = 1

    def content(self) -> Identity:
        return {"warmup": self.warmup, "weight": self.weight}


def stage(
    config: Config, control: MergedControl, adapted: Stage[AdaptSpec], warmup: Stage[WarmupSpec]
) -> Stage[MergeSpec]:
    """Return the stage that adds the warm-up's adapter to that of D2LoRA(0, n)."""
    sizes = MergedControl.label.format(m=amount(config.m), n=amount(config.n))
    label = f"{config.method.name} {sizes} on {config.task.name}{rows.seed_text(config)}"
    return Stage(MergeSpec(warmup.key, control.weight), adapted, label, 0, others=(warmup,))


def work(run: Run[MergeSpec]) -> Result:
    """Write the sum of the two adapters, whose rank is the sum of their ranks, so that it is exact."""
    from d2lora.adapters import merging

    assert run.parent is not None, "the adaptation"
    (warmup,) = run.others
    rank = merging.add(run.parent / "adapter", warmup / "adapter", run.stage.spec.weight, run.folder / "adapter")
    return Result(metrics={"rank": rank})
