"""D2LoRA against its control arms: what would its gain be without what each of them leaves out?"""

from collections.abc import Iterable
from dataclasses import dataclass

from d2lora.report import formats
from d2lora.report.compare import ALPHA, Comparison, adjust, compared, counterpart, points_by_identity
from d2lora.report.content import Content, Rows, Sweep
from d2lora.report.looks import NAMES
from d2lora.report.points import Point, by_benchmark, differing, label_texts
from d2lora.settings import amount
from d2lora.settings.controls import CONTROL_NAMES, NO_CONTROL, control_of

CAPTION = "D2LoRA against its control arms: differences in points on the same items"
_HEAD = ["D2LoRA - control", "rules out", "benchmark", "difference", "95 % interval", "p", "p (Holm)", "decision"]


@dataclass(frozen=True)
class Against:
    """A D2LoRA point with its comparisons (D2LoRA minus control), by the control's name."""

    point: Point
    comparisons: dict[str, Comparison]

    @property
    def best(self) -> Comparison:
        """Return the comparison with the control that scores highest."""
        return max(self.comparisons.values(), key=lambda c: c.lora.value or 0.0)


def against(points: Iterable[Point]) -> list[Against]:
    """Return what is compared, of one benchmark and metric; Holm's correction is over all of it."""
    points = list(points)
    by_identity = points_by_identity(points)
    names = [name for name in CONTROL_NAMES if name != NO_CONTROL]
    all_against = []
    for point in points:
        if point.m == 0 or point.control != NO_CONTROL:
            continue
        others = {name: counterpart(by_identity, point, point.init, point.m, name) for name in names}
        own = {name: c for name, other in others.items() if other and (c := compared(other, point))}
        if own:
            all_against.append(Against(point, own))
    adjust([c for each in all_against for c in each.comparisons.values()])
    return all_against


def verdict(all_against: list[Against]) -> str:
    """Say how often D2LoRA beats the best of its controls; empty without any."""
    if not all_against:
        return ""
    best = [each.best for each in all_against]
    ahead, behind = ([c for c in best if sign * c.difference > 0] for sign in (1, -1))
    names = [name for name in CONTROL_NAMES if any(name in each.comparisons for each in all_against)]
    tests = sum(len(each.comparisons) for each in all_against)
    beyond = lambda comparisons: sum(c.beyond_chance for c in comparisons)  # noqa: E731
    return (
        f"D2LoRA beats its best control ({', '.join(names)}) in {len(ahead)} of {len(best)} cell{'s'[: len(best) != 1]}; beyond "
        f"chance in {beyond(ahead)} (Holm over {tests} comparisons, alpha {100 * ALPHA:.0f} %). "
        f"The best control beats D2LoRA in {len(behind)}; beyond chance in {beyond(behind)}."
    )


def content(sweep: Sweep) -> Content | None:
    """Return a row for each comparison with a control arm, and the sentence that sums them up; None without any."""
    labels = differing(sweep.points)
    rows: list[list[str]] = []
    shows: list[dict[str, int | str]] = []
    notes = []
    for benchmark, points in by_benchmark(sweep.points).items():
        all_against = against(points)
        if sentence := verdict(all_against):
            notes.append(f"{benchmark}: {sentence}")
        for each in all_against:
            rows += [_row(each.point, name, c, benchmark, labels) for name, c in each.comparisons.items()]
            filtered = {k: getattr(each.point, k) for k in ("model", "task", "method", "m")}
            shows += [filtered] * len(each.comparisons)
    return Content(rows=Rows(_HEAD, rows, shows), notes=notes) if rows else None


def _row(point: Point, name: str, c: Comparison, benchmark: str, labels: list[str]) -> list[str]:
    control = control_of(name)
    sizes = control.label.format(m=amount(point.m), n=amount(point.n))
    label = " ".join([NAMES[point.method], "-", sizes, *label_texts(point, labels)])
    difference = formats.percent(c.difference, sign="+") + "*" * c.beyond_chance
    p = [formats.p_text(value) for value in (c.p, c.adjusted)]
    return [label, control.rules_out, benchmark, difference, formats.bounds(c.interval, "+"), *p, c.decision]
