"""Draw curves over n, or over another setting, with the 95 % interval as a band and the paper's own curve dashed."""

import functools
import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from d2lora.outputs import whole_file
from d2lora.report import paper
from d2lora.report.axes import RATE, compatible, number, short_name
from d2lora.report.looks import COLOURS, MARKS, METHODS, NAMES
from d2lora.report.paper import Artefact
from d2lora.report.points import Point, differing, label_texts, size
from d2lora.report.tables import Line, Table, Value
from d2lora.scoring import unit_of
from d2lora.settings import amount

WIDTH, HEIGHT = 3.3, 2.2  # inches: a column of a two-column paper; each panel's height
LORA, D2LORA = "#e69f00", "#00468b"
_SHARED = ("model", "task", "init", "recipe")  # by a D2LoRA and the LoRA that it is compared with
_AXIS_LABELS = {"n": "task samples n", "m": "general samples m", RATE: "learning rate"}
_WIDE = 4  # from a fourfold range on, a setting other than n has a logarithmic axis
TALLEST = 6  # panels in a column of a figure


@dataclass
class Curve:
    """A row of a table as points (x, point), x being n or another setting; `paper` has the paper's (n, value)."""

    label: str
    method: str
    m: int | str
    points: list[tuple[float, Point]]
    paper: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Panel:
    title: str
    unit: str
    curves: list[Curve]
    arms: bool  # told apart by arm (one method), else by method
    x: str = "n"  # the setting on the x axis
    even: bool = False  # whether points are one apart there, whatever their values

    @property
    def xs(self) -> list[float]:
        """Return where points are on the x axis, in order."""
        return sorted({x for curve in self.curves for x, _ in curve.points})


class Placed(Protocol):
    """A panel of whatever is drawn over a setting."""

    title: str
    unit: str
    x: str
    even: bool

    @property
    def xs(self) -> list[float]: ...


_P = TypeVar("_P", bound=Placed)


def panels(table: Table, panel: str) -> list[Panel]:
    """Return a table's lines as panels: of one method each, or of all. No panel without two points in a curve.

    A panel has one D2LoRA and the LoRA that it is compared with, for more could not be told apart. What the panels differ
    in (models, initializations, warm-up sets, m, rates ...) is in their titles.
    """
    if not all(x_of(table.column, value, None) is not None for value in table.columns if value != "all"):
        return []
    groups = _beside_each_other(table.lines, table.column)
    heads = [max(group, key=lambda line: size(line.m)).first for group in groups]
    arms = len({p.arm for p in heads} - {"LoRA"}) > 1 and table.column != "m"
    sizes = table.column != "n" and len({p.n for p in heads}) > 1
    keys = [k for k in differing(heads) if k != table.column]
    drawn = []
    for head, group in zip(heads, groups, strict=True):
        for methods in [METHODS] if panel == "all" else [(m,) for m in METHODS]:
            curves = [_curve(line, table.column, short=arms) for line in group if line.method in methods]
            if any(len({p for _, p in c.points}) > 1 for c in curves):  # a point that stands in each column is no curve
                name = f"{NAMES[methods[0]]} on {head.benchmark}" if panel == "method" else head.benchmark
                what = [*label_texts(head, keys), head.arm if arms else "", f"n={amount(head.n)}" if sizes else ""]
                title = ", ".join(filter(None, [name, *what]))
                drawn.append(
                    Panel(
                        title, f"{head.metric} in {unit_of(head.metric).name}", curves, panel == "method", table.column
                    )
                )
    return drawn


def x_of(column: str, value: Value, point: Point | None) -> float | None:
    """Return where a column stands on the x axis; None for what is no number. n = all is where its records say."""
    if column == "n" and value == "all":
        return point.samples if point else None
    return number(str(value))


