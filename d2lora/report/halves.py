"""Compare two halves of each arm's replicates: there is nothing to find, so differences beyond chance speak against the instrument."""

from collections.abc import Iterable

from d2lora.report import formats
from d2lora.report.compare import ALPHA, Comparison, adjust, halved
from d2lora.report.content import Content, Rows, Sweep
from d2lora.report.looks import NAMES
from d2lora.report.points import Point, by_benchmark, differing, label_texts
from d2lora.settings import amount

CAPTION = "A/A: one half of an arm's replicates against the other, on the same items"
_HEAD = ["arm", "halves", "benchmark", "difference", "95 % interval", "p", "p (Holm)"]

Halves = list[tuple[Point, Comparison]]


def halves(points: Iterable[Point]) -> Halves:
    """Return the points of one benchmark and metric that have four or more replicates, with the comparison of their halves.

    Points with the same evaluations (at n = 0) are one. Holm's correction is over all of them.
    """
    distinct: dict[frozenset[str], tuple[Point, Comparison]] = {}
    for point in points:
        if comparison := halved(point):
            distinct.setdefault(frozenset(run.evaluate for run in point.runs.values()), (point, comparison))
    adjust([comparison for _, comparison in distinct.values()])
    return list(distinct.values())


def verdict(compared: Halves) -> str:
    """Say how many arms have halves that differ beyond chance; empty without any."""
    if not compared:
        return ""
    beyond = sum(comparison.beyond_chance for _, comparison in compared)
    arms = f"{len(compared)} arms" if len(compared) > 1 else "one arm"
    return f"A/A: of {arms} halves differ beyond chance in {beyond} (Holm, alpha {100 * ALPHA:.0f} %)."


def content(sweep: Sweep) -> Content | None:
    """Return a row for each arm with four or more replicates, and a sentence for each benchmark; None without any."""
    labels = differing(sweep.points)
    rows: list[list[str]] = []
    shows: list[dict[str, int | str]] = []
    sentences = []
    for benchmark, points in by_benchmark(sweep.points).items():
        compared = halves(points)
        if sentence := verdict(compared):
            sentences.append(f"{benchmark}: {sentence}")
        rows += [_row(point, comparison, benchmark, labels) for point, comparison in compared]
        shows += [{k: getattr(p, k) for k in ("model", "task", "method", "m")} for p, _ in compared]
    return Content(rows=Rows(_HEAD, rows, shows), sentences=sentences) if rows else None


def _row(point: Point, c: Comparison, benchmark: str, labels: list[str]) -> list[str]:
    n = amount(point.n)
    sizes = point.arm_label.format(m=amount(point.m), n=n) if point.m else f"LoRA n={n}"
    arm = " ".join([NAMES[point.method], sizes, *label_texts(point, labels)])
    first, second = (", ".join(map(str, seeds)) for seeds in (c.seeds[::2], c.seeds[1::2]))
    p = [formats.p_text(value) for value in (c.p, c.adjusted)]
    return [arm, f"{second} - {first}", benchmark, formats.difference_text(c), c.unit.bounds(c.interval, "+"), *p]
