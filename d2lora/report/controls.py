"""Compare D2LoRA with its control arms, each of which leaves out one thing that its gain could come from."""

from collections.abc import Iterable
from dataclasses import dataclass

from d2lora.report import formats
from d2lora.report.compare import (
    ALPHA,
    Comparison,
    adjust,
    compared,
    count_beyond_chance,
    counterpart,
    points_by_identity,
)
from d2lora.report.content import Content, Group, Sweep, of_groups
from d2lora.report.looks import NAMES
from d2lora.report.points import Point, by_benchmark, differing, label_texts
from d2lora.report.verdict import cells_text
from d2lora.scoring import unit_of
from d2lora.scoring.kinds import PERCENT
from d2lora.settings import Report, amount
from d2lora.settings.controls import CONTROL_NAMES, NO_CONTROL, control_of

CAPTION = "D2LoRA against its control arms: differences on the same items"
_HEAD = ["D2LoRA - control", "rules out", "benchmark", *formats.COMPARISON_HEAD, "decision"]


@dataclass(frozen=True)
class Against:
    """A D2LoRA point with its comparisons (D2LoRA minus control), by the control's name."""

    point: Point
    comparisons: dict[str, Comparison]

    @property
    def best(self) -> Comparison:
        """Return the comparison with the control that scores highest."""
        return max(self.comparisons.values(), key=lambda c: c.lora.value or 0.0)


def against(points: Iterable[Point], margin: float = PERCENT.margin) -> list[Against]:
    """Return what is compared, of one benchmark and metric; Holm's correction is over all of it.

    `margin` is that of equivalence, in the metric's unit.
    """
    points = list(points)
    by_identity = points_by_identity(points)
    names = [name for name in CONTROL_NAMES if name != NO_CONTROL]
    all_against = []
    for point in points:
        if point.m == 0 or point.control != NO_CONTROL:
            continue
        others = {name: counterpart(by_identity, point, point.init, point.m, name) for name in names}
        own = {name: c for name, other in others.items() if other and (c := compared(other, point, margin))}
        if own:
            all_against.append(Against(point, own))
    adjust([c for a in all_against for c in a.comparisons.values()])
    return all_against


def verdict(all_against: list[Against]) -> str:
    """Say how often D2LoRA beats the best of its controls; empty without any."""
    if not all_against:
        return ""
    best = [a.best for a in all_against]
    ahead, behind = ([c for c in best if sign * c.difference > 0] for sign in (1, -1))
    names = [name for name in CONTROL_NAMES if any(name in a.comparisons for a in all_against)]
    tests = sum(len(a.comparisons) for a in all_against)
    return (
        f"D2LoRA beats its best control ({', '.join(names)}) in {len(ahead)} of {cells_text(len(best))}; beyond "
        f"chance in {count_beyond_chance(ahead)} (Holm over {tests} comparisons, alpha {100 * ALPHA:.0f} %). "
        f"The best control beats D2LoRA in {len(behind)}; beyond chance in {count_beyond_chance(behind)}."
    )


def content(sweep: Sweep) -> Content | None:
    """Return a row for each comparison with a control arm, and the sentence that sums them up; None without any."""
    labels, groups = differing(sweep.points), by_benchmark(sweep.points)
    return of_groups(_HEAD, [_group(name, points, sweep.settings, labels) for name, points in groups.items()])


def _group(benchmark: str, points: list[Point], settings: Report, labels: list[str]) -> Group:
    all_against = against(points, settings.margin_of(unit_of(points[0].metric)))
    rows = [
        (a.point, _row(a.point, name, c, benchmark, labels)) for a in all_against for name, c in a.comparisons.items()
    ]
    return Group(benchmark, rows, verdict(all_against))


def _row(point: Point, name: str, c: Comparison, benchmark: str, labels: list[str]) -> list[str]:
    control = control_of(name)
    sizes = control.label.format(m=amount(point.m), n=amount(point.n))
    label = " ".join([NAMES[point.method], "-", sizes, *label_texts(point, labels)])
    return [label, control.rules_out, benchmark, *formats.comparison_texts(c), c.decision]