def _beside_each_other(lines: list[Line], column: str) -> list[list[Line]]:
    """Return lines by what one panel shows: a D2LoRA and its LoRA, or LoRA alone where there is no D2LoRA."""
    arms = {tuple(_what(x.first, column)): x for x in lines}
    groups = [[x for x in lines if _is_beside(x, head, column)] for head in arms.values()]
    return [g for g in groups if not any(len(g) < len(other) and all(x in other for x in g) for other in groups)]


def _what(point: Point, column: str) -> list[object]:
    """Return what tells one panel from another, except methods."""
    others = sorted((k, v) for k, v in point.axes.items() if k != column)
    return [
        *(getattr(point, k) for k in (*_SHARED, "warmup", "m", "control")),
        *([point.n] if column != "n" else []),
        *others,
    ]


def _is_beside(line: Line, head: Line, column: str) -> bool:
    """Tell whether a line belongs into the panel of `head`. LoRA has no warm-up set, unless its initialization uses
    one.
    """
    point, of_head = line.first, head.first
    same = all(getattr(point, k) == getattr(of_head, k) for k in _SHARED) and (column == "n" or point.n == of_head.n)
    others = {k: v for k, v in point.axes.items() if k != column}
    same = same and (point.m == 0 or (point.m, point.control) == (of_head.m, of_head.control))
    return same and point.warmup in ("", of_head.warmup) and compatible(others, of_head.axes)


def _curve(line: Line, column: str, short: bool) -> Curve:
    """Return a line as a curve; with a short name where the panel's title has the m."""
    at = [(x_of(column, value, p), p) for value, p in line.points.items()]
    known = sorted(((x, p) for x, p in at if x is not None), key=lambda pair: pair[0])
    of_paper = [(x, value) for x, p in known if column == "n" and (value := paper.value(p)) is not None]
    arm = "" if column == "m" else line.first.arm.split("(")[0] if short and line.m != 0 else line.first.arm
    label = f"{NAMES[line.method]} {arm}".strip()
    return Curve(label, line.method, line.m, [(x, p) for x, p in known if p.scores], of_paper)


def of(artefact: Artefact, tables: list[Table]) -> list[Panel]:
    """Return the panels of one of the paper's figures."""
    return [panel for table in tables for panel in panels(table, artefact.panel)]


def draw(drawn: list[Panel], stem: Path) -> list[Path]:
    """Draw panels below each other to stem.png, .svg and .pdf. Return the files: none without panels."""
    return save(stem, functools.partial(curves, drawn)) if drawn else []


def save(stem: Path, make: Callable[[Any], Any]) -> list[Path]:
    """Write the figure that make(pyplot) draws, in the report's style, to stem.png, .svg and .pdf. Returns the files."""
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
            with whole_file(file) as temporary:
                figure.savefig(temporary, dpi=200, metadata=dated)  # no dates: the same records give the same files
            figure.set_layout_engine(None)  # the first file's layout serves all: it takes as long as the drawing
        pyplot.close(figure)
    return files


def curves(drawn: list[Panel], pyplot: Any) -> Any:
    """Return a figure of panels of curves, below each other."""
    return stacked(drawn, _draw_curves, pyplot)


