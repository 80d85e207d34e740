"""Describe a run: the plan and its estimated time, the sweep's progress, a cell's results, failures."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from d2lora import plan
from d2lora.command import findable, forecast
from d2lora.data import overlap
from d2lora.outputs import Outputs
from d2lora.plan import Cell
from d2lora.records import Coverage, Records
from d2lora.scoring import unit_of
from d2lora.settings import Config
from d2lora.stages import VERSIONS, Stage, evaluate, flips
from d2lora.stages.training import TrainingSpec
from d2lora.store import Store


def plan_text(
    cells: list[Cell],
    store: Store,
    workers: int = 1,
    notes: Iterable[str] = (),
    later: Iterable[Stage] = (),
    engines: int = 1,
) -> str:
    """Return what a sweep will do: cells, stages, what is shared and done, samples to be seen, notes, what the design can find,
    time and memory.

    `later` are like stages that follow but are not known yet: their time is counted. `engines` are the jobs that start one.
    """
    stages = plan.stages(cells)
    left = [s for s in stages if not store.done(s)]
    used = Counter(s.key for c in cells for s in c.chain.stages)
    lines = [
        f"sweep {cells[0].config.sweep}: {len(cells)} cell{'s'[: len(cells) > 1]}, {len(stages)} stages, {len(stages) - len(left)} done, {len(left)} to do"
    ]
    for name in VERSIONS:
        these = [s for s in stages if s.kind == name]
        if these:
            shared = sum(used[s.key] > 1 for s in these)
            done = sum(store.done(s) for s in these)
            lines.append(
                f"  {name:<13} {len(these):>4} stages, {shared} shared by several cells, {done} done{_samples(these, cells)}"
            )
    if len(cells) <= 12 or cells[0].config.dry_run:
        lines += [f"  {_cell_line(c, store)}" for c in cells]
    lines += _engine_lines(cells, left, engines)
    lines += notes
    lines += findable.lines(cells, store)
    lines += forecast.Forecast(cells, store, workers, later, engines).lines()
    return "\n".join(lines)


def coverage_text(model: str, targets: str | list[str], coverage: Coverage) -> str:
    """Say which share of a model's weights an adapter reaches, and which kinds of layers of a hundredth or more it does not."""
    named = targets if isinstance(targets, str) else ",".join(targets)
    kinds = [f"{kind} {100 * share:.0f} %" for kind, share in coverage.left_out.items() if share >= 0.01]
    left_out = f"; left out: {', '.join(kinds[:6])}{' ...' if len(kinds) > 6 else ''}" if kinds else ""
    return f"  {named} adapts {100 * coverage.share:.0f} % of {model}'s weights{left_out}"


def _engine_lines(cells: list[Cell], left: Iterable[Stage], engines: int) -> Iterator[str]:
    """Yield a line if evaluations that are left ask an engine: how many, of how many adapters, in how many jobs. Another names the
    initializations that the engine can't do.
    """
    asked = [stage for stage in left if evaluate.asks_engine(stage)]
    if asked:
        jobs = len(
            plan.shared_jobs(cells, {s.key for c in cells for s in c.chain.stages} - {s.key for s in asked}, engines)
        )
        adapters = len({stage.parent.key for stage in asked if stage.parent})
        counts = f"{_counted(len(asked), 'evaluation')} of {_counted(adapters, 'adapter')} in {_counted(jobs, 'job')}"
        yield f"  {evaluate.engine_text(asked[0])}: {counts}, when all trainings are done"
    missed = [c.config for c in cells if c.chain.adapter and not evaluate.engine_does(c.config)]
    if missed:
        inits = ",".join(sorted({config.init.name for config in missed}))
        yield f"  {missed[0].recipe.engine} does not do adapters of init={inits}: they are evaluated in memory"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _samples(these: list[Stage], cells: list[Cell]) -> str:
    """Say how many samples trainings of one kind will see; nothing of other kinds."""
    if not isinstance(these[0].spec, TrainingSpec):
        return ""
    every = [s for c in cells for s in c.chain.stages if s.kind == these[0].kind]
    if any(s.samples is None for s in every):
        return "; samples known once the data set is read (n or m is all)"
    once, apart = (sum(s.samples or 0 for s in group) for group in (these, every))
    return f"; {once:,} samples to be seen" + (f" ({apart:,} without sharing)" if apart > once else "")


def _cell_line(cell: Cell, store: Store) -> str:
    chain = cell.chain
    marks = [f"{s.kind} {s.key[:8]}{' (done)' if store.done(s) else ''}" for s in chain.stages]
    return f"{cell.id}: {', '.join(marks)}"


