"""Make a sweep's tables, one for each benchmark and metric: rows are method and LoRA or D2LoRA, columns n or another
setting.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from d2lora.report import axes, variances, worth
from d2lora.report.axes import LABELS, order_of
from d2lora.report.compare import Comparison, comparisons
from d2lora.report.looks import METHODS, NAMES
from d2lora.report.points import Point, differing, label_texts
from d2lora.report.verdict import verdict
from d2lora.scoring import Unit, unit_of
from d2lora.scoring.kinds import PERCENT
from d2lora.settings import Report, amount
from d2lora.settings.controls import CONTROL_NAMES

# Which rows are drawn and how hold-outs are made have numbers without an order: never columns unless asked for.
_NO_AMOUNTS = ("data_seed", "split_seed")

Value = int | str  # of a column: n, m, or another setting's text


@dataclass
class Line:
    """A row: one method and arm, with its points by the columns' value. The first point is one of this row alone, if
    there is one.
    """

    label: str
    method: str
    m: int | str
    points: dict[Value, Point]

    @property
    def first(self) -> Point:
        """Return the point from which the row's label is made."""
        return next(iter(self.points.values()))


@dataclass
class Table:
    """One benchmark with one metric; `column` is the setting in the columns, `margin` that of equivalence in the metric's unit.

    `equal` are the tables of other metrics with the same score on every item, as ROUGE-L and ROUGE-Lsum have of a single line.
    """

    title: str
    points: list[Point]
    columns: list[Value]
    lines: list[Line]
    column: str = "n"
    margin: float = PERCENT.margin
    equal: list["Table"] = field(default_factory=list)

    @property
    def unit(self) -> Unit:
        """Return the unit of its metric."""
        return unit_of(self.points[0].metric)

    @cached_property
    def pairs(self) -> dict[Point, Comparison]:
        """Return the comparison of each D2LoRA point that has one."""
        return comparisons(self.points, self.margin)

    @property
    def verdict(self) -> str:
        return verdict(self.pairs.values())

    @cached_property
    def remarks(self) -> list[str]:
        """Return what else its numbers say, a line each: a warm-up's worth in task samples, shares of the variance."""
        return [*worth.lines(self), *variances.lines(self.points)]

    @property
    def marked(self) -> bool:
        return any(c.beyond_chance for c in self.pairs.values())

    @property
    def unique_pairs(self) -> list[Comparison]:
        return list(dict.fromkeys(self.pairs.values()))


def build(points: Iterable[Point], column: str | None = None, settings: Report | None = None) -> list[Table]:
    """Return a table for each benchmark and metric; metrics that are equal on every item share one.

    `column` names the setting of the columns (column_of without one); `settings` have the margins of equivalence.
    """
    margins = settings or Report()
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.benchmark, point.metric), []).append(point)
    distinct: list[Table] = []
    for (benchmark, metric), group in groups.items():
        margin = margins.margin_of(unit_of(metric))
        table = _table(benchmark, metric, group, column or column_of(group), margin)
        if same := next((other for other in distinct if _have_equal_scores(other.points, group)), None):
            same.equal.append(table)
            same.title = _shared_title(same)
        else:
            distinct.append(table)
    return distinct


def _have_equal_scores(points: list[Point], others: list[Point]) -> bool:
    """Tell whether two metrics of one benchmark have the same score on every item of every cell."""
    if points[0].benchmark != others[0].benchmark or not any(p.scores for p in points) or len(points) != len(others):
        return False
    return all(
        p.scores.keys() == q.scores.keys() and all(np.array_equal(p.scores[s], q.scores[s]) for s in p.scores)
        for p, q in zip(points, others, strict=True)
    )


def _shared_title(table: Table) -> str:
    """Return the title of a table that stands for several metrics."""
    metrics = [each.points[0].metric for each in (table, *table.equal)]
    return f"{table.points[0].benchmark}: {' and '.join(metrics)} (equal on every item) in {table.unit.name}"


def column_of(points: list[Point]) -> str:
    """Return the amount with the most values: n, or a numeric setting with more."""
    numeric = [k for k in differing(points) if k not in (*LABELS, *_NO_AMOUNTS) and _is_numeric(k, points)]
    counts = {k: len({p.value_of(k) for p in points} - {""}) for k in ("n", *numeric)}
    return max(counts, key=counts.__getitem__)