def stacked(drawn: Sequence[_P], draw_panel: Callable[[Any, _P], None], pyplot: Any) -> Any:
    """Return a figure of panels, one below the other, with one legend for all; draw_panel(axis, panel) draws their curves."""
    columns = -(-len(drawn) // TALLEST)
    rows = -(-len(drawn) // columns)
    figure, axes = pyplot.subplots(rows, columns, squeeze=False, layout="constrained")
    handles: dict = {}
    for axis in axes.flat[len(drawn) :]:
        axis.remove()
    for index, (axis, panel) in enumerate(zip(axes.flat, drawn, strict=False)):
        draw_panel(axis, panel)
        _dress(axis, panel)
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        if index + columns >= len(drawn):  # the last of its column
            axis.set_xlabel(x_label(panel))
    figure.set_size_inches(WIDTH * columns, HEIGHT * rows + 0.15 * ((len(handles) + 1) // 2))
    figure.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        columnspacing=1,
        handlelength=1.8,
        handletextpad=0.5,
    )
    return figure


def _draw_curves(axis: Any, panel: Panel) -> None:
    for curve in panel.curves:
        _draw_curve(axis, curve, panel)


def _dress(axis: Any, panel: Placed) -> None:
    """Give an axis its title, labels, scale and ticks."""
    ticks = positions(panel)
    axis.set(title=textwrap.fill(panel.title, 44, break_on_hyphens=False), ylabel=panel.unit)
    if spread := is_logarithmic(panel):
        axis.set_xscale("log")
        axis.minorticks_off()
    crowded = _crowded([math.log(x) for x in ticks] if spread else ticks)
    axis.set_xticks(ticks, [tick(x) for x in panel.xs], rotation=45 if crowded else 0)
    axis.grid(alpha=0.3, linewidth=0.5)


def positions(panel: Placed) -> list[float]:
    """Return where the panel's values of x stand on its axis."""
    return [float(i) for i in range(len(panel.xs))] if panel.even else panel.xs


def x_label(panel: Placed) -> str:
    """Return what is on the x axis."""
    return _AXIS_LABELS.get(panel.x, short_name(panel.x))


def is_logarithmic(panel: Placed) -> bool:
    """Tell whether the x axis is logarithmic: that of n never is."""
    return not panel.even and panel.x != "n" and panel.xs[0] > 0 and panel.xs[-1] >= _WIDE * panel.xs[0]


def tick(x: float) -> str:
    """Return a value of the x axis as its tick has it."""
    return amount(int(x)) if x == int(x) else f"{x:g}"


def _crowded(ticks: Sequence[float]) -> bool:
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    return bool(gaps) and min(gaps) < (ticks[-1] - ticks[0]) / 12


def _label(curve: Curve, panel: Panel) -> str:
    """Return a curve's name in the legend; without the method if each panel is a method."""
    return curve.label.removeprefix(f"{NAMES[curve.method]} ") if panel.arms else curve.label


def _draw_curve(axis: Any, curve: Curve, panel: Panel) -> None:
    style, label = _style(curve, panel), _label(curve, panel)
    x = [x for x, _ in curve.points]
    # Points without a score are in no curve.
    scored = [(p.value or 0.0, *(p.interval or (0.0, 0.0))) for _, p in curve.points]
    y, low, high = ([100 * row[i] for row in scored] for i in range(3))
    axis.plot(x, y, label=label, **style)
    band = 0.14 if panel.arms else 0.08
    axis.fill_between(x, low, high, color=style["color"], alpha=band, linewidth=0)
    if curve.paper:
        x, y = ([x for x, _ in curve.paper], [100 * v for _, v in curve.paper])
        axis.plot(x, y, label=f"{label}, paper", **style | {"linestyle": "--", "linewidth": 0.9, "markersize": 2.2})


def look(curve: Curve, panel: Panel) -> tuple[str, str]:
    """Return a curve's colour and marker (matplotlib's letter): of its arm, or of its method where the panel has several."""
    if panel.arms:
        return (LORA, "o") if curve.m == 0 else (D2LORA, "s")
    return COLOURS[curve.method], MARKS[curve.method]


def _style(curve: Curve, panel: Panel) -> dict[str, Any]:
    """Return a curve's style: colour and marker by arm or method; LoRA's markers are open, and its line dotted if
    methods share a panel.
    """
    lora = curve.m == 0
    style: dict = {"markersize": 3.5, "linewidth": 1.2}
    style["color"], style["marker"] = look(curve, panel)
    if not panel.arms and lora and any(c.m != 0 for c in panel.curves):
        style["linestyle"] = ":"
    return style | ({"markerfacecolor": "white"} if lora else {})
