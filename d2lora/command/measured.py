"""Read from finished records how long stages take, what memory they need, and how many tokens rows have."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import linear_regression, mean

from d2lora import records
from d2lora.errors import UserError
from d2lora.keys import Identity, canonical
from d2lora.outputs import Outputs
from d2lora.records import Record
from d2lora.stages import Stage
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.contamination import ContaminationSpec
from d2lora.stages.evaluate import EvaluateSpec
from d2lora.stages.flips import FlipsSpec
from d2lora.stages.prepare import PrepareSpec
from d2lora.stages.warmup import WarmupSpec

_TRAININGS = (WarmupSpec.KIND, AdaptSpec.KIND)
_EVALUATIONS = (EvaluateSpec.KIND, FlipsSpec.KIND)
_LOADS = 1.0  # seconds from which loading a base includes the libraries' imports: a process's first
_LATEST, _LATEST_STARTS = 24, 4  # records of a group that count: code changes, and so does what else a machine does
_APART = 2.0  # how much the largest stage must exceed the smallest to tell fixed seconds from those of its size

Group = tuple[str, ...]  # what the time of a stage of some size depends on most


@dataclass(frozen=True)
class Pace:
    """Seconds of stages by their size (tokens of a training, items of an evaluation), and the peak of their memory.

    `fixed` + `each` x size where the records are of several sizes; else `mean` seconds are of the one `size` that they have.
    """

    mean: float
    size: float
    line: tuple[float, float] | None  # fixed and each
    memory_mb: float
    keys: frozenset[str]  # of the records that this is from

    def seconds(self, size: float, theory: Callable[[float], float]) -> float:
        """Return the time of a stage of this size; from records of another one only, as `theory` has the two differ."""
        if self.line:
            fixed, each = self.line
            return fixed + each * size
        return self.mean if size == self.size else self.mean * theory(size) / theory(self.size)


@dataclass
class Measured:
    """What the records of one output folder show of a kind of hardware."""

    paces: dict[Group, Pace]
    tokens: dict[Group, float]  # of a row, by kind of stage, method and data
    alone: float | None  # seconds until a process has its libraries and the base; None where no record shows it
    together: float | None  # and where others started at the same time

    def start(self, workers: int) -> float | None:
        """Return how long the start of so many workers takes; None where no record shows it."""
        return (self.together or self.alone) if workers > 1 else (self.alone or self.together)

    def pace(self, groups: Iterable[Group]) -> Pace | None:
        """Return the pace of the first of these groups that has one."""
        return next((self.paces[group] for group in groups if group in self.paces), None)


def measured(output: Path, gpu: str | None) -> Measured:
    """Read the records under `output`; of a GPU those only, whose own contains this name. Damaged ones are left out."""
    by_key = {r.key: r for r in sorted(_all(Outputs(output)), key=lambda r: r.provenance.started)}
    here = [r for r in by_key.values() if _is_of(r, gpu)]
    grouped: dict[Group, list[Record]] = defaultdict(list)
    rows: dict[Group, list[Record]] = defaultdict(list)
    for record in here:
        for group in _groups(record.stage, record.spec, _model(record, by_key)):
            grouped[group].append(record)
    for record in by_key.values():  # rows are as long on any hardware
        if record.stage in _TRAININGS and record.metrics.get("tokens_seen") and not record.spec.get("control"):
            rows[row_group(record.stage, record.spec)].append(record)
    starts = [r for r in here if r.load_seconds and r.load_seconds >= _LOADS]
    shared = {a.key for a, b in itertools.permutations(starts, 2) if _overlap(a, b)}
    return Measured(
        {group: _pace(these[-_LATEST:]) for group, these in grouped.items()},
        {group: _per_row(these) for group, these in rows.items()},
        _start([r for r in starts if r.key not in shared]),
        _start([r for r in starts if r.key in shared]),
    )


def _all(outputs: Outputs) -> Iterable[Record]:
    for folder in outputs.entries():
        try:
            if record := records.read(folder):
                yield record
        except (OSError, UserError):
            continue  # `python -m d2lora check` names it; a forecast can do without


def _start(these: Sequence[Record]) -> float | None:
    """Return the mean time of the latest of these records in which a process loaded its libraries; None without any."""
    return mean(r.load_seconds or 0.0 for r in these[-_LATEST_STARTS:]) if these else None


def _overlap(first: Record, second: Record) -> bool:
    """Tell whether the second process started while the first one was loading."""
    begun, other = (datetime.fromisoformat(r.provenance.started) for r in (first, second))
    return abs((other - begun).total_seconds()) <= min(first.load_seconds or 0, second.load_seconds or 0)


def _is_of(record: Record, gpu: str | None) -> bool:
    """Tell whether a record is of this GPU; an overlap check needs none, and any is right where none is named."""
    used = str(record.provenance.hardware.get("gpu", "")).lower()
    return gpu is None or record.stage == ContaminationSpec.KIND or gpu.lower() in used


def groups_of(stage: Stage) -> list[Group]:
    """Return the groups of a stage, that of those most like it first."""
    spec, model = stage.spec.content(), stage.spec.content().get("model")
    ancestor = stage.parent
    while model is None and ancestor is not None:
        model, ancestor = ancestor.spec.content().get("model"), ancestor.parent
    return _groups(stage.kind, spec, model)


def _model(record: Record, by_key: dict[str, Record]) -> Identity | None:
    """Return the identity of the base that a record's stage used: its own or the one of the stages it started from."""
    while "model" not in record.spec:
        parent = by_key.get(record.parent or "")
        if parent is None:
            return None
        record = parent
    return record.spec["model"]


