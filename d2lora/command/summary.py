"""What a run says of itself: the plan and about how long it takes, the sweep's line, a cell's results, what failed."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from d2lora import plan
from d2lora.data import overlap
from d2lora.keys import canonical
from d2lora.outputs import Outputs
from d2lora.plan import Cell
from d2lora.stages import Stage, flips
from d2lora.store import Store


def plan_text(cells: list[Cell], store: Store, workers: int = 1, notes: Iterable[str] = ()) -> str:
    """What a sweep will do: cells, stages, what is shared and done, samples to be seen, notes, and about how long."""
    stages = plan.stages(cells)
    left = [s for s in stages if not store.done(s)]
    used = Counter(s.key for c in cells for s in c.chain.stages)
    lines = [
        f"sweep {cells[0].config.sweep}: {len(cells)} cell{'s'[: len(cells) > 1]}, {len(stages)} stages, {len(stages) - len(left)} done, {len(left)} to do"
    ]
    for name in ("contamination", "flips", "prepare", "warmup", "adapt", "evaluate"):
        these = [s for s in stages if s.kind == name]
        if these:
            shared = sum(used[s.key] > 1 for s in these)
            done = sum(store.done(s) for s in these)
            lines.append(
                f"  {name:<13} {len(these):>4} stages, {shared} shared by several cells, {done} done{_samples(name, these, cells)}"
            )
    if len(cells) <= 12 or cells[0].config.dry_run:
        lines += [f"  {_cell_line(c, store)}" for c in cells]
    lines += notes
    if left:
        lines.append(f"  about {_duration(left, store, workers)}")
    return "\n".join(lines)


def coverage_text(model: str, targets: str | list[str], found: dict) -> str:
    """What an adapter reaches of a model and what it leaves out, from a hundredth of the weights on (coverage.of)."""
    named = targets if isinstance(targets, str) else ",".join(targets)
    left = [f"{kind} {100 * share:.0f} %" for kind, share in found["left_out"].items() if share >= 0.01]
    out = f"; left out: {', '.join(left[:6])}{' ...' if len(left) > 6 else ''}" if left else ""
    return f"  {named} adapts {100 * found['share']:.0f} % of {model}'s weights{out}"


def _samples(name: str, these: list[Stage], cells: list[Cell]) -> str:
    if name in ("contamination", "flips", "prepare", "evaluate"):
        return ""
    every = [s for c in cells for s in c.chain.stages if s.kind == name]
    if any(s.samples is None for s in every):
        return "; samples known once the data set is read (n or m is all)"
    once, apart = (sum(s.samples or 0 for s in group) for group in (these, every))
    return f"; {once:,} samples to be seen" + (f" ({apart:,} without sharing)" if apart > once else "")


def _cell_line(cell: Cell, store: Store) -> str:
    chain = cell.chain
    marks = [f"{s.kind} {s.key[:8]}{' (done)' if store.done(s) else ''}" for s in chain.stages]
    return f"{cell.id}: {', '.join(marks)}"


def _duration(left: list[Stage], store: Store, workers: int) -> str:
    """An estimate from the seconds that finished stages of the same kind took; says so if there are none."""
    measured: dict[tuple, list[float]] = defaultdict(list)
    for file in store.folder.glob("*/*/record.json"):
        try:
            record = json.loads(file.read_text())
            kind, seconds = _kind(record["stage"], record["spec"]), record["seconds"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # `python -m d2lora check` names it; an estimate can do without
        measured[kind].append(seconds / max(record.get("metrics", {}).get("samples_seen", 1), 1))
    if any(_kind(s.kind, s.spec.content()) not in measured for s in left):
        return "an unknown time: nothing like it was measured here yet"
    if any(s.samples is None for s in left):
        return "an unknown time: n or m is all of a data set that is not read yet"
    seconds = 0.0
    for stage in left:
        times = measured[_kind(stage.kind, stage.spec.content())]
        seconds += sum(times) / len(times) * (stage.samples or 1)
    seconds = seconds / workers + 20  # imports
    text = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
    return text + (f" with {workers} workers" if workers > 1 else "")


def _kind(name: str, spec: dict) -> tuple:
    """What a stage's time a sample depends on most: kind, method and model; of an evaluation, its benchmark."""
    if name == "contamination":
        return name, canonical(spec["train"])
    if name == "evaluate":
        return name, canonical(spec.get("benchmark", spec.get("lm_eval")))
    if name == "flips":
        return name, canonical([spec.get("benchmark", spec.get("lm_eval")), spec["model"]])
    kind = spec["init"]["name"] if name == "prepare" else spec.get("method", {}).get("name")
    return name, kind, canonical(spec["model"])


