"""Phase 2: train the adapter on n task samples by a method."""

from dataclasses import dataclass
from typing import ClassVar

from d2lora import data
from d2lora.keys import Identity
from d2lora.records import Result
from d2lora.settings import Config, Sft, amount
from d2lora.settings.controls import MixedControl
from d2lora.stages import rows, training
from d2lora.stages.run import Run
from d2lora.stages.stage import Spec, Stage
from d2lora.stages.training import TrainingSpec


@dataclass(frozen=True)
class AdaptSpec(TrainingSpec):
    """A training on n samples; `task` has the settings by which rows become samples."""

    n: int | str
    task: Identity
    # Of an arm without a warm-up of its own: its name, and the general rows that it accounts for.
    control: Identity | None = None

    KIND: ClassVar[str] = "adapt"
    VERSION: ClassVar[int] = 2

    def content(self) -> Identity:
        method = self.method.model_dump(exclude_none=True)
        control = {"control": self.control} if self.control else {}
        return super().content() | {"n": self.n, "task": self.task, "method": method} | control

    def cost(self, samples: int) -> float:
        return samples * self.method.cost


def stage(config: Config, parent: Stage[Spec] | None, warmed: bool) -> Stage[AdaptSpec] | None:
    """Return a cell's adaptation, if it has one; `warmed` tells whether it goes on from a warm-up."""
    if config.n == 0:
        return None
    task, method, control = config.task, config.method, config.effective_control
    shared = training.shared(config, method.name, method, task.data)
    spec = AdaptSpec(**shared, n=config.n, task=rows.rendering(task), control=None if warmed else _control(config))
    m = config.m if warmed or spec.control else 0
    sizes = control.label.format(m=amount(m), n=amount(config.n)) if m else f"D2LoRA(0, {amount(config.n)})"
    label = f"{method.name} {sizes} on {task.name}{rows.seed_text(config)}"
    samples = rows.samples(config, task.data, config.n, method.epochs)
    general = rows.samples(config, config.warmup.data, config.m, config.warmup.epochs) if spec.control else 0
    return Stage(spec, parent, label, None if samples is None or general is None else samples + general)


def _control(config: Config) -> Identity | None:
    """Return what the key says of a control arm without a warm-up: the rows and epochs of the warm-up that it does not have."""
    control, warmup = config.effective_control, config.warmup
    if control.warms_up:
        return None
    source = data.identity(warmup.data, config.split_seed)
    sizes = {"m": config.m, "epochs": warmup.epochs}
    return control.model_dump() | sizes | {"data": source} | rows.reading(warmup)


def work(run: Run[AdaptSpec]) -> Result:
    """Train on the task's rows, as much as the cell's arm says."""
    spec, control = run.stage.spec, run.config.effective_control
    subset = rows.task(run, spec.n, spec.max_length, preference=spec.method.needs_pairs)
    reference = training.reference_folder(run, spec.method.base_is_reference, spec.VERSION)
    if spec.control is None:
        return training.train(run, subset, reference)
    general = rows.general(run, run.config.m, spec.max_length)
    repeats = run.config.warmup.epochs
    if isinstance(control, MixedControl):
        mixed = data.mixed((general, repeats), (subset, spec.epochs), f"mixed/{spec.data_seed}")
        result = training.train(run, mixed, reference, epochs=1)
    else:  # longer: as many epochs more as have the warm-up's tokens
        general_tokens = training.tokens(Sft(epochs=repeats), general) * repeats
        epochs = spec.epochs + general_tokens / training.tokens(spec.method, subset)
        result = training.train(run, subset, reference, epochs=epochs)
    counts = subset.counts().model_copy(update={"general": general.counts()})
    return result.model_copy(update={"data": counts})
