"""Compare D2LoRA with LoRA, cell by cell on the same items: differences, p values, and the verdict in words."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from d2lora import stats
from d2lora.report.axes import compatible
from d2lora.report.looks import NAMES, QUANTIZING
from d2lora.report.points import Point, differing, label_texts
from d2lora.scoring import Unit, is_graded, unit_of
from d2lora.scoring.kinds import PERCENT
from d2lora.settings import amount
from d2lora.settings.controls import NO_CONTROL

ALPHA = 0.05
Decision = Literal["better", "worse", "equivalent", "undecided"]
_LEAST_HALVED = 4  # replicates: two pairs
_BASE = ("", "", "")


@dataclass(frozen=True)
class Outcomes:
    """How many items both arms answered right, one of them alone, or neither: what McNemar's test is made from."""

    both: int
    lora_only: int
    d2lora_only: int
    neither: int


@dataclass(eq=False)
class Comparison:
    """D2LoRA minus LoRA in one entry of a table, as fractions. `adjusted` is Holm's p over the table.

    `differences` (runs, items) are those of the items' scores; `equivalence` is the 90 % interval of their mean.
    """

    lora: Point
    d2lora: Point
    difference: float
    interval: tuple[float, float]
    detectable: float  # stats.smallest_detectable; 0 where no item differs
    p: float
    test: str
    seeds: tuple[int, ...]
    differences: np.ndarray
    equivalence: tuple[float, float]
    far_p: float  # p on the safe side far out in the tails, where Holm's correction looks: stats.bootstrap
    outcomes: Outcomes | None = None  # of the exact McNemar test alone
    margin: float = PERCENT.margin / 100
    adjusted: float = 1.0
    methods: list[str] = field(default_factory=list)  # several at n = 0, where no method has done anything yet
    where: str = ""  # the labels that tell it from others of its table

    @property
    def clusters(self) -> np.ndarray | None:
        """Return the cluster of each item (items,), where the benchmark says which belong together."""
        return self.d2lora.clusters

    @property
    def units(self) -> np.ndarray:
        """Return the differences by what may be drawn by itself (runs, units): items, or clusters."""
        return self.d2lora.units_of(self.differences)

    @property
    def unit(self) -> Unit:
        """Return the unit of its metric."""
        return unit_of(self.lora.metric)

    @property
    def margin_text(self) -> str:
        """Return the margin with its unit: 1 point."""
        return self.unit.text(round(100 * self.margin, 9))

    @property
    def beyond_chance(self) -> bool:
        """Tell whether the difference is significant at 5 % after Holm's correction."""
        return self.adjusted <= ALPHA

    @property
    def is_equivalent(self) -> bool:
        """Do two one-sided tests at 5 %, which is the 90 % interval inside the margin (Schuirmann 1987, J Pharmacokinet 15:657)."""
        low, high = self.equivalence
        return -self.margin < low and high < self.margin

    @property
    def decision(self) -> Decision:
        """Return what is known of D2LoRA: better or worse beyond chance, equivalent within the margin, or nothing yet."""
        if self.beyond_chance:
            return "better" if self.difference > 0 else "worse"
        return "equivalent" if self.is_equivalent else "undecided"

    @property
    def label(self) -> str:
        """Return the names of what is compared."""
        names = ", ".join(NAMES[m] for m in self.methods)
        return f"{names} m={amount(self.d2lora.m)} n={amount(self.d2lora.n)} {self.where}".strip()


def comparisons(points: Iterable[Point], margin: float = PERCENT.margin) -> dict[Point, Comparison]:
    """Return the comparison of each D2LoRA point with its LoRA point, if both have results on the same items.

    `margin` is that of equivalence, in the metric's unit (a point).
    Points with the same evaluations (at n = 0) share one comparison, so that it counts once in Holm's correction too.
    """
    points = list(points)
    by_identity, labels = points_by_identity(points), differing(points)
    by_point: dict[Point, Comparison] = {}
    distinct: dict[tuple, Comparison] = {}
    for point in points:
        other = counterpart(by_identity, point, point.init, 0)
        if point.m == 0 or point.control != NO_CONTROL or other is None or (pair := _paired(other, point)) is None:
            continue
        keys = tuple((_evaluation(other, s), _evaluation(point, s)) for s in pair[0])
        if keys not in distinct:
            distinct[keys] = _compare(other, point, *pair)
            distinct[keys].where = " ".join(label_texts(point, labels))
            distinct[keys].margin = margin / 100
        distinct[keys].methods.append(point.method)
        by_point[point] = distinct[keys]
    adjust(list(distinct.values()))
    return by_point