def progress_text(cells: list[Cell], store: Store) -> str:
    """Return the sweep's progress as a line: done, running, left, failed."""
    stages = plan.stages(cells)
    left = [s for s in stages if not store.done(s)]
    failed, working = sum(_failed(s, store) for s in left), at_work(cells, store)
    running = f"{len(working)} running" + "".join(
        {f" ({evaluate.engine_text(s)})" for s in working if evaluate.asks_engine(s)}
    )
    return f"{cells[0].config.sweep}: {len(stages) - len(left)} of {len(stages)} stages done, {running}, {len(left) - len(working) - failed} left, {failed} failed"


def at_work(cells: list[Cell], store: Store) -> list[Stage]:
    """Return the stages that some worker is doing."""
    # What a killed worker left lies there for ever: a stage that is done or has failed is not at work, whatever lies beside it.
    open_ = (s for s in plan.stages(cells) if not store.done(s) and not _failed(s, store))
    return [s for s in open_ if store.begun(s)]


def _failed(stage: Stage, store: Store) -> bool:
    return store.outputs.failed(stage.key).exists()


def cell_text(cell: Cell, store: Store) -> str:
    """Return a single cell's results, with notes."""
    lines = [
        *(
            line
            for stage in (*cell.chain.validations, *cell.chain.evaluations)
            for line in _scores(stage, cell.config, store)
        ),
        *(_batch_line(stage, store) for stage in cell.chain.flips),
        *(_overlap_line(stage, store) for stage in cell.chain.contamination),
        *_passed_over(cell, store),
    ]
    return "\n".join([cell.id, *(f"  {line}" for line in lines)])


def _scores(stage: Stage, config: Config, store: Store) -> Iterator[str]:
    """Yield an evaluation's metrics, each ± half of its 95 % interval as tables have it, how many answers were cut or empty, and
    how many items were left out.
    """
    from d2lora.report.points import interval_of  # late: planning a grid needs no numpy

    records = Records(store.outputs.root)
    record = records.get(stage.kind, stage.key)
    if record is None:
        yield f"{stage.subject}: missing"
        return
    benchmark = config.benchmarks.get(stage.subject)
    for metric, score in record.scores.items():
        low, high = interval_of(records, stage.key, metric, benchmark.varies if benchmark else None)
        unit = unit_of(metric)
        shown = f"{unit.value(score.value)} {unit.name} ± {unit.value((high - low) / 2)}"
        yield f"{stage.subject} {metric}: {shown} ({score.items} items)"
    if engine := record.engine:
        whom = f" instead of {engine.instead_of}: {engine.reason}" if engine.instead_of else ""
        yield f"{stage.subject}: answered by {engine.name}{f' {engine.version}' if engine.version else ''}{whom}"
    if cut := record.counts.get("cut"):
        yield f"{stage.subject}: {cut} of {record.items} answers stopped at max_new_tokens, before an end of their own"
    if empty := record.counts.get("empty"):
        yield f"{stage.subject}: {empty} of {record.items} answers are empty"
    for reason, count in record.passed_over.items():
        yield f"{stage.subject}: {count} items left out of the scores ({reason})"


def _batch_line(stage: Stage, store: Store) -> str:
    record = store.record(stage)
    return flips.text(record) if record else f"{stage.subject} of the base at two batch sizes: missing"


def _overlap_line(stage: Stage, store: Store) -> str:
    record = store.record(stage)
    shares = overlap.shares_text(stage.subject, record.scores) if record else f"{stage.subject}: missing"
    return f"test items in the training set, {shares}"


def _passed_over(cell: Cell, store: Store) -> Iterator[str]:
    """Yield how many rows a cell's trainings left out, and why."""
    for stage in filter(None, (cell.chain.warmup, cell.chain.adapt)):
        record = store.record(stage)
        reasons = {"too long": record.misfits} | record.passed_over if record else {}
        if told := ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items() if count):
            others = "" if "all" in (getattr(stage.spec, "m", 0), getattr(stage.spec, "n", 0)) else ", others taken"
            yield f"{stage.kind}: rows passed over ({told}){others}"


def failures_text(output: Path, lost: Iterable[Stage]) -> str:
    """Return the failed stages, their errors, and the stages that they block."""
    lines, store = [], Store(output)
    for stage in lost:
        file = Outputs(output).failed(stage.key)
        if file.exists():
            lines.append(f"failed: {stage.label}: {json.loads(file.read_text())['error']} (traceback in {file})")
        else:
            missing = [parent.label for parent in stage.parents if not store.done(parent)]
            lines.append(
                f"blocked: {stage.label}" + (f", by {', '.join(missing)}" if missing else ": no worker did it")
            )
    return "".join(f"{line}\n" for line in lines)
