"""Evaluate an adapter, or the base, on one benchmark."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from d2lora import data
from d2lora.evaluate import vllm
from d2lora.evaluate.vllm import installed
from d2lora.progress import Progress
from d2lora.records import CLUSTER, Engine, Item, Result, RowCounts
from d2lora.settings import Benchmark, Config
from d2lora.stages import rows
from d2lora.stages.prepare import PrepareSpec
from d2lora.stages.run import AfterOthers, Run, in_memory
from d2lora.stages.stage import Identity, Spec, Stage, versions
from d2lora.stages.training import TrainingSpec

if TYPE_CHECKING:
    from torch.nn import Module

    from d2lora.evaluate.engine import Evaluation, Questions, Score
    from d2lora.evaluate.vllm.sessions import Adapter

MEMORY = "memory"  # recipe.engine's default: the model in memory


@dataclass(frozen=True)
class EvaluateSpec(Spec):
    """A benchmark of ours, or a task of lm-evaluation-harness; for the base itself also the model.

    `engine` is the one that is asked (EngineIdentity); None for the model in memory, as before there were others.
    """

    benchmark: Identity | None = None
    lm_eval: str | None = None
    libraries: Identity | None = None
    model: Identity | None = None
    engine: Identity | None = None
    harness: Identity | None = None  # what differs from the harness's task, and the content of a task of the user's

    KIND: ClassVar[str] = "evaluate"
    VERSION: ClassVar[int] = 4

    def content(self) -> Identity:
        parts = {
            name: getattr(self, name) for name in ("benchmark", "lm_eval", "libraries", "model", "engine", "harness")
        }
        return {name: part for name, part in parts.items() if part is not None}

    def cost(self, samples: int) -> float:
        return 1_000


def stages(config: Config, parent: Stage[Spec] | None) -> Iterator[Stage[EvaluateSpec]]:
    """Yield the evaluations of an adapter; without a parent those of the base, whose specs have no seed or recipe."""
    yield from _of(config.task.benchmark, config, parent)
    for task in config.task.harness_tasks:
        libraries, model = versions("lm-eval"), _base(config, parent)
        more = data.harness_identity(task, config.task.lm_eval_path)
        spec = EvaluateSpec(
            lm_eval=task.name, libraries=libraries, model=model, engine=_engine(config, parent), harness=more
        )
        yield Stage(spec, parent, _label(task.name, config, parent), subject=task.name)


def validations(config: Config, parent: Stage[Spec] | None) -> Iterator[Stage[EvaluateSpec]]:
    """Yield the evaluations on validation benchmarks, where settings are chosen by them."""
    if config.is_validated:
        yield from _of(config.task.validation, config, parent)


def _of(benchmarks: dict[str, Benchmark], config: Config, parent: Stage[Spec] | None) -> Iterator[Stage[EvaluateSpec]]:
    for name, benchmark in benchmarks.items():
        scored = benchmark.content() | {"data": data.identity(benchmark.data, config.split_seed)}
        spec = EvaluateSpec(benchmark=scored, model=_base(config, parent), engine=_engine(config, parent))
        yield Stage(spec, parent, _label(name, config, parent), subject=name)


def _base(config: Config, parent: Stage[Spec] | None) -> Identity | None:
    """Return the model of the base's own evaluation; an adapter's key says its model already."""
    return None if parent else data.model_identity(config.model)


def _engine(config: Config, parent: Stage[Spec] | None) -> Identity | None:
    """Return the engine that the evaluations of an adapter, or of the base, ask; None where it is the model in memory.

    Adapters that are known beforehand to be none of an engine's (of LoftQ, DoRA) have the same evaluations with any
    `recipe.engine`: those in memory. Where an engine fails later, the key stays, and the record says who answered instead.
    """
    engine = installed.identity(config) if parent is None or engine_does(config) else None
    return {**engine} if engine else None


def engine_does(config: Config) -> bool:
    """Tell whether the engine that a cell names does adapters of its initialization; the model in memory does all."""
    return config.recipe.engine == MEMORY or config.init.any_engine


def asks_engine(stage: Stage[Spec]) -> bool:
    """Tell whether a stage is an evaluation that asks an engine, which does several adapters' better together."""
    return isinstance(stage.spec, EvaluateSpec) and stage.spec.engine is not None


def engine_text(stage: Stage[Spec]) -> str:
    """Return the engine that a stage asks, for people: vllm 0.32.0."""
    assert isinstance(stage.spec, EvaluateSpec), "asks an engine"
    engine = stage.spec.engine or {}
    return f"{engine['name']} {engine['version']}"


def _label(name: str, config: Config, parent: Stage[Spec] | None) -> str:
    return f"{name} of {parent.label if parent else f'base {config.model.name}'}"


def work(run: Run[EvaluateSpec]) -> Result:
    """Evaluate, and write every item.

    An evaluation that asks an engine which fails is published under the same key, answered in memory, and says so: the answers are
    checked to be the same, and the sweep's keys were planned before anyone could know.
    """
    from d2lora.evaluate import harness

    outcome = _in_engine(run) if run.stage.spec.engine else None
    if outcome is None or isinstance(outcome, str):
        outcome = _in_memory(run, instead=outcome)
    run.write_items(_clustered(run, outcome.items))
    more: dict[str, Any] = {"adapter_changes_logits": outcome.changes} if run.parent else {}
    if counts := harness.counts(outcome.items):
        more["counts"] = counts
    benchmark = run.config.benchmarks.get(run.stage.subject)
    if benchmark and not run.stage.spec.lm_eval and (left_out := rows.items(run, benchmark).left_out):
        more["data"] = RowCounts(left_out=left_out)
    if outcome.engine:
        more["engine"] = outcome.engine
    return Result(benchmark=run.stage.subject, metrics=dict(outcome.metrics), eval_batch=outcome.batch, **more)