def pairs(points: Iterable[Point]) -> Iterator[tuple[Point, Point, tuple[int, ...]]]:
    """Yield each D2LoRA point after its LoRA point, with the seeds that both have results of on the same items."""
    points = list(points)
    by_identity = points_by_identity(points)
    for point in points:
        other = counterpart(by_identity, point, point.init, 0)
        if point.m != 0 and point.control == NO_CONTROL and other and (pair := _paired(other, point)):
            yield other, point, pair[0]


def count_beyond_chance(family: Iterable[Comparison]) -> int:
    """Return how many comparisons differ beyond chance."""
    return sum(c.beyond_chance for c in family)


def count_decided(family: Iterable[Comparison], decision: Decision) -> int:
    """Return how many comparisons came to a decision."""
    return sum(c.decision == decision for c in family)


def adjust(family: list[Comparison]) -> None:
    """Give comparisons that are read together their p after Holm's correction; one alone needs none."""
    p = [c.far_p for c in family] if len(family) > 1 else [c.p for c in family]
    for comparison, adjusted in zip(family, stats.holm(p), strict=True):
        comparison.adjusted = adjusted


def compared(first: Point, second: Point, margin: float = PERCENT.margin) -> Comparison | None:
    """Compare two points on the items and seeds that both have: second minus first. None if they have none. p is not
    adjusted yet; `margin` is that of equivalence, in the metric's unit.
    """
    pair = _paired(first, second)
    comparison = _compare(first, second, *pair) if pair else None
    if comparison:
        comparison.margin = margin / 100
    return comparison


