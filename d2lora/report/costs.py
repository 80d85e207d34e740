"""What each arm of a sweep cost: seconds, samples, tokens and memory of its trainings."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

from d2lora.records import Record, Records
from d2lora.report.axes import LABELS, order_of, short_name
from d2lora.report.content import Content, Rows, Sweep
from d2lora.report.looks import METHODS, NAMES
from d2lora.report.points import Point, differing, size
from d2lora.settings import amount
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.warmup import WarmupSpec

_HEAD = ("seeds", "warm-up (s)", "adaptation (s)", "samples", "tokens", "tokens/s", "peak memory (MB)")
NOTES = [
    "Means over training seeds: seconds, samples and tokens (a sample counts once an epoch); tokens/s and samples are of the "
    "adaptation. Memory: the largest of both phases; of the GPU, or on a CPU of the process, libraries and base included.",
    "A warm-up is trained once and serves all cells that start from it. Seconds compare on the same hardware, with nothing else "
    "running there.",
]


@dataclass
class _Cost:
    """A method's adaptation at one m and n: its point, and the records of its trainings, one a seed."""

    point: Point
    adapted: list[Record]
    warmed: list[Record]


def content(sweep: Sweep) -> Content | None:
    """Return a row for each method, m and n that was trained; None where no adaptation is finished."""
    costs = _costs(sweep.points, sweep.records)
    if not costs:
        return None
    keys = differing(cost.point for cost in costs)
    costs.sort(key=lambda cost: _order(cost.point, keys))
    head = ["method", *(key if key in LABELS else short_name(key) for key in keys), "m", "n", *_HEAD]
    rows = Rows(head, [_texts(cost, keys) for cost in costs], [cost.point for cost in costs])
    return Content(rows=rows, notes=NOTES)


def _order(point: Point, keys: list[str]) -> tuple[object, ...]:
    others = (order_of(point.value_of(key)) for key in keys)
    return METHODS.index(point.method), *others, size(point.m), size(point.n)


def _costs(points: Iterable[Point], records: Records) -> list[_Cost]:
    """Return the costs of the points with a finished adaptation; the benchmarks of a cell share its trainings."""
    costs: dict[tuple[str, ...], _Cost] = {}
    for point in points:
        trained = tuple(run.adapt for run in point.runs.values() if run.adapt)
        adapted = [r for key in trained if (r := records.get(AdaptSpec.KIND, key))]
        warmed = [r for run in point.runs.values() if (r := records.get(WarmupSpec.KIND, run.warmup))]
        if adapted:
            costs.setdefault(trained, _Cost(point, adapted, warmed))
    return list(costs.values())


def _texts(cost: _Cost, keys: list[str]) -> list[str]:
    point, seconds = cost.point, sum(r.seconds for r in cost.adapted)
    tokens = [r.metrics["tokens_seen"] for r in cost.adapted if "tokens_seen" in r.metrics]
    return [
        NAMES[point.method],
        *(str(point.value_of(key) or "-") for key in keys),
        amount(point.m),
        amount(point.n),
        str(len(cost.adapted)),
        f"{mean(r.seconds for r in cost.warmed):.1f}" if cost.warmed else "-",
        f"{seconds / len(cost.adapted):.1f}",
        f"{mean(r.metrics['samples_seen'] for r in cost.adapted):.0f}",
        f"{mean(tokens):.0f}" if tokens else "-",
        f"{sum(tokens) / seconds:.0f}" if tokens and seconds else "-",
        f"{max(r.peak_memory_mb for r in [*cost.adapted, *cost.warmed]):.0f}",
    ]
