"""Evaluate an adapter, or the base, on one benchmark."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from d2lora import data
from d2lora.evaluate.vllm import installed
from d2lora.progress import Progress
from d2lora.records import CLUSTER, Item, Result
from d2lora.settings import Benchmark, Config
from d2lora.stages.prepare import PrepareSpec
from d2lora.stages.run import Run, in_memory
from d2lora.stages.stage import Identity, Spec, Stage, versions
from d2lora.stages.training import TrainingSpec

if TYPE_CHECKING:
    from torch.nn import Module

    from d2lora.evaluate.engine import Evaluation, Questions, Score


@dataclass(frozen=True)
class EvaluateSpec(Spec):
    """A benchmark of ours, or a task of lm-evaluation-harness; for the base itself also the model."""

    benchmark: Identity | None = None
    lm_eval: str | None = None
    libraries: Identity | None = None
    model: Identity | None = None

    KIND: ClassVar[str] = "evaluate"
    VERSION: ClassVar[int] = 4

    def content(self) -> Identity:
        parts = {name: getattr(self, name) for name in ("benchmark", "lm_eval", "libraries", "model")}
        return {name: part for name, part in parts.items() if part is not None}

    def cost(self, samples: int) -> float:
        return 1_000


def stages(config: Config, parent: Stage[Spec] | None) -> Iterator[Stage[EvaluateSpec]]:
    """Yield the evaluations of an adapter; without a parent those of the base, whose specs have no seed or recipe."""
    yield from _of(config.task.benchmark, config, parent)
    for name in config.task.lm_eval:
        spec = EvaluateSpec(lm_eval=name, libraries=versions("lm-eval"), model=_base(config, parent))
        yield Stage(spec, parent, _label(name, config, parent), subject=name)


def validations(config: Config, parent: Stage[Spec] | None) -> Iterator[Stage[EvaluateSpec]]:
    """Yield the evaluations on validation benchmarks, where settings are tuned."""
    if config.tune:
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
    from d2lora.evaluate import harness

    metrics, items, batch, changes = _in_engine(run) or _in_memory(run)
    run.write_items(_clustered(run, items))
    more: dict[str, Any] = {"adapter_changes_logits": changes} if run.parent else {}
    if counts := harness.counts(items):
        more["counts"] = counts
    return Result(benchmark=run.stage.subject, metrics=dict(metrics), eval_batch=batch, **more)


class _Outcome(NamedTuple):
    """An Evaluation, and whether the adapter changes the base's logits."""

    metrics: "dict[str, Score]"
    items: "list[Item]"
    batch: int
    changes: bool


def _in_engine(run: Run[EvaluateSpec]) -> _Outcome | None:
    """Evaluate with the recipe's engine; None if it is, or has to be, done in memory."""
    if run.config.recipe.engine != installed.NAME:
        return None
    from d2lora.evaluate.vllm import engine, sessions

    key = run.stage.parent.key if run.stage.parent else None
    adapters = [sessions.Adapter(key, run.parent / "adapter", _quantizes(run))] if key and run.parent else []
    session = sessions.opened(run.base, run.config.model, adapters, run.config.recipe, run.outputs)
    try:
        if session.why_not(key):
            return None
        answers = engine.InVllm(run.base, session, key)
        return _Outcome(*answers.evaluate(_questions(run), 0, run.progress), session.changes[key])
    except (sessions.Gone, sessions.Unable) as why:
        print(f"{run.stage.label}: evaluated in memory: {why}", file=sys.stderr)
        return None


def _in_memory(run: Run[EvaluateSpec]) -> _Outcome:
    """Evaluate the base, or the base with the adapter, in this process."""
    from d2lora.adapters import attach

    if run.config.recipe.engine == installed.NAME:
        from d2lora.evaluate.vllm import sessions

        sessions.make_room()
    adapter = run.parent / "adapter" if run.parent else None
    with attach.trained(run.base, adapter, _quantizes(run)) as (tested, changes):
        return _Outcome(*scored(run, tested, run.config.recipe.eval_batch, run.progress), changes)


def _quantizes(run: Run[EvaluateSpec]) -> bool:
    """Tell whether the adapter is for a quantized base."""
    parent = run.stage.parent
    return isinstance(parent.spec, PrepareSpec | TrainingSpec) and parent.spec.init.quantizes if parent else False


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

    engine = harness.InMemory(run.base, tested, proof.Memory(run.outputs.proofs, data.model_identity(run.config.model)))
    questions = _questions(run)
    attempt = lambda size: engine.evaluate(questions, size, progress, limit)  # noqa: E731
    return in_memory(attempt, lambda size: size // 2, "recipe.eval_batch", batch)


def _questions(run: Run[Any]) -> "Questions":
    """Return the benchmark of an evaluation, with its rows."""
    from d2lora.evaluate.engine import Questions

    name = run.stage.subject
    benchmark = None if run.stage.spec.lm_eval else run.config.benchmarks[name]
    return Questions(name, benchmark, run.rows(benchmark.data) if benchmark else ())