def _groups(kind: str, spec: Identity, model: Identity | None) -> list[Group]:
    base = canonical(model)
    if kind == ContaminationSpec.KIND:
        return [(kind, canonical(spec["train"])), (kind,)]
    if kind in _EVALUATIONS:
        engine = spec.get("engine") or {}
        return [(kind, _benchmark(spec), base, *([engine["name"]] if engine else []))]
    if kind == PrepareSpec.KIND:
        return [(kind, spec["init"]["name"], base)]
    if kind in _TRAININGS:
        method, init = _method(spec), spec.get("init", {}).get("name", "")
        return [(kind, method, init, base), (kind, method, base)]
    return [(kind, base)]


def _benchmark(spec: Identity) -> str:
    """Return what of a benchmark decides how long an item takes: not which of the items are evaluated."""
    content = spec.get("benchmark")
    if isinstance(content, dict):
        return canonical({name: value for name, value in content.items() if name != "limit"})
    settings = {name: value for name, value in spec.get("harness", {}).items() if name != "limit"}
    return canonical([spec.get("lm_eval"), settings] if settings else spec.get("lm_eval"))


def row_group(kind: str, spec: Identity) -> Group:
    """Return what the tokens of a training's row depend on."""
    return kind, _method(spec), canonical([spec.get("data"), spec.get("task"), spec.get("messages")])


def _method(spec: Identity) -> str:
    return str(spec.get("method", {}).get("name", ""))


def _size(record: Record) -> float:
    """Return the size of a record's stage, in what its pace counts; 1 of one whose time has no known measure."""
    if record.stage in _TRAININGS:
        return float(record.metrics.get("tokens_seen") or record.metrics.get("samples_seen") or 1)
    return float(record.items) if record.stage in _EVALUATIONS and record.scores else 1.0


def _pace(these: Sequence[Record]) -> Pace:
    """Return the pace of records: of several sizes the line of least squares."""
    sizes, seconds = [_size(r) for r in these], [float(r.seconds) for r in these]
    line = _line(sizes, seconds) if max(sizes) >= _APART * min(sizes) else None
    memory = max(float(r.peak_memory_mb) for r in these)
    return Pace(mean(seconds), mean(sizes), line, memory, frozenset(r.key for r in these))


def _line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Return the line of least squares, neither end of which is below zero."""
    each, fixed = linear_regression(sizes, seconds)
    if each <= 0:
        return mean(seconds), 0.0
    return (fixed, each) if fixed >= 0 else (0.0, mean(seconds) / mean(sizes))


def _per_row(these: Sequence[Record]) -> float:
    return sum(r.metrics["tokens_seen"] for r in these) / sum(max(r.metrics["samples_seen"], 1) for r in these)
