"""Evaluate an adapter, or the base, on one benchmark."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from d2lora import data
from d2lora.progress import Progress
from d2lora.records import CLUSTER, Item, Result
from d2lora.settings import Benchmark, Config
from d2lora.stages.prepare import PrepareSpec
from d2lora.stages.run import Run, in_memory
from d2lora.stages.stage import Identity, Spec, Stage, versions
from d2lora.stages.training import TrainingSpec

if TYPE_CHECKING:
    from torch.nn import Module

    from d2lora.evaluate.engine import Evaluation


@dataclass(frozen=True)
class EvaluateSpec(Spec):
    """A benchmark of ours, or a task of lm-evaluation-harness; for the base itself also the model."""

    benchmark: Identity | None = None
    lm_eval: str | None = None
    libraries: Identity | None = None
    model: Identity | None = None
    harness: Identity | None = (
        None  # settings of the harness's task that differ, and the content of a task of the user's
    )

    KIND: ClassVar[str] = "evaluate"
    VERSION: ClassVar[int] = 4

    def content(self) -> Identity:
        parts = {name: getattr(self, name) for name in ("benchmark", "lm_eval", "libraries", "model", "harness")}
        return {name: part for name, part in parts.items() if part is not None}

    def cost(self, samples: int) -> float:
        return 1_000


def stages(config: Config, parent: Stage[Spec] | None) -> Iterator[Stage[EvaluateSpec]]:
    """Yield the evaluations of an adapter; without a parent those of the base, whose specs have no seed or recipe."""
    yield from _of(config.task.benchmark, config, parent)
    for task in config.task.harness_tasks:
        more = data.harness_identity(task, config.task.lm_eval_path)
        spec = EvaluateSpec(lm_eval=task.name, libraries=versions("lm-eval"), model=_base(config, parent), harness=more)
        yield Stage(spec, parent, _label(task.name, config, parent), subject=task.name)


def validations(config: Config, parent: Stage[Spec] | None) -> Iterator[Stage[EvaluateSpec]]:
    """Yield the evaluations on validation benchmarks, where settings are chosen by them."""
    if config.is_validated:
        yield from _of(config.task.validation, config, parent)


def _of(benchmarks: dict[str, Benchmark], config: Config, parent: Stage[Spec] | None) -> Iterator[Stage[EvaluateSpec]]:
    for name, benchmark in benchmarks.items():
        scored = benchmark.content() | {"data": data.identity(benchmark.data, config.split_seed)}
        spec = EvaluateSpec(benchmark=scored, model=_base(config, parent))
        yield Stage(spec, parent, _label(name, config, parent), subject=name)


def _base(config: Config, parent: Stage[Spec] | None) -> Identity | None:
    """Return the model of the base's own evaluation; an adapter's key says its model already."""
    return None if parent else data.model_identity(config.model)


def _label(name: str, config: Config, parent: Stage[Spec] | None) -> str:
    return f"{name} of {parent.label if parent else f'base {config.model.name}'}"


def work(run: Run[EvaluateSpec]) -> Result:
    """Evaluate, and write every item."""
    from d2lora.adapters import attach
    from d2lora.evaluate import harness

    adapter = run.parent / "adapter" if run.parent else None
    parent = run.stage.parent
    quantize = isinstance(parent.spec, PrepareSpec | TrainingSpec) and parent.spec.init.quantizes if parent else False
    with attach.trained(run.base, adapter, quantize) as (tested, changes):
        metrics, items, batch = scored(run, tested, run.config.recipe.eval_batch, run.progress)
    run.write_items(_clustered(run, items))
    more: dict[str, Any] = {"adapter_changes_logits": changes} if adapter else {}
    if counts := harness.counts(items):
        more["counts"] = counts
    return Result(benchmark=run.stage.subject, metrics=dict(metrics), eval_batch=batch, **more)


def _clustered(run: Run[EvaluateSpec], items: Sequence[Item]) -> list[Item]:
    """Give items what their rows have in the benchmark's `cluster` column, if it names one; a row without a value stands alone."""
    benchmark = run.config.task.benchmark.get(run.stage.subject)
    if run.stage.spec.lm_eval or benchmark is None or benchmark.cluster is None:
        return list(items)
    rows = run.rows(benchmark.data)
    values = [rows[item["index"]].get(benchmark.cluster) for item in items]
    return [
        item | {CLUSTER: f"row {item['index']}" if value is None else str(value)}
        for item, value in zip(items, values, strict=True)
    ]


def scored(run: Run[Any], tested: "Module", batch: int, progress: Progress, limit: int | None = None) -> "Evaluation":
    """Return a benchmark's metrics, its items (the first `limit`), and the batch size that memory and the model
    allowed.
    """
    from d2lora.evaluate import harness
    from d2lora.layouts import proof

    name = run.stage.subject
    benchmark = None if run.stage.spec.lm_eval else run.config.benchmarks[name]
    asked = next((task for task in run.config.task.harness_tasks if task.name == name), None)
    rows, folder = run.rows(benchmark.data) if benchmark else (), run.config.task.lm_eval_path
    questions = harness.Questions(name, benchmark, rows, asked, folder)
    engine = harness.InMemory(run.base, tested, proof.Memory(run.outputs.proofs, data.model_identity(run.config.model)))
    attempt = lambda size: engine.evaluate(questions, size, progress, limit)  # noqa: E731
    return in_memory(attempt, lambda size: size // 2, "recipe.eval_batch", batch)
