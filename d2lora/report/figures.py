"""Curves over n with the 95 % interval as a band, as wide as a paper's column; the paper's own curve is dashed."""

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2lora import plan
from d2lora.report import paper
from d2lora.report.paper import Artefact
from d2lora.report.rows import Point, size
from d2lora.report.tables import METHODS, Table

WIDTH, HEIGHT = 3.3, 2.2  # inches: a column of a two-column paper; each panel's height
# Okabe and Ito's, told apart by everyone; in grey by lightness, markers and line styles.
COLOURS = {"sft": "#0072b2", "dpo": "#d55e00", "orpo": "#009e73"}
MARKS = {"sft": "o", "dpo": "s", "orpo": "^"}
LORA, D2LORA = "#e69f00", ("#00468b", "#56b4e9", "#cc79a7", "#009e73")
_ARM_MARKS = ("s", "^", "D", "v")
_LINES = (
    "-",
    "-.",
    (0, (1, 1)),
    (0, (3, 1, 1, 1, 1, 1)),
)  # for what colour and marker don't tell apart; dashes are the paper's


@dataclass
class Curve:
    """A line of a table with its place on the x axis: (n, point); `paper` are the paper's (n, value)."""

    label: str
    method: str
    m: int | str
    points: list[tuple[int, Point]]
    paper: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Panel:
    title: str
    unit: str
    curves: list[Curve]
    arms: bool  # told apart by arm (one method), else by method


def panels(table: Table, panel: str) -> list[Panel]:
    """A table's lines as panels: one a method, or all in one. No panel without two sizes n in a curve."""
    unit = table.points[0].metric + " in %"
    groups = {"": table.lines} if panel == "all" else {m: [x for x in table.lines if x.method == m] for m in METHODS}
    found = []
    for method, lines in groups.items():
        curves = [_curve(line.label, line.method, line.m, line.points.values()) for line in lines]
        if any(len(c.points) > 1 for c in curves):
            title = f"{method.upper()} on {table.points[0].benchmark}" if method else table.points[0].benchmark
            found.append(Panel(title, unit, curves, panel == "method"))
    return found


def _curve(label: str, method: str, m: int | str, points: Iterable[Point]) -> Curve:
    placed = [(p.samples if p.n == "all" else p.n, p) for p in sorted(points, key=lambda p: size(p.n))]
    known = [(x, p) for x, p in placed if isinstance(x, int)]
    theirs = [(x, value) for x, p in known if (value := paper.value(p)) is not None]
    return Curve(label, method, m, [(x, p) for x, p in known if p.scores], theirs)


def of(artefact: Artefact, tables: list[Table]) -> list[Panel]:
    return [panel for table in tables for panel in panels(table, artefact.panel)]


def draw(found: list[Panel], stem: Path) -> list[Path]:
    """Draw panels, one below the other, to stem.png, .svg and .pdf; the files, none without panels."""
    return save(stem, functools.partial(_figure, found)) if found else []


def save(stem: Path, make: Callable[[Any], Any]) -> list[Path]:
    """Write the figure that make(pyplot) draws, in the report's style, to stem.png, .svg and .pdf; the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict = {
        "font.size": 8,
        "axes.titlesize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
    }
    with matplotlib.rc_context(style | {"svg.hashsalt": stem.name, "pdf.fonttype": 42}):
        figure = make(pyplot)
        stem.parent.mkdir(parents=True, exist_ok=True)
        files = [stem.with_suffix(suffix) for suffix in (".png", ".svg", ".pdf")]
        for file in files:
            dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(file.suffix, {})
            figure.savefig(file, dpi=200, metadata=dated)  # no dates: the same records give the same files
        pyplot.close(figure)
    return files


def _figure(found: list[Panel], pyplot):
    labels = list(dict.fromkeys(label for panel in found for c in panel.curves for label in _labels(c, panel)))
    rows = (len(labels) + 1) // 2
    size_ = (WIDTH, HEIGHT * len(found) + 0.15 * rows)
    figure, axes = pyplot.subplots(len(found), 1, figsize=size_, squeeze=False, layout="constrained")
    handles: dict = {}
    for axis, panel in zip(axes[:, 0], found, strict=True):
        _draw_panel(axis, panel)
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axes[-1, 0].set_xlabel("task samples n")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_panel(axis, panel: Panel) -> None:
    for curve in panel.curves:
        _draw_curve(axis, curve, panel)
    ticks = sorted({x for c in panel.curves for x, _ in c.points})
    axis.set(title=panel.title, ylabel=panel.unit)
    axis.set_xticks(ticks, [plan.amount(x) for x in ticks], rotation=45 if _crowded(ticks) else 0)
    axis.grid(alpha=0.3, linewidth=0.5)


def _crowded(ticks: list[int]) -> bool:
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    return bool(gaps) and min(gaps) < (ticks[-1] - ticks[0]) / 12


def _labels(curve: Curve, panel: Panel) -> list[str]:
    """A curve's name in the legend, and that of the paper's; where panels are methods, without the method."""
    label = curve.label.removeprefix(f"{curve.method.upper()} ") if panel.arms else curve.label
    return [label, f"{label}, paper"] if curve.paper else [label]


def _draw_curve(axis, curve: Curve, panel: Panel) -> None:
    style = _style(curve, panel)
    colour = style["color"]
    x = [x for x, _ in curve.points]
    scored = [
        (p.value or 0.0, *(p.interval or (0.0, 0.0))) for _, p in curve.points
    ]  # those without are not in a curve
    y, low, high = ([100 * row[i] for row in scored] for i in range(3))
    label, *theirs = _labels(curve, panel)
    axis.plot(x, y, label=label, **style)
    band = 0.14 if panel.arms else 0.08
    axis.fill_between(x, low, high, color=colour, alpha=band, linewidth=0)
    if curve.paper:
        x, y = ([x for x, _ in curve.paper], [100 * v for _, v in curve.paper])
        axis.plot(
            x, y, color=colour, linestyle="--", linewidth=0.9, marker=style["marker"], markersize=2, label=theirs[0]
        )


def _style(curve: Curve, panel: Panel) -> dict:
    """Colour and marker tell arms or methods apart, open markers LoRA, lines whatever else there is (m, models)."""
    lora = curve.m == 0
    alike = [c for c in panel.curves if (c.method, c.m == 0) == (curve.method, lora)]
    rank = alike.index(curve) % len(_LINES)
    style = {"markersize": 3.5, "linewidth": 1.2, "linestyle": _LINES[rank]}
    if panel.arms:
        style |= {"color": LORA if lora else D2LORA[rank], "marker": "o" if lora else _ARM_MARKS[rank]}
    else:
        style |= {"color": COLOURS[curve.method], "marker": MARKS[curve.method]}
        if lora and len(panel.curves) > len([c for c in panel.curves if c.m == 0]) and not rank:
            style["linestyle"] = ":"
    return style | ({"markerfacecolor": "white"} if lora else {})
