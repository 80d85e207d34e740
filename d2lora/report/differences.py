"""D2LoRA minus LoRA over n, or another setting: what the overlapping bands of their curves hide, with the margin of equivalence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2lora.report import figures
from d2lora.report.axes import LABELS
from d2lora.report.compare import Comparison
from d2lora.report.looks import COLOURS, MARKS, METHODS, NAMES
from d2lora.report.points import Point, differing, label_texts
from d2lora.report.tables import Line, Table
from d2lora.settings import amount

_APART = 3.0  # points between the markers of methods at one x


@dataclass
class Curve:
    """The comparisons of one method in order of x, each with its D2LoRA point."""

    method: str
    points: list[tuple[float, Point, Comparison]]

    @property
    def label(self) -> str:
        return NAMES[self.method]


@dataclass
class Panel:
    """One benchmark, metric and D2LoRA arm; `margin` is in points."""

    title: str
    unit: str
    curves: list[Curve]
    margin: float
    x: str  # the setting on the x axis
    even: bool = True  # values of x one apart: at 100, 200 and 10,000 samples differences are to be read equally well

    @property
    def xs(self) -> list[float]:
        """Return where points are on the x axis, in order."""
        return sorted({x for curve in self.curves for x, *_ in curve.points})


def panels(table: Table) -> list[Panel]:
    """Return a panel for each D2LoRA arm that is compared with LoRA; none where columns have no place on an axis."""
    groups: dict[tuple[object, ...], list[Curve]] = {}
    for line in table.lines:
        curve = _curve(line, table)
        if curve.points:
            groups.setdefault(_arm(curve.points[-1][1], table.column), []).append(curve)
    heads = [curves[0].points[-1][1] for curves in groups.values()]
    keys = [key for key in differing(heads) if key != table.column]
    several = {key for key in ("m", "n") if key != table.column and len({getattr(p, key) for p in heads}) > 1}
    return [
        Panel(_title(head, keys, several), f"{head.metric}: D2LoRA - LoRA in points", _ordered(curves), table.margin, table.column)
        for head, curves in zip(heads, groups.values(), strict=True)
    ]  # fmt: skip


def _curve(line: Line, table: Table) -> Curve:
    compared = [(figures.x_of(table.column, value, p), p) for value, p in line.points.items() if p in table.pairs]
    points = [(x, p, table.pairs[p]) for x, p in compared if x is not None]
    return Curve(line.method, sorted(points, key=lambda point: point[0]))


def _arm(point: Point, column: str) -> tuple[object, ...]:
    """Return what tells a panel from another: all but the method and what is on the x axis."""
    names = (getattr(point, key) for key in (*LABELS, "m", "n") if key != column)
    return (*names, *sorted((key, value) for key, value in point.axes.items() if key != column))


def _title(head: Point, keys: list[str], several: set[str]) -> str:
    shape = [head.arm] * ("m" in several) + [f"n={amount(head.n)}"] * ("n" in several)
    return ", ".join(filter(None, [head.benchmark, *label_texts(head, keys), *shape]))


def _ordered(curves: list[Curve]) -> list[Curve]:
    return sorted(curves, key=lambda curve: METHODS.index(curve.method))


def draw_panel(axis: Any, panel: Panel) -> None:
    """Draw a panel on matplotlib's axis: the margin shaded, a line at zero, each method's differences with 95 % intervals."""
    axis.axhspan(-panel.margin, panel.margin, color="#888888", alpha=0.18, linewidth=0, label=margin_label(panel))
    axis.axhline(0, color="black", linewidth=0.8)
    for curve, shift in zip(panel.curves, shifts(panel.curves, _APART), strict=True):
        _draw_curve(axis, curve, dict(zip(panel.xs, figures.positions(panel), strict=True)), shift)
    axis.margins(x=0.06)  # room for what stands beside its x
    axis.autoscale_view()


def margin_label(panel: Panel) -> str:
    """Return what the shaded band is."""
    return f"within ± {panel.margin:g} point{'s'[: panel.margin != 1]}"


def shifts(curves: Sequence[Curve], apart: float) -> list[float]:
    """Return how far each curve stands to the right of its x, so that intervals do not cover each other."""
    return [apart * (i - (len(curves) - 1) / 2) for i in range(len(curves))]


def _draw_curve(axis: Any, curve: Curve, positions: dict[float, float], shift: float) -> None:
    from matplotlib.transforms import offset_copy

    x = [positions[x] for x, *_ in curve.points]
    middle, low, high = ([100 * value for value in values] for values in zip(*(
        (c.difference, *c.interval) for *_, c in curve.points), strict=True))  # fmt: skip
    below, above = ([abs(a - b) for a, b in zip(middle, ends, strict=True)] for ends in (low, high))
    colour = COLOURS[curve.method]
    axis.update_datalim([*zip(x, low, strict=True), *zip(x, high, strict=True)])  # what is moved does not count
    moved = offset_copy(axis.transData, axis.figure, x=shift, units="points")
    axis.errorbar(
        x, middle, yerr=[below, above], label=curve.label, color=colour, marker=MARKS[curve.method], markersize=3.5,
        linewidth=0.7, elinewidth=1, capsize=1.5, transform=moved,
    )  # fmt: skip
