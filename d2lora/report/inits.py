"""Compare a sweep's initializations with plain LoRA on the same items: scores, differences, time of preparation, memory."""

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean
from typing import Any

from d2lora.records import Records
from d2lora.report import forest, formats
from d2lora.report.axes import LABELS, order_of, short_name
from d2lora.report.compare import (
    ALPHA,
    Comparison,
    adjust,
    compared,
    count_decided,
    counterpart,
    draws_of,
    points_by_identity,
    seeds_text,
)
from d2lora.report.content import Content, Rows, Sweep
from d2lora.report.looks import METHODS, NAMES, PLAIN
from d2lora.report.points import Point, by_benchmark, differing, label_texts, size
from d2lora.scoring import unit_of
from d2lora.settings import Report, amount
from d2lora.settings.controls import NO_CONTROL
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.prepare import PrepareSpec
from d2lora.stages.warmup import WarmupSpec

CAPTION = f"Initializations against init={PLAIN} at the same m and n, on the same items"
FIXED_CAPTION = f"{CAPTION}, at the recipe's own values"
_HEAD = (
    *("value", "95 % interval", f"- {PLAIN}", *formats.COMPARISON_HEAD[1:], "it is"),
    *("preparation (s)", "peak memory (MB)"),
)


@dataclass(frozen=True)
class Row:
    """One initialization in one metric, with one method, m and n; `against` is its comparison with init=lora there.

    The base is plain LoRA's row at m = n = 0.
    """

    point: Point
    against: Comparison | None
    prepare_seconds: float | None  # mean over seeds; None where nothing is prepared
    peak_memory_mb: float | None  # largest of its preparation and trainings

    @property
    def init(self) -> str:
        return PLAIN if self.point.is_base else self.point.init


def content(sweep: Sweep) -> Content | None:
    """Return the table with what it says in sentences, and the figure of differences; None for a single initialization.

    Of a tuned sweep each initialization has the settings that were chosen for it; the figure shows those at the recipe's own
    values beside them.
    """
    rows = compare(sweep.points, sweep.records, sweep.settings)
    drawn = [rows, *([fixed] if (fixed := compare(sweep.fixed, sweep.records, sweep.settings)) else [])]
    return _content(rows, drawn)


def fixed_content(sweep: Sweep) -> Content | None:
    """Return the same table of a tuned sweep's cells at the recipe's own values, whose differences `content` draws."""
    return _content(compare(sweep.fixed, sweep.records, sweep.settings), [])


def _content(rows: list[Row], drawn: list[list[Row]]) -> Content | None:
    if not rows:
        return None
    is_compared = any(row.against for column in drawn for row in column)
    draw = functools.partial(_figure, drawn) if is_compared else None
    return Content(rows=table(rows), draw=draw, sentences=sentences(rows), notes=notes(rows))


def compare(points: Iterable[Point], records: Records, settings: Report) -> list[Row]:
    """Return the rows of a sweep with several initializations, in the order of the sweep; none for other sweeps.

    Holm's correction is over all comparisons in a benchmark's metric.
    """
    points = [p for p in points if p.control == NO_CONTROL]
    if len({p.init for p in points if not p.is_base}) < 2:
        return []
    by_identity, rows = points_by_identity(points), []
    for group in by_benchmark(points).values():
        margin = settings.margin_of(unit_of(group[0].metric))
        own = [_row(p, counterpart(by_identity, p, PLAIN, p.m), margin, records) for p in group]
        adjust([row.against for row in own if row.against])
        rows += _ordered(own)
    return rows


def _row(point: Point, plain: Point | None, margin: float, records: Records) -> Row:
    is_plain = point.is_base or point.init == PLAIN
    against = compared(plain, point, margin) if plain and not is_plain else None
    return Row(point, against, *_costs(point, records))


def _costs(point: Point, records: Records) -> tuple[float | None, float | None]:
    """Return the seconds of preparation, mean over seeds, and the peak memory of preparation and trainings."""
    runs = point.runs.values()
    prepared = [r for run in runs if (r := records.get(PrepareSpec.KIND, run.prepare))]
    trained = [r for run in runs if (r := records.get(WarmupSpec.KIND, run.warmup))]
    trained += [r for run in runs if (r := records.get(AdaptSpec.KIND, run.adapt))]
    seconds = mean(r.seconds for r in prepared) if prepared else None
    return seconds, max((r.peak_memory_mb for r in [*prepared, *trained]), default=None)


def _ordered(rows: list[Row]) -> list[Row]:
    """Return rows with initializations beside each other, in the order of the sweep; bases with the plain ones, once."""
    labels = _labels(rows)
    order = {init: number for number, init in enumerate(dict.fromkeys(row.init for row in rows))}
    distinct = {
        frozenset(r.evaluate for r in row.point.runs.values()) if row.point.is_base else id(row): row for row in rows
    }

    def place(row: Row) -> tuple[object, ...]:
        p = row.point
        others = (order_of(_value_of(row, k)) for k in labels)
        return METHODS.index(p.method), size(p.n), size(p.m), *others, order[row.init]

    return sorted(distinct.values(), key=place)