def progress_text(cells: list[Cell], store: Store) -> str:
    """The sweep's line: done, running, left, failures."""
    stages = plan.stages(cells)
    left = [s for s in stages if not store.done(s)]
    failed, running = sum(_failed(s, store) for s in left), len(at_work(cells, store))
    return f"{cells[0].config.sweep}: {len(stages) - len(left)} of {len(stages)} stages done, {running} running, {len(left) - running - failed} left, {failed} failed"


def at_work(cells: list[Cell], store: Store) -> list[Stage]:
    """The stages that some worker has begun."""
    # What a killed worker left lies there for ever: a stage that is done or has failed is not at work, whatever lies beside it.
    open_ = (s for s in plan.stages(cells) if not store.done(s) and not _failed(s, store))
    return [s for s in open_ if any(store.place(s).parent.glob(f".{s.key}-*"))]


def _failed(stage: Stage, store: Store) -> bool:
    return store.outputs.failed(stage.key).exists()


def cell_text(cell: Cell, store: Store) -> str:
    """A single cell's results."""
    lines = [cell.id]
    for stage in cell.chain.evaluations:
        name = stage.subject
        record = store.record(stage)
        for metric, r in (record["metrics"] if record else {}).items():
            lines.append(f"  {name} {metric}: {100 * r['value']:.2f} % ± {196 * r['stderr']:.2f} ({r['items']} items)")
        if record is None:
            lines.append(f"  {name}: missing")
        elif cut := record.get("counts", {}).get("cut"):
            items = max(r["items"] for r in record["metrics"].values())
            lines.append(f"  {name}: {cut} of {items} answers stopped at max_new_tokens, before an end of their own")
    for check in cell.chain.flips:
        record = store.record(check)
        lines.append(
            f"  {flips.text(record) if record else f'{check.subject} of the base at two batch sizes: missing'}"
        )
    for against in cell.chain.contamination:
        record = store.record(against)
        shares = overlap.shares_text(against.subject, record["metrics"]) if record else f"{against.subject}: missing"
        lines.append(f"  test items in the training set, {shares}")
    return "\n".join([*lines, *_passed_over(cell, store)])


def _passed_over(cell: Cell, store: Store) -> Iterable[str]:
    """What became of rows that a cell's trainings did not take."""
    for stage in filter(None, (cell.chain.warmup, cell.chain.adapt)):
        counts = (store.record(stage) or {}).get("data", {})
        reasons = {"too long": counts.get("misfits", 0)} | counts.get("left_out", {})
        if told := ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items() if count):
            others = "" if "all" in (getattr(stage.spec, "m", 0), getattr(stage.spec, "n", 0)) else ", others taken"
            yield f"  {stage.kind}: rows passed over ({told}){others}"


def failures_text(output: Path, lost: Iterable[Stage]) -> str:
    """What failed and why, and what that blocked."""
    lines = []
    for stage in lost:
        file = Outputs(output).failed(stage.key)
        if file.exists():
            lines.append(f"failed: {stage.label}: {json.loads(file.read_text())['error']} (traceback in {file})")
        else:
            lines.append(
                f"blocked: {stage.label}" + (f", by {stage.parent.label}" if stage.parent else ": no worker did it")
            )
    return "".join(f"{line}\n" for line in lines)
