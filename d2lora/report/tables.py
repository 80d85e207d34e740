"""Tables of a sweep: one a benchmark and metric; rows are method and LoRA or D2LoRA, columns n."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from d2lora.report.compare import Comparison, comparisons, verdict
from d2lora.report.looks import METHODS
from d2lora.report.points import Point, differing, size
from d2lora.settings import amount


@dataclass
class Line:
    """A row: one method and arm, its points by n."""

    label: str
    method: str
    m: int | str
    points: dict[int | str, Point]


@dataclass
class Table:
    """One benchmark in one metric."""

    title: str
    points: list[Point]
    columns: list[int | str]
    lines: list[Line]

    @cached_property
    def pairs(self) -> dict[Point, Comparison]:
        """The comparison of each D2LoRA point that has one."""
        return comparisons(self.points)

    @property
    def verdict(self) -> str:
        return verdict(self.pairs.values())

    @property
    def marked(self) -> bool:
        return any(c.beyond_chance for c in self.pairs.values())

    @property
    def unique_pairs(self) -> list[Comparison]:
        return list(dict.fromkeys(self.pairs.values()))


def build(points: Iterable[Point]) -> list[Table]:
    """One table a benchmark and metric."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.benchmark, point.metric), []).append(point)
    return [_table(benchmark, metric, group) for (benchmark, metric), group in groups.items()]


def _table(benchmark: str, metric: str, points: list[Point]) -> Table:
    labels = differing(points)
    lines: dict[tuple, Line] = {}
    for point in points:
        shown = [getattr(point, k) for k in labels]
        label = " ".join([point.method.upper(), point.arm, *filter(None, shown)])
        order = (METHODS.index(point.method), size(point.m), label)
        lines.setdefault(order, Line(label, point.method, point.m, {})).points[point.n] = point
    ordered = [lines[order] for order in sorted(lines)]
    _fill_in_the_base(ordered)
    columns = sorted({p.n for p in points}, key=size)
    title = f"{benchmark}: {metric or 'no result yet'} in %"
    return Table(title, points, columns, ordered)


def _fill_in_the_base(lines: list[Line]) -> None:
    """The base is one cell for all initializations and recipes: it stands in each row of LoRA that starts from it."""
    bases = {(p.model, p.task, p.method): p for line in lines for p in line.points.values() if p.is_base}
    for line in lines:
        first = next(iter(line.points.values()))
        base = bases.get((first.model, first.task, first.method))
        if line.m == 0 and base and not first.own_base:
            line.points.setdefault(0, base)


def column_name(table: Table, n: int | str) -> str:
    """n=1k; n=all with the number of samples that its records have."""
    samples = sorted({p.samples for p in table.points if p.n == n and p.samples is not None})
    true = f" ({', '.join(f'{s:,}' for s in samples)})" if n == "all" and samples else ""
    return f"n={amount(n)}{true}"
