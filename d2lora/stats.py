"""Intervals and paired tests on per-item scores. Pure functions; seeded, so a report made again has the same numbers.

Scores are arrays (runs, items): one row a training seed, one column a test item; a comparison takes the difference of two
such arrays, item by item, because both arms answered the same items.
"""

import functools
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
_Z = NormalDist().inv_cdf(0.975)
_Z_POWER = NormalDist().inv_cdf(0.80)


def interval(scores: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of scores (runs, items).

    One run of right or wrong: Wilson's, which keeps its coverage with few items and near 0 or 1, where a resampling
    interval shrinks to nothing. Anything else: percentiles of the two-level bootstrap.
    """
    if len(scores) == 1 and is_binary(scores):
        return wilson(int(scores.sum()), scores.shape[1])
    return percentiles(bootstrap(scores))


def is_binary(scores: np.ndarray) -> bool:
    """Whether all scores are right (1) or wrong (0)."""
    return bool(np.isin(scores, (0, 1)).all())


def wilson(right: int, items: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927, equation 4)."""
    share, z2 = right / items, _Z**2
    centre = (share + z2 / (2 * items)) / (1 + z2 / items)
    half = _Z / (1 + z2 / items) * (share * (1 - share) / items + z2 / (4 * items**2)) ** 0.5
    return centre - half, centre + half


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided exact McNemar test of two arrays (items,) of right (1) and wrong (0): p.

    Under the null each item that only one of them has right is a fair coin (McNemar 1947); ties say nothing.
    """
    from scipy.special import bdtr

    won, lost = int(np.sum(second > first)), int(np.sum(first > second))
    return min(1.0, 2 * float(bdtr(min(won, lost), won + lost, 0.5))) if won + lost else 1.0


def bootstrap(scores: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Resampled means (resamples,) of scores (runs, items); of differences, this is the paired bootstrap.

    With several runs, runs and items are drawn independently, as both vary (the two-way bootstrap of Owen 2007, which errs
    to the wide side). Drawing from few runs would show too little of their spread, by (runs - 1) / runs in variance; that
    is put back.
    """
    runs, items = scores.shape
    means = _draws(items, resamples, seed) @ scores.T.astype(np.float32) / items
    if runs == 1:
        return means[:, 0].astype(float)
    centre = means.mean(axis=1)
    drawn = (_draws(runs, resamples, seed + 1) * means).sum(axis=1) / runs
    return (centre + (runs / (runs - 1)) ** 0.5 * (drawn - centre)).astype(float)


@functools.lru_cache(maxsize=4)
def _draws(size: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of `size` things is drawn in each resample: counts (resamples, size), exact in float32.

    The same for all arrays of a size, so a mean of many arrays is one matrix product.
    """
    generator = np.random.default_rng([seed, size])
    counts = np.empty((resamples, size), np.float32)
    for start in range(0, resamples, 1000):  # in parts: the indices take twice the memory of the counts
        rows = min(1000, resamples - start)
        places = generator.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        counts[start : start + rows] = np.bincount(places.ravel(), minlength=rows * size).reshape(rows, size)
    return counts


def percentiles(resampled: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled means."""
    low, high = np.percentile(resampled, (2.5, 97.5))
    return float(low), float(high)


def bootstrap_p(resampled: np.ndarray) -> float:
    """Two-sided p of a difference of zero: twice the smaller share of resampled differences on either side of it."""
    side = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    return min(1.0, 2 * (1 + side) / (1 + len(resampled)))


def holm(p: list[float]) -> list[float]:
    """P values adjusted for being several (Holm 1979): significant at alpha where the adjusted value is at most alpha."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def smallest_detectable(standard_error: float, exact_items: int | None = None) -> float:
    """The smallest true difference that a two-sided test at 5 % finds with power 80 %: 2.80 standard errors.

    `standard_error` is that of the paired difference, so correlation between the arms counts. Before any correction.
    The exact McNemar test of `exact_items` items can't find less than 6 of them: 5, all on one side, have p = 0.06.
    """
    return max((_Z + _Z_POWER) * standard_error, 6 / exact_items if exact_items else 0.0)
