"""Compare two halves of each arm's replicates (A/A): nothing differs but luck, so differences beyond chance speak against the tests."""

from collections.abc import Iterable

from d2lora.report import formats
from d2lora.report.compare import ALPHA, Comparison, adjust, count_beyond_chance, halved
from d2lora.report.content import Content, Group, Sweep, of_groups
from d2lora.report.looks import NAMES
from d2lora.report.points import Point, by_benchmark, differing, label_texts
from d2lora.settings import amount

CAPTION = "A/A: one half of an arm's replicates against the other, on the same items"
_HEAD = ["arm", "halves", "benchmark", *formats.COMPARISON_HEAD]

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
    beyond = count_beyond_chance(comparison for _, comparison in compared)
    arms = f"{len(compared)} arms" if len(compared) > 1 else "one arm"
    return f"A/A: of {arms} halves differ beyond chance in {beyond} (Holm, alpha {100 * ALPHA:.0f} %)."


def content(sweep: Sweep) -> Content | None:
    """Return a row for each arm with four or more replicates, and a sentence for each benchmark; None without any."""
    labels, groups = differing(sweep.points), by_benchmark(sweep.points)
    return of_groups(_HEAD, [_group(name, points, labels) for name, points in groups.items()])


def _group(benchmark: str, points: list[Point], labels: list[str]) -> Group:
    compared = halves(points)
    rows = [(point, _row(point, comparison, benchmark, labels)) for point, comparison in compared]
    return Group(benchmark, rows, verdict(compared))


def _row(point: Point, c: Comparison, benchmark: str, labels: list[str]) -> list[str]:
    n = amount(point.n)
    sizes = point.arm_label.format(m=amount(point.m), n=n) if point.m else f"LoRA n={n}"
    arm = " ".join([NAMES[point.method], sizes, *label_texts(point, labels)])
    first, second = (", ".join(map(str, seeds)) for seeds in (c.seeds[::2], c.seeds[1::2]))
    return [arm, f"{second} - {first}", benchmark, *formats.comparison_texts(c)]