def _is_numeric(key: str, points: list[Point]) -> bool:
    return all(axes.number(p.axes[key]) is not None for p in points if key in p.axes)


def _table(benchmark: str, metric: str, points: list[Point], column: str, margin: float) -> Table:
    keys = [k for k in ("m", "control", "n", *differing(points)) if k != column]
    columns = sorted({p.value_of(column) for p in points} - {""}, key=order_of) or [""]
    title = f"{benchmark}: {metric or 'no result yet'} in {unit_of(metric).name}"
    return Table(title, points, columns, _lines(points, keys, column, columns), column, margin)


def _lines(points: list[Point], keys: list[str], column: str, columns: list[Value]) -> list[Line]:
    """Return the rows in order. A point that does not depend on what tells rows apart is in each of them.

    The base depends on no method, initialization or recipe, D2LoRA(m, 0) on no learning rate of phase 2. A point that
    does not depend on the columns' setting is in each column.
    """
    row_of = {p: (p.method, tuple(_of_row(p, k) for k in keys)) for p in points}
    rows = [row for row in dict.fromkeys(row_of.values()) if not any(_covers(row, other) for other in row_of.values())]
    lines = []
    for row in sorted(rows, key=lambda row: (METHODS.index(row[0]), *map(_order, keys, row[1]))):
        of_row = [p for p in points if row_of[p] == row]
        first = of_row[0]
        # A row that starts from a quantized base has another start than the base.
        of_row += [p for p in points if _covers(row_of[p], row) and not (first.own_base and p.is_base)]
        by_column = _by_column(of_row, column, columns)
        lines.append(Line(row_label(first, keys), first.method, 0 if column == "m" else first.m, by_column))
    return lines


def _by_column(points: list[Point], column: str, columns: list[Value]) -> dict[Value, Point]:
    """Return the first point of each column; one that does not depend on the columns' setting is in all of them."""
    by_column: dict[Value, Point] = {}
    for point in points:
        value = point.value_of(column)
        for each in columns if value == "" else [value]:
            by_column.setdefault(each, point)
    return by_column


def _order(key: str, value: Value) -> tuple[float, str]:
    return (CONTROL_NAMES.index(str(value)), "") if key == "control" else order_of(value)


_Row = tuple[str, tuple[Value, ...]]  # method, values of the keys that tell rows apart


def _of_row(point: Point, key: str) -> Value:
    """Return what of a point tells its row from others. The base has no initialization or recipe."""
    return "" if point.is_base and key in ("init", "recipe") else point.value_of(key)


def _covers(general: _Row, row: _Row) -> bool:
    """Tell whether a point of the row `general` stands in another `row` too: it depends on less and has the same of the rest."""
    same = general[0] == row[0] and all(a in ("", b) for a, b in zip(general[1], row[1], strict=True))
    return same and general != row


def row_label(point: Point, keys: Iterable[str]) -> str:
    """Return a row's label: method, arm, and what else tells rows apart."""
    keys = list(keys)
    others = label_texts(point, (k for k in keys if k not in ("m", "n", "control") and _of_row(point, k) != ""))
    return " ".join(filter(None, (NAMES[point.method], *_shape(point, keys), *others)))


def _shape(point: Point, keys: list[str]) -> list[str]:
    """Return the arm of a row's label, with the n that it is of where columns are of another setting."""
    if "n" not in keys:
        return [point.arm]
    if "m" not in keys:
        return [f"n={amount(point.n)}"]
    return (
        [point.arm, f"n={amount(point.n)}"]
        if point.m == 0
        else [point.arm_label.format(m=amount(point.m), n=amount(point.n))]
    )


def column_name(table: Table, value: Value) -> str:
    """Return a column's head: n=1k; n=all with the number of samples that its records have; lr=0.001."""
    if table.column not in ("n", "m"):
        return str(value) if table.column in ("", "method", *LABELS) else axes.text(table.column, str(value))
    chosen = {p.samples for p in table.points if p.value_of(table.column) == value and p.samples is not None}
    true = (
        f" ({', '.join(f'{s:,}' for s in sorted(chosen))})" if table.column == "n" and value == "all" and chosen else ""
    )
    return f"{table.column}={amount(value)}{true}"
