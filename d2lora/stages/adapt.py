"""Phase 2: the adapter is trained on n task samples by a method."""

from dataclasses import dataclass
from typing import ClassVar

from d2lora.records import Result
from d2lora.settings import Config, amount
from d2lora.stages import rows, training
from d2lora.stages.run import Run
from d2lora.stages.stage import Identity, Spec, Stage
from d2lora.stages.training import TrainingSpec


@dataclass(frozen=True)
class AdaptSpec(TrainingSpec):
    """A training on n samples; `task` is what turns rows into them."""

    n: int | str
    task: Identity

    KIND: ClassVar[str] = "adapt"
    VERSION: ClassVar[int] = 2

    def content(self) -> Identity:
        method = self.method.model_dump(exclude_none=True)
        return super().content() | {"n": self.n, "task": self.task, "method": method}

    def cost(self, samples: int) -> float:
        return samples * self.method.cost


def stage(config: Config, parent: Stage[Spec] | None) -> Stage[AdaptSpec] | None:
    """Return a cell's adaptation, if it has one."""
    if config.n == 0:
        return None
    task, method = config.task, config.method
    shared = training.shared(config, method.name, method, task.data)
    spec = AdaptSpec(**shared, n=config.n, task=rows.rendering(task))
    sizes = f"D2LoRA({amount(config.m)}, {amount(config.n)})"
    label = f"{method.name} {sizes} on {task.name}{rows.seed_text(config)}"
    return Stage(spec, parent, label, rows.samples(config, task.data, config.n, method.epochs))


def work(run: Run[AdaptSpec]) -> Result:
    """Train on the task's rows."""
    spec = run.stage.spec
    subset = rows.task(run, spec.n, spec.max_length, preference=spec.method.needs_pairs)
    return training.train(run, subset, training.reference_folder(run, spec.method.base_is_reference, spec.VERSION))
