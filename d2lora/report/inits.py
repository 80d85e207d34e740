"""Compare a sweep's initializations: scores, differences to plain LoRA, time of preparation, memory."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import mean

from d2lora.records import Records
from d2lora.report import figures, formats
from d2lora.report.axes import LABELS, Axes, order_of, short_name
from d2lora.report.compare import (
    ALPHA,
    Comparison,
    adjust,
    compared,
    counterpart,
    draws_of,
    points_by_identity,
    seeds_text,
)
from d2lora.report.content import Content, Rows, Sweep
from d2lora.report.looks import COLOURS, MARKS, METHODS, NAMES, PLAIN
from d2lora.report.points import Point, differing, label_texts, size
from d2lora.settings import amount
from d2lora.settings.controls import NO_CONTROL
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.prepare import PrepareSpec
from d2lora.stages.warmup import WarmupSpec

CAPTION = "Initializations: scores in %, differences to init=lora in points on the same items"


@dataclass
class Row:
    """One initialization with one method, m and n: a point for each benchmark and metric, and the comparison with
    init=lora.

    The base is plain LoRA's row at m = n = 0.
    """

    model: str
    task: str
    init: str
    warmup: str
    recipe: str
    method: str
    m: int | str
    n: int | str
    axes: Axes
    points: dict[str, Point] = field(default_factory=dict)
    against: dict[str, Comparison] = field(default_factory=dict)
    prepare_seconds: float | None = None  # mean over seeds; None where nothing is prepared
    peak_memory_mb: float | None = None  # largest of its preparation and trainings

    def value_of(self, key: str) -> str:
        """Return a named part, or another setting; empty where the row does not depend on it."""
        return getattr(self, key) if key in LABELS else self.axes.get(key, "")


def content(sweep: Sweep) -> Content | None:
    """Return the table, and a figure where something is scored; None for a sweep with a single initialization."""
    rows = compare(sweep.points, sweep.records)
    if not rows:
        return None
    scored = any(p.scores for row in rows for p in row.points.values() if row.n != 0 or row.m != 0)
    shows: list[dict[str, int | str]] = [{"method": row.method, "m": row.m} for row in rows]
    draw = functools.partial(_figure, rows) if scored else None
    return Content(rows=Rows(*table(rows), shows), draw=draw, notes=notes(rows))


def compare(points: Iterable[Point], records: Records) -> list[Row]:
    """Return the rows of a sweep with several initializations, in the order of the sweep; none for other sweeps."""
    points = [p for p in points if p.control == NO_CONTROL]
    if len({p.init for p in points if not p.is_base}) < 2:
        return []
    by_identity = points_by_identity(points)
    rows: dict[tuple[object, ...], Row] = {}
    for p in points:
        start = (PLAIN, "", "") if p.is_base else (p.init, p.warmup, p.recipe)
        what = (p.model, p.task, *start, p.method, p.m, p.n)
        row = rows.setdefault((*what, *p.axes.items()), Row(*what, p.axes))
        benchmark = f"{p.benchmark} {p.metric}".strip()
        row.points[benchmark] = p
        plain = counterpart(by_identity, p, PLAIN, p.m)
        if row.init != PLAIN and plain and (comparison := compared(plain, p)):
            row.against[benchmark] = comparison
    for row in rows.values():
        _add_costs(row, records)
    _adjust(rows.values())
    return sorted(rows.values(), key=_order(rows.values()))


def _order(rows: Iterable[Row]) -> Callable[[Row], tuple[object, ...]]:
    """Return what to sort rows by: initializations side by side, in the order of the sweep, the base's with the plain ones."""
    labels = _labels(rows)
    order = {init: number for number, init in enumerate(dict.fromkeys(row.init for row in rows))}
    return lambda r: (
        METHODS.index(r.method), size(r.n), size(r.m), *(order_of(r.value_of(k)) for k in labels), order[r.init]
    )  # fmt: skip


def _labels(rows: Iterable[Row]) -> list[str]:
    """Return what tells rows apart beside initialization, method, m and n."""
    return [k for k in differing(rows) if k != "init"]


def _adjust(rows: Iterable[Row]) -> None:
    """Apply Holm's correction to each benchmark's column."""
    columns: dict[str, list[Comparison]] = {}
    for row in rows:
        for benchmark, comparison in row.against.items():
            columns.setdefault(benchmark, []).append(comparison)
    for column in columns.values():
        adjust(column)