def _labels(rows: Iterable[Row]) -> list[str]:
    """Return what tells rows apart beside initialization, method, m and n."""
    return [k for k in differing(row.point for row in rows) if k != "init"]


def _value_of(row: Row, key: str) -> str:
    """Return a named part, or another setting; empty where the row does not depend on it."""
    return "" if row.point.is_base and key in ("recipe", "warmup") else str(row.point.value_of(key))


# --- the table -----------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> Rows:
    """Return scores, differences to init=lora with intervals and p, what was chosen, and costs."""
    labels, chosen = _labels(rows), list(dict.fromkeys(k for row in rows for k in row.point.tuned))
    names = [k if k in LABELS else short_name(k) for k in labels]
    head = ["initialization", *names, "method", "m", "n", *map(short_name, chosen), "benchmark", *_HEAD]
    return Rows(head, [_texts(row, labels, chosen) for row in rows], [row.point for row in rows])


def _texts(row: Row, labels: list[str], chosen: list[str]) -> list[str]:
    p, unit = row.point, unit_of(row.point.metric)
    costs = (row.prepare_seconds, 1), (row.peak_memory_mb, 0)
    return [
        row.init,
        *(_value_of(row, k) or "-" for k in labels),
        *(NAMES[p.method], amount(p.m), amount(p.n)),
        *(p.tuned.get(k, "-") for k in chosen),
        p.measure,
        unit.value(p.value) or "missing",
        unit.bounds(p.interval) if p.interval else "",
        *_difference(row.against),
        *("-" if value is None else f"{value:.{digits}f}" for value, digits in costs),
    ]


def _difference(c: Comparison | None) -> list[str]:
    return [*formats.comparison_texts(c), c.decision] if c else [""] * 5


def sentences(rows: list[Row]) -> list[str]:
    """Say for each benchmark how many initializations are better or worse than plain LoRA, and which."""
    groups: dict[str, list[Comparison]] = {}
    for row in rows:
        if row.against:
            groups.setdefault(row.point.measure, []).append(row.against)
    return [f"{measure}: {_sentence(comparisons)}" for measure, comparisons in groups.items()]


def _sentence(comparisons: list[Comparison]) -> str:
    named = {d: Counter(c.d2lora.init for c in comparisons if c.decision == d) for d in ("better", "worse")}
    parts = [f"{d} beyond chance in {_counted(counts)}" for d, counts in named.items()]
    parts += [f"equivalent within {comparisons[0].margin_text} in {count_decided(comparisons, 'equivalent')}"]
    parts += [f"undecided in {count_decided(comparisons, 'undecided')}"]
    return (
        f"of {len(comparisons)} comparisons with init={PLAIN} at the same m and n an initialization is "
        f"{', '.join(parts)} (Holm over all of them, alpha {100 * ALPHA:.0f} %)."
    )


def _counted(counts: Counter[str]) -> str:
    """Return a number of comparisons with the initializations that they are of: 3 (olora 2, pissa 1)."""
    named = ", ".join(f"{init} {count}" for init, count in counts.most_common())
    return f"{counts.total()} ({named})" if named else "0"


def notes(rows: list[Row]) -> list[str]:
    """Return what a reader must know about the table."""
    points = [row.point for row in rows]
    seeds = {seed for p in points for seed in p.scores}
    return [
        *([seeds_text(seeds, draws_of(points))] if seeds else []),
        *(
            ["Each initialization, init=lora too, has the values that validation chose for it."]
            * any(p.tuned for p in points)
        ),
        f"* differs from init={PLAIN} beyond chance.",
        "Preparation: seconds of its stage, done once for all cells that share it. Memory: the largest of its preparation and trainings; of the GPU, or on a CPU of the process, libraries and base included (of its whole life where the system is not Linux).",
    ]


# --- the figure ----------------------------------------------------------------------------------------------------


def _figure(drawn: list[list[Row]], pyplot: Any) -> Any:
    """Draw differences to init=lora: a row for each initialization, a panel for each benchmark and n.

    Several models, tasks, recipes or warm-ups have panels of their own. Of a tuned sweep the right column has the differences
    at the recipe's own values. Filled markers have a warm-up.
    """
    suffixes = [" tuned", " at the recipe's own values"] if len(drawn) > 1 else [""]
    columns = [_panels(rows) for rows in drawn]
    titles = dict.fromkeys(title for column in columns for title in column)
    lines = [
        [forest.Panel(title + suffix, column.get(title, [])) for suffix, column in zip(suffixes, columns, strict=True)]
        for title in titles
    ]
    return forest.draw(lines, f"init={PLAIN}", pyplot)


def _panels(rows: list[Row]) -> dict[str, list[forest.Entry]]:
    """Return the comparisons of rows by the title of their panel."""
    panels: dict[str, list[forest.Entry]] = {}
    labels = _labels(rows)
    for row in rows:
        if row.against:
            p = row.point
            title = f"{p.benchmark}, {' '.join([f'n={amount(p.n)}', *label_texts(p, labels)])}"
            panels.setdefault(title, []).append(forest.Entry(row.init, f"{NAMES[p.method]} {p.arm}", row.against))
    return panels
