"""Train an adapter: what warm-up and adaptation share."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from d2lora import data
from d2lora.keys import Identity, digest
from d2lora.records import Coverage, Result
from d2lora.settings import Config, Init, Lora, Method
from d2lora.stages import base_facts
from d2lora.stages.prepare import PrepareSpec
from d2lora.stages.run import Run
from d2lora.stages.stage import Spec, versions

if TYPE_CHECKING:
    from d2lora.train.passes import Passes

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingSpec(Spec):
    """The settings that change a training's result beyond rounding. `method` includes its epochs."""

    model: Identity
    init: Init
    seed: int
    data_seed: int
    lora: Lora
    schedule: str
    lr_warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    batch: int
    max_length: int
    layout: Identity  # with dropout, how a batch is laid out: it decides which units are dropped
    lr: float
    method: Method
    libraries: Identity
    data: Identity

    @property
    def epochs(self) -> int:
        return self.method.epochs

    def steps(self, samples: int, epochs: float) -> int:
        """Return the number of optimizer steps for so many rows; the last batch of an epoch may be smaller."""
        return math.ceil(math.ceil(samples / self.batch) * epochs)

    def content(self) -> Identity:
        plain = (
            *("model", "seed", "data_seed", "schedule", "lr_warmup_ratio", "weight_decay", "max_grad_norm", "batch"),
            *("max_length", "lr", "epochs", "libraries", "data"),
        )
        own = {name: getattr(self, name) for name in plain}
        init, lora = self.init.model_dump(exclude_none=True), self.lora.model_dump()
        return own | self.layout | {"init": init, "lora": lora}


def shared(config: Config, phase: str, method: Method, source: data.Data) -> dict[str, Any]:
    """Return the fields of TrainingSpec; `phase` names the learning rate: "warmup" or a method's name."""
    recipe = config.recipe
    names = ("lora", "schedule", "lr_warmup_ratio", "weight_decay", "max_grad_norm", "batch", "max_length")
    return {name: getattr(recipe, name) for name in names} | {
        "model": data.model_identity(config.model),
        "init": config.init,
        "seed": config.seed,
        "data_seed": config.data_seed,
        "layout": recipe.layout,
        "lr": recipe.rate(phase),
        "method": method,
        "libraries": versions("trl"),
        "data": data.identity(source, config.split_seed),
    }


def tokens(method: Method, subset: data.Subset) -> int:
    """Return how many tokens a method puts through the model in one epoch."""
    from d2lora.train import training

    return training.tokens(method, subset)


def train(run: Run[TrainingSpec], subset: data.Subset, reference: Path | None, epochs: float | None = None) -> Result:
    """Train an adapter on a subset, from the parent's adapter or a fresh one, and save it.

    `reference` is the folder that caches the log-probabilities of DPO's reference. If memory runs out in a step, what
    goes through the model at once is halved within the step; elsewhere, the training goes on from its last checkpoint.
    """
    from d2lora.adapters import attach
    from d2lora.adapters.start import Start
    from d2lora.train import training

    spec, recipe = run.stage.spec, run.config.recipe
    proofs = run.outputs.proofs
    start = Start(spec.lora, spec.init, spec.seed)
    checkpoints = run.outputs.checkpoints / run.stage.key
    if run.parent is None:
        attach.check_round_trip(run.base, start, spec.model, proofs)
    passes = _passes(run)

    def attempt() -> tuple[dict[str, Any], Coverage]:
        with attach.adapter(run.base, start, run.parent) as wrapped:
            reached = base_facts.coverage(run.config, wrapped)
            metrics = training.train(
                run.base, wrapped, subset, spec, recipe, checkpoints, run.progress, reference, proofs, epochs, passes
            )
            saved = attach.save(run.base, wrapped, run.folder, spec.init.quantizes)
        attach.check_saved(run.base, saved, run.folder, spec.init.quantizes)
        return metrics, reached

    metrics, reached = _in_memory(attempt, passes)
    return Result(metrics=metrics, data=subset.counts(), coverage=reached)


def _passes(run: Run[TrainingSpec]) -> "Passes":
    """Return the passes of a training, as large as memory sufficed for in an earlier one like it in this output folder."""
    from d2lora import base
    from d2lora.train.passes import Passes

    spec, recipe = run.stage.spec, run.config.recipe
    like: Identity = {
        "model": spec.model,
        "method": spec.method.name,
        "max_length": spec.max_length,
        "device": base.device_name(),
    }
    like |= recipe.model_dump(include={"packing", "attention", "gradient_checkpointing", "compile"})
    like |= {"r": spec.lora.r, "target_modules": spec.lora.target_modules}
    return Passes.of(recipe.micro_batch, base.device(), run.outputs.passes(digest(like)))


def _in_memory(attempt: Callable[[], T], passes: "Passes") -> T:
    """Return attempt(), with smaller passes as long as memory runs out outside of a step. UserError at the smallest."""
    import torch

    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            return attempt()
        passes.halve()  # outside of the error's block: its frames hold the memory


def reference_folder(run: Run[TrainingSpec], of_base: bool, version: int) -> Path:
    """Return the folder that caches the log-probabilities of DPO's reference: one for each policy, for all cells that
    start from it.

    `of_base`: the reference is the base, wherever the training starts.
    """
    spec, parent = run.stage.spec, run.stage.parent
    starts_as_base = parent is None or (isinstance(parent.spec, PrepareSpec) and not spec.init.quantizes)
    if parent is not None and not starts_as_base and not of_base:
        return run.outputs.references / parent.key
    started: Identity = {"model": spec.model, "version": version}
    if not of_base and not spec.init.exact_start:
        content = spec.content()
        started |= {name: content[name] for name in ("init", "lora", "seed")}
    return run.outputs.references / digest(started)