def _add_costs(row: Row, records: Records) -> None:
    runs = [run for p in row.points.values() for run in p.runs.values()]
    prepared = [r for run in runs if (r := records.get(PrepareSpec.KIND, run.prepare))]
    trained = [r for run in runs if (r := records.get(WarmupSpec.KIND, run.warmup))]
    trained += [r for run in runs if (r := records.get(AdaptSpec.KIND, run.adapt))]
    if prepared:
        row.prepare_seconds = mean(r.seconds for r in prepared)
    row.peak_memory_mb = max((r.peak_memory_mb for r in [*prepared, *trained]), default=None)


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return (head, rows of texts): for each benchmark the score, its interval, the difference to init=lora and its
    interval.
    """
    benchmarks = list(dict.fromkeys(k for row in rows for k in row.points))
    labels = _labels(rows)
    head = ["initialization", *(k if k in LABELS else short_name(k) for k in labels), "method", "m", "n"]
    for benchmark in benchmarks:
        head += [benchmark, "95 % interval", f"- {PLAIN}", "95 % interval"]
    return [*head, "preparation (s)", "peak memory (MB)"], [_texts(row, labels, benchmarks) for row in rows]


def _texts(row: Row, labels: list[str], benchmarks: list[str]) -> list[str]:
    texts = [row.init, *(row.value_of(k) or "-" for k in labels)]
    texts += [NAMES[row.method], amount(row.m), amount(row.n)]
    for benchmark in benchmarks:
        point, against = row.points.get(benchmark), row.against.get(benchmark)
        texts.append(formats.percent(point.value) or "missing" if point else "-")
        texts.append(formats.bounds(point.interval) if point and point.interval else "")
        star = "*" if against and against.beyond_chance else ""
        texts.append(formats.percent(against.difference, sign="+") + star if against else "")
        texts.append(formats.bounds(against.interval, "+") if against else "")
    costs = (row.prepare_seconds, 1), (row.peak_memory_mb, 0)
    return texts + ["-" if value is None else f"{value:.{digits}f}" for value, digits in costs]


def notes(rows: list[Row]) -> list[str]:
    """Return what a reader must know about the table."""
    seeds = {seed for row in rows for p in row.points.values() for seed in p.scores}
    tests = sum(len(row.against) for row in rows)
    return [
        *([seeds_text(seeds, draws_of(p for row in rows for p in row.points.values()))] if seeds else []),
        f"* differs from init={PLAIN} beyond chance (Holm over each benchmark's column, alpha {100 * ALPHA:.0f} %); {tests} comparisons.",
        "Preparation: seconds of its stage, done once for all cells that share it. Memory: the largest of its preparation and trainings; of the GPU, or on a CPU of the process, libraries and base included (of its whole life where the system is not Linux).",
    ]


def _figure(rows: list[Row], pyplot):
    """Draw a panel for each benchmark and n: scores with intervals by initialization; filled markers have a warm-up.

    Several models, tasks, recipes or warm-ups have panels of their own. The base is a line in all of them.
    """
    labels = _labels(rows)
    where = lambda r: " ".join(label_texts(r, labels))  # noqa: E731
    bases = [row for row in rows if row.init == PLAIN and row.m == row.n == 0]
    rows = [row for row in rows if row.m != 0 or row.n != 0]
    panels = list(dict.fromkeys((k, row.n, where(row)) for row in rows for k, p in row.points.items() if p.scores))
    inits = list(dict.fromkeys(row.init for row in rows))
    series = list(dict.fromkeys((row.method, row.m) for row in rows))
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(2 * figures.WIDTH, 1.6 * len(panels) + 0.8), squeeze=False, sharex=True, layout="constrained"
    )  # fmt: skip
    for axis, (benchmark, n, here) in zip(axes[:, 0], panels, strict=True):
        panel = [r for r in rows if (r.n, where(r)) == (n, here)]
        for number, (method, m) in enumerate(series):
            own = [r for r in panel if (r.method, r.m) == (method, m)]
            _draw(axis, own, benchmark, inits, (number - (len(series) - 1) / 2) * 0.8 / len(series))
        for base in (b for b in bases if (b.model, b.task) in {(r.model, r.task) for r in panel}):
            if (point := base.points.get(benchmark)) and point.value is not None:
                axis.axhline(100 * point.value, color="grey", linestyle=":", linewidth=0.8, label="base", zorder=0)
        axis.set(title=f"{benchmark}, n={amount(n)} {here}".strip(), ylabel="%")
        axis.grid(axis="y", alpha=0.3, linewidth=0.5)
    axes[-1, 0].set_xticks(range(len(inits)), inits, rotation=30, ha="right")
    handles: dict = {}
    for axis in axes[:, 0]:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _draw(axis, rows: list[Row], benchmark: str, inits: list[str], shift: float) -> None:
    """Draw one method and m: a marker for each initialization, beside those of the others."""
    scored = [(inits.index(r.init) + shift, r.points[benchmark]) for r in rows if benchmark in r.points]
    drawn = [(x, 100 * p.value, [100 * b for b in p.interval]) for x, p in scored if p.value is not None and p.interval]
    if not drawn:
        return
    method, arm = rows[0].method, next(iter(rows[0].points.values())).arm
    low, high = ([max(0.0, sign * (y - b[i])) for _, y, b in drawn] for i, sign in ((0, 1), (1, -1)))
    axis.errorbar(
        [x for x, _, _ in drawn],
        [y for _, y, _ in drawn],
        yerr=[low, high],
        label=f"{NAMES[method]} {arm}",
        color=COLOURS[method],
        marker=MARKS[method],
        markerfacecolor="white" if rows[0].m == 0 else None,
        linestyle="none",
        markersize=3.5,
        elinewidth=0.8,
    )