class _Outcome(NamedTuple):
    """An Evaluation, whether the adapter changes the base's logits, and who answered where an engine was asked."""

    metrics: "dict[str, Score]"
    items: "list[Item]"
    batch: int
    changes: bool
    engine: Engine | None = None


def _in_engine(run: Run[EvaluateSpec]) -> _Outcome | str:
    """Evaluate with the engine that the stage asks; return why not if it has to be done in memory.

    AfterOthers while the engine still runs for stages beside it: it would be ended for this one, and started again for them.
    """
    from d2lora.evaluate.vllm import engine, sessions

    key, *together = (s.parent.key if s.parent else None for s in (run.stage, *_same_items(run)))
    session = sessions.opened(run.base, run.config.model, _adapters(run), run.config.recipe, run.outputs)
    why = said = session.why_not(key)
    if not why:
        try:
            answers = engine.InVllm(run.base, session, key, together)
            evaluation = _numbered_as_rows(run, answers.evaluate(_questions(run), 0, run.progress))
            return _Outcome(*evaluation, session.changes[key], Engine(**session.identity))
        except (sessions.Gone, sessions.Unable) as error:
            why, said = str(error), session.why_not(key)
    if run.beside and session.pid:
        raise AfterOthers
    if not said:  # as of an adapter that the session refuses
        print(f"{run.stage.label}: evaluated in memory: {why}", file=sys.stderr)
    return why


def _same_items(run: Run[EvaluateSpec]) -> list[Stage[Spec]]:
    """Return the evaluations of other adapters beside a stage on the same items: one call answers them all."""

    def items(spec: EvaluateSpec) -> tuple[object, ...]:
        return spec.benchmark, spec.lm_eval, spec.harness

    own = items(run.stage.spec)
    return [s for s in run.beside if isinstance(s.spec, EvaluateSpec) and items(s.spec) == own]


def _adapters(run: Run[EvaluateSpec]) -> "list[Adapter]":
    """Return the adapters of a stage and of those beside it, each once."""
    from d2lora.evaluate.vllm.sessions import Adapter

    folders = {s.parent.key: (s, folder) for s in (run.stage, *run.beside) if s.parent and (folder := run.parent_of(s))}
    return [Adapter(key, folder / "adapter", _quantizes(stage)) for key, (stage, folder) in folders.items()]


def _in_memory(run: Run[EvaluateSpec], instead: str | None) -> _Outcome:
    """Evaluate the base, or the base with the adapter, in this process; `instead` is why the engine that was asked did not."""
    vllm.make_room()
    base = run.base  # before what imports torch: loading a process's libraries is not its first stage's time
    from d2lora.adapters import attach

    adapter = run.parent / "adapter" if run.parent else None
    engine = Engine(name=MEMORY, instead_of=engine_text(run.stage), reason=instead) if instead else None
    with attach.trained(base, adapter, _quantizes(run.stage)) as (tested, changes):
        return _Outcome(*scored(run, tested, run.config.recipe.eval_batch, run.progress), changes, engine)


def _quantizes(stage: Stage[Spec]) -> bool:
    """Tell whether the adapter that a stage evaluates is for a quantized base."""
    parent = stage.parent
    return isinstance(parent.spec, PrepareSpec | TrainingSpec) and parent.spec.init.quantizes if parent else False


def _clustered(run: Run[EvaluateSpec], items: Sequence[Item]) -> list[Item]:
    """Give items what their rows have in the benchmark's `cluster` column, if it names one; a row without a value stands alone."""
    benchmark = run.config.benchmarks.get(run.stage.subject)
    if run.stage.spec.lm_eval or benchmark is None or benchmark.cluster is None:
        return list(items)
    every = run.rows(benchmark.data)
    values = [every[item["index"]].get(benchmark.cluster) for item in items]
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
    evaluation = in_memory(attempt, lambda size: size // 2, "recipe.eval_batch", batch)
    return _numbered_as_rows(run, evaluation)


def _numbered_as_rows(run: Run[Any], evaluation: "Evaluation") -> "Evaluation":
    """Return an evaluation whose items have the indices of their rows in the data set, of which some may be left out."""
    benchmark = run.config.benchmarks.get(run.stage.subject)
    if run.stage.spec.lm_eval or benchmark is None:
        return evaluation
    numbers = rows.items(run, benchmark).rows
    return evaluation._replace(items=[item | {"index": numbers[item["index"]]} for item in evaluation.items])


def _questions(run: Run[Any]) -> "Questions":
    """Return the benchmark of an evaluation, with its rows."""
    from d2lora.evaluate.engine import Questions

    name = run.stage.subject
    benchmark = None if run.stage.spec.lm_eval else run.config.benchmarks[name]
    if benchmark is None:
        task = run.config.task
        own = next(each for each in task.harness_tasks if each.name == name)
        return Questions(name, harness=own, folder=task.lm_eval_path)
    every = run.rows(benchmark.data)
    return Questions(name, benchmark, [every[index] for index in rows.items(run, benchmark).rows])
