"""Draw comparisons as a forest: a row for each arm, its difference with the 95 % interval, the margin of equivalence shaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2lora.report import figures
from d2lora.report.compare import Comparison
from d2lora.report.looks import COLOURS, MARKS

_ROW, _BETWEEN = 0.1, 0.08  # inches: a marker's row, and what parts the rows of the figure


@dataclass(frozen=True)
class Entry:
    """A comparison in a row of the figure; `label` is its marker's in the legend."""

    row: str
    label: str
    comparison: Comparison

    @property
    def look(self) -> dict[str, Any]:
        """Return the marker's style: its method's, open without a warm-up."""
        point = self.comparison.d2lora
        style = {"color": COLOURS[point.method], "marker": MARKS[point.method]}
        return style | ({"markerfacecolor": "white"} if point.m == 0 else {})


@dataclass(frozen=True)
class Panel:
    title: str
    entries: list[Entry]


def draw(panels: Sequence[Sequence[Panel]], against: str, pyplot: Any) -> Any:
    """Return a figure of rows of panels, those of a row with one scale; the differences are to `against`."""
    entries = [entry for row in panels for panel in row for entry in panel.entries]
    rows, labels = (list(dict.fromkeys(getattr(e, name) for e in entries)) for name in ("row", "label"))
    height = len(rows) * (len(labels) * _ROW + _BETWEEN) + 0.45
    columns = max(map(len, panels))
    figure, axes = pyplot.subplots(
        len(panels), columns, squeeze=False, sharey=True, sharex="row", layout="constrained",
        figsize=((1 + columns) * figures.WIDTH * 0.8, height * len(panels) + 0.5),
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        axis.set_visible(False)
    for own, line in zip(axes, panels, strict=True):
        for axis, panel in zip(own, line, strict=False):
            axis.set_visible(True)
            _draw_panel(axis, panel, rows, labels)
            unit = panel.entries[0].comparison.unit.several if panel.entries else ""
            axis.set_xlabel(f"difference to {against} in {unit}" if line is panels[-1] or unit != "points" else "")
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_panel(axis: Any, panel: Panel, rows: list[str], labels: list[str]) -> None:
    axis.axvline(0, color="black", linewidth=0.8)
    for c in [entry.comparison for entry in panel.entries][:1]:
        margin = 100 * c.margin
        within = f"within ± {c.unit.text(round(margin, 9))}"
        axis.axvspan(-margin, margin, color="#888888", alpha=0.18, linewidth=0, label=within)
    for number, label in enumerate(labels):
        shift = (number - (len(labels) - 1) / 2) * _ROW / (len(labels) * _ROW + _BETWEEN)
        _draw_series(axis, [e for e in panel.entries if e.label == label], {r: i + shift for i, r in enumerate(rows)})
    axis.set(title=panel.title)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3, linewidth=0.5)
    for between in range(1, len(rows)):
        axis.axhline(between - 0.5, color="#888888", linewidth=0.3, alpha=0.5)


def _draw_series(axis: Any, entries: list[Entry], places: dict[str, float]) -> None:
    """Draw the markers of one label, each with its interval."""
    if not entries:
        return
    middle, low, high = (
        [100 * x for x in values]
        for values in zip(*((e.comparison.difference, *e.comparison.interval) for e in entries), strict=True)
    )
    ends = [[abs(a - b) for a, b in zip(middle, side, strict=True)] for side in (low, high)]
    axis.errorbar(
        middle, [places[e.row] for e in entries], xerr=ends, label=entries[0].label, linestyle="none", markersize=3.5,
        elinewidth=0.8, **entries[0].look,
    )  # fmt: skip
