"""What a warm-up is worth in task samples: how many more of them LoRA needs for the same accuracy, read from LoRA's curve over n."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from d2lora import stats
from d2lora.report.points import Point
from d2lora.settings import amount

if TYPE_CHECKING:
    from d2lora.report.tables import Line, Table

RESAMPLES = 2000  # each is a fit of its own
LESS, MORE = "less", "more"  # an end of an interval beyond LoRA's curve
_FEWEST = 3  # sizes of n that make a curve


@dataclass(frozen=True)
class Worth:
    """Task samples that a warm-up is worth at one n, with a 95 % interval; an infinite end is beyond LoRA's curve."""

    n: int | str
    samples: float
    interval: tuple[float, float]


@dataclass(eq=False)
class Curve:
    """LoRA's points by n in samples, in its order, and the monotone fit of their values (isotonic regression)."""

    points: dict[float, Point]

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.array(list(self.points))

    @cached_property
    def levels(self) -> np.ndarray:
        """Return the fit (sizes,)."""
        return _monotone(np.array([p.value for p in self.points.values()]))

    @cached_property
    def drawn(self) -> list[np.ndarray]:
        """Return the fit of each resample: the same items for all points, another luck of trainings for each."""
        drawn = [
            stats.bootstrap(p.table, RESAMPLES, luck=i, clusters=p.clusters)
            for i, p in enumerate(self.points.values(), 1)
        ]
        return [_monotone(values) for values in np.column_stack(drawn)]


def lines(table: "Table") -> list[str]:
    """Say for each D2LoRA row of a table over n what its warm-up is worth; nothing where LoRA has a single size."""
    if table.column != "n":
        return []
    curves = {id(line): Curve(_by_size(line.points.values())) for line in table.lines if line.m == 0}
    rows = [(line, curves[id(lora)]) for line in table.lines if line.m != 0 and (lora := _lora_of(line, table))]
    known = [
        (line, {p.n: worth(p, curve) for p in line.points.values() if p.scores})
        for line, curve in rows
        if len(curve.points) > 1
    ]
    silent = [line.label for line, worths in known if not any(worths.values())]
    texts = [_text(line, worths) for line, worths in known if any(worths.values())]
    if silent:
        subject = f"All {len(silent)} rows" if len(silent) == len(known) > 1 else ", ".join(silent)
        texts.append(f"{subject}: LoRA's curve does not say what the warm-up is worth in task samples.")
    return texts


def _lora_of(line: "Line", table: "Table") -> "Line | None":
    """Return the LoRA row that a D2LoRA row's points are compared with."""
    compared = {table.pairs[p].lora for p in line.points.values() if p in table.pairs}
    shared = {id(x): len(compared.intersection(x.points.values())) for x in table.lines if x.m == 0}
    best = max((x for x in table.lines if x.m == 0), key=lambda x: shared[id(x)], default=None)
    return best if best and shared[id(best)] else None


def _by_size(points: Iterable[Point]) -> dict[float, Point]:
    """Return scored points by n in samples, in its order; those that were asked other items than the first are left out."""
    by_size = {size: p for p in points if p.scores and (size := _size(p)) is not None}
    tested = next(iter(by_size.values())).tested if by_size else set()
    return {size: by_size[size] for size in sorted(by_size) if by_size[size].tested == tested}


def _size(point: Point) -> float | None:
    return None if point.rows is None else float(point.rows)


def _text(line: "Line", worths: dict[int | str, Worth | None]) -> str:
    known = [w for w in worths.values() if w]
    texts = [_worth_text(w, " task samples" if w is known[0] else "") for w in known]
    unknown = [amount(n) for n, w in worths.items() if w is None]
    text = f"{line.label}: {amount(line.m)} general samples are worth {', '.join(texts)}"
    return text + (f"; not determinable at n = {', '.join(unknown)}." if unknown else ".")


def _worth_text(worth: Worth, unit: str) -> str:
    low, high = worth.interval
    least, most = LESS if np.isinf(low) else _round(low), MORE if np.isinf(high) else _round(high)
    return f"{_round(worth.samples)} [{least}, {most}]{unit} at n = {amount(worth.n)}"


def _round(samples: float) -> str:
    return f"{round(samples):,}"


def worth(point: Point, curve: Curve) -> Worth | None:
    """Read from LoRA's curve, straight between its sizes, where it has a D2LoRA point's value; less the n that this had itself.

    None where the curve does not say: the value is above or below it, it is flat there, the interval has no end on
    either side, or LoRA has fewer than three sizes.
    """
    own = _size(point)
    if own is None or len(curve.points) < _FEWEST or any(p.tested != point.tested for p in curve.points.values()):
        return None
    value, levels = float(point.value or 0.0), curve.levels
    if not levels[0] <= value <= levels[-1] or np.isclose(levels, value, rtol=0, atol=1e-9).sum() > 1:
        return None
    drawn = zip(stats.bootstrap(point.table, RESAMPLES, clusters=point.clusters), curve.drawn, strict=True)
    reached = np.array([_reach(fit, curve.sizes, other) for other, fit in drawn]) - own
    low, high = np.percentile(reached, (2.5, 97.5), method="nearest")
    if np.isinf(low) and np.isinf(high):
        return None
    return Worth(point.n, _reach(levels, curve.sizes, value) - own, (float(low), float(high)))


def _monotone(values: np.ndarray) -> np.ndarray:
    from scipy.optimize import isotonic_regression

    return isotonic_regression(values).x


def _reach(levels: np.ndarray, sizes: np.ndarray, value: float) -> float:
    """Return the n at which a rising curve reaches a value; infinite outside of it."""
    return float(np.interp(value, levels, sizes, left=-np.inf, right=np.inf))