def halved(point: Point) -> Comparison | None:
    """Compare every second replicate of a point with the others, pair by pair; None for fewer than four. Of an odd number the
    last has no partner. p is not adjusted yet.
    """
    seeds = sorted({_evaluation(point, s): s for s in sorted(point.scores, reverse=True)}.values())
    seeds = seeds[: len(seeds) // 2 * 2]
    if len(seeds) < _LEAST_HALVED:
        return None
    first, second = (np.stack([point.scores[s] for s in half]) for half in (seeds[::2], seeds[1::2]))
    return _compare(point, point, tuple(seeds), first, second)


PointsByIdentity = dict[tuple[object, ...], list[Point]]


def points_by_identity(points: Iterable[Point]) -> PointsByIdentity:
    """Return points by what they are, for counterpart. The base has no initialization or recipe."""
    by_identity: PointsByIdentity = {}
    for p in points:
        origins = _BASE if p.is_base else (p.init, p.recipe, p.warmup)
        by_identity.setdefault((*_shared(p), p.m, p.control, *origins), []).append(p)
    return by_identity


def counterpart(
    by_identity: PointsByIdentity, point: Point, init: str, m: int | str, control: str = NO_CONTROL
) -> Point | None:
    """Return the point that differs from `point` in initialization or m alone; None if the sweep has none.

    LoRA has no warm-up, unless its initialization was computed from a warm-up's rows; at n = 0 it is the base, which
    may be quantized. Settings on which it does not depend, such as the warm-up's learning rate, need not be equal.
    """
    origins = [(init, point.recipe, point.warmup), (init, point.recipe, "")]
    if point.n == 0 and m == 0 and init not in QUANTIZING:
        origins = [_BASE]
    others = (p for o in origins for p in by_identity.get((*_shared(point), m, control, *o), []))
    return next((p for p in others if compatible(p.axes, point.axes)), None)


def _shared(point: Point) -> tuple:
    return point.model, point.task, point.method, point.n, point.benchmark, point.metric


def _evaluation(point: Point, seed: int) -> str:
    return (point.runs.get(seed) or next(iter(point.runs.values()))).evaluate


def _paired(lora: Point, d2lora: Point) -> tuple[tuple[int, ...], np.ndarray, np.ndarray] | None:
    """Return the seeds that both have, and the scores (seeds, items) of LoRA and D2LoRA; None without seeds, or if the
    items differ.

    Seeds that share both evaluations count once.
    """
    base = next(iter(lora.scores.values()), None) if lora.is_base else None
    first = dict.fromkeys(d2lora.scores, base) if base is not None else lora.scores
    shared = sorted(first.keys() & d2lora.scores.keys(), reverse=True)
    seeds = tuple(sorted({(_evaluation(lora, s), _evaluation(d2lora, s)): s for s in shared}.values()))
    if not seeds or len(lora.tested | d2lora.tested) > 1:
        return None
    return seeds, np.stack([first[s] for s in seeds]), np.stack([d2lora.scores[s] for s in seeds])


def _compare(lora: Point, d2lora: Point, seeds: tuple[int, ...], first: np.ndarray, second: np.ndarray) -> Comparison:
    """Compare scores (seeds, items) of LoRA and D2LoRA."""
    difference, clusters = second - first, d2lora.clusters
    drawn = stats.bootstrap(difference, clusters=clusters)
    right_or_wrong = not is_graded(lora.metric) and stats.is_binary(first) and stats.is_binary(second)
    exact = right_or_wrong and len(seeds) == 1 and clusters is None
    tested = _mcnemar(first[0], second[0]) if exact else _bootstrapped(first, second, drawn, clusters)
    return Comparison(
        lora,
        d2lora,
        difference=float(difference.mean(dtype=float)),
        detectable=stats.smallest_detectable(drawn, difference.shape[1] if exact else None),
        seeds=seeds,
        differences=difference,
        outcomes=_outcomes(first[0], second[0]) if exact else None,
        **tested._asdict(),
    )


class _Tested(NamedTuple):
    """What a test of a difference gives; the fields are Comparison's."""

    test: str
    p: float
    far_p: float
    interval: tuple[float, float]
    equivalence: tuple[float, float]


def _mcnemar(first: np.ndarray, second: np.ndarray) -> _Tested:
    """Test one run's right and wrong answers (items,)."""
    p = stats.mcnemar(first, second)
    return _Tested("exact McNemar", p, p, stats.newcombe(first, second), stats.newcombe(first, second, 1 - 2 * ALPHA))


def _bootstrapped(first: np.ndarray, second: np.ndarray, drawn: np.ndarray, clusters: np.ndarray | None) -> _Tested:
    """Test scores (runs, items) by resampled differences (resamples,)."""
    runs, p = len(first), stats.bootstrap_p(drawn)
    name = "paired bootstrap" if runs == 1 else "two-level bootstrap"
    far_p = stats.bootstrap_p(stats.bootstrap(second - first, wide=True, clusters=clusters)) if runs > 2 else p
    units = first.shape[1] if clusters is None else len(np.unique(clusters))
    shares = bool(min(first.min(), second.min()) >= 0 and max(first.max(), second.max()) <= 1)

    def ends(level: float) -> tuple[float, float]:
        low, high = stats.percentiles(drawn, level)
        # Items that all differ alike, mostly by nothing, resample to themselves. Others may differ that were not drawn.
        beyond = stats.unseen(units, level) if low == high and shares else 0.0
        return low - beyond, high + beyond

    return _Tested(
        name if clusters is None else f"{name} of clusters",
        p,
        far_p,
        stats.clipped(ends(stats.LEVEL), -1.0, first, second),
        ends(1 - 2 * ALPHA),
    )


def _outcomes(lora: np.ndarray, d2lora: np.ndarray) -> Outcomes:
    """Count items by who answered them right, from 1 and 0 of each (items,)."""
    counts = (int(np.sum((lora == a) & (d2lora == b))) for a, b in ((1, 1), (1, 0), (0, 1), (0, 0)))
    return Outcomes(*counts)


def seeds_text(seeds: set[int], draws: set[int]) -> str:
    """Say how many trainings a table is based on, and how many draws of the rows (`draws`); with one or two, also that
    they are few.
    """
    what = "replicate" if len(draws) > 1 else "training seed"
    if len(seeds) == 1:
        return f"One {what} ({min(seeds)}): what another seed would change is not known."
    text = f"{len(seeds)} {what}s ({', '.join(map(str, sorted(seeds)))}), folded into each number."
    text += " Each is another draw of the rows and another training." * (len(draws) > 1)
    return text + " Two hardly tell what another would change: intervals are wide." * (len(seeds) == 2)


def draws_of(points: Iterable[Point]) -> set[int]:
    """Return the draws of rows (data_seed) that points of more than one draw each rest on."""
    return {draw for p in points if len(p.draws) > 1 for draw in p.draws}
