"""Compute intervals and paired tests on per-item scores. Pure functions, seeded, so a report always has the same
numbers.

Scores are arrays (runs, items): one row for each training seed, one column for each test item. A comparison takes the
difference of two such arrays item by item, because both were measured on the same items.
"""

import functools
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
_LEVELS = 500  # of what makes normal numbers Student's t
LEVEL = 0.95  # of intervals
_ROUNDING = 1e-9  # of a variance that was computed from a standard error


def interval(scores: np.ndarray, graded: bool = False, clusters: np.ndarray | None = None) -> tuple[float, float]:
    """Return the 95 % interval of the mean of scores (runs, items).

    One run of right or wrong answers: Wilson's interval, which keeps its coverage with few items and near 0 or 1, where
    a resampled interval is far too narrow. Otherwise: percentiles of the two-level bootstrap. `graded` scores (ROUGE) are
    not right or wrong even where all are 0. `clusters` (items,) are drawn instead of items.
    """
    if clusters is not None:
        return clipped(percentiles(bootstrap(scores, clusters=clusters)), 0.0, scores)
    if len(scores) == 1 and not graded and is_binary(scores):
        return wilson(int(scores.sum()), scores.shape[1])
    return clipped(percentiles(bootstrap(scores)), 0.0, scores)


def interval_of_mean(mean: float, stderr: float | None, items: int, graded: bool = False) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean from its standard error alone, without the items' scores.

    Scores between 0 and 1 are all right or wrong where their variance is that of a coin, and Wilson's interval is exactly
    that of `interval`. Otherwise 1.96 standard errors, which is close to a bootstrap's. None without a standard error.
    """
    if stderr is None:
        return None
    variance = stderr**2 * (items - 1)  # of the items' scores, without Bessel's correction
    if not graded and abs(variance - mean * (1 - mean)) < _ROUNDING:
        return wilson(round(mean * items), items)
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * stderr
    return (max(0.0, mean - half), min(1.0, mean + half)) if 0 <= mean <= 1 else (mean - half, mean + half)


def clipped(bounds: tuple[float, float], lowest: float, *scores: np.ndarray) -> tuple[float, float]:
    """Clip an interval to [lowest, 1] if all scores are within 0 and 1: with few runs it can be wider."""
    if all(x.min() >= 0 and x.max() <= 1 for x in scores):
        return max(lowest, bounds[0]), min(1.0, bounds[1])
    return bounds


def is_binary(scores: np.ndarray) -> bool:
    """Tell whether all scores are right (1) or wrong (0)."""
    return bool(np.isin(scores, (0, 1)).all())


def wilson(right: int, items: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's interval of a share (Wilson 1927, equation 4)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, z2 = right / items, z**2
    centre = (share + z2 / (2 * items)) / (1 + z2 / items)
    half = z / (1 + z2 / items) * (share * (1 - share) / items + z2 / (4 * items**2)) ** 0.5
    return centre - half, centre + half


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Return p of the two-sided exact McNemar test of two arrays (items,) of right (1) and wrong (0).

    Under the null hypothesis each item that only one of them gets right is a fair coin (McNemar 1947); ties do not
    count.
    """
    from scipy.special import bdtr

    won, lost = int(np.sum(second > first)), int(np.sum(first > second))
    return min(1.0, 2 * float(bdtr(min(won, lost), won + lost, 0.5))) if won + lost else 1.0


def newcombe(first: np.ndarray, second: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval of second - first, shares of right (1) among the same items (items,): Wilson's, added in squares.

    Newcombe 1998 (Stat Med 17:2635), method 10: Wilson's intervals of both shares, combined. Resampling would return
    [0, 0] where no item differs, and would exclude 0 where four differ in one direction (exact McNemar: p = 0.125).
    """
    items, a, b = len(first), int(first.sum()), int(second.sum())
    (low_a, high_a), (low_b, high_b) = wilson(a, items, level), wilson(b, items, level)
    together = items * float((first * second).sum()) - a * b
    together = max(together - items / 2, 0.0) if together > 0 else together  # Newcombe's continuity correction
    spread = (a * (items - a) * b * (items - b)) ** 0.5
    phi = together / spread if spread else 0.0
    add = lambda x, y: (x * x - 2 * phi * x * y + y * y) ** 0.5  # noqa: E731
    share_a, share_b = a / items, b / items
    low = share_b - share_a - add(share_b - low_b, high_a - share_a)
    return low, share_b - share_a + add(high_b - share_b, share_a - low_a)


def bootstrap(
    scores: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
    wide: bool = False,
    luck: int = 0,
    clusters: np.ndarray | None = None,
) -> np.ndarray:
    """Return resampled means (resamples,) of scores (runs, items); of differences, this is the paired bootstrap.

    Arrays of as many items draw the same items. With another `luck` each, what other runs would give is drawn by itself.

    Items are drawn again. What other training runs would give is not: of two or three runs that shows far too little. It
    is normal with the variance of the runs' means, and the sum of both is stretched to Student's t with (runs - 1) / share
    degrees of freedom, where share is the runs' part of the variance: t of the runs alone where they are all of it, normal
    where they are nothing. At any share, 95 % intervals of 3 runs then hold in 94.2 to 96.3 %, of more runs closer to 95 %.
    Satterthwaite's share squared (Biometrics Bulletin 2:110, 1946) calls the luck of 3 runs significant in up to 8 % of cells.

    `wide` draws the runs' part from t by itself, with runs - 1 degrees of freedom: the Behrens-Fisher distribution (Fisher
    1935), which errs to the wide side only, far out too (Holm's correction asks for p of 5 % / cells, where the other calls
    3 runs' luck significant up to three times as often as it should). Two runs always get it: 95 % intervals hold in 95 to
    98.6 %, where the other would in 90.6 %. benchmarks/intervals.py measures all of it on simulated grids.

    `clusters` (items,) number what is drawn together instead of items. Of few or unequal ones resampling shows too little, so
    their part is widened, and stretched to t with as many degrees of freedom as they are worth (`few_clusters`). It is never
    less than that of independent items: where a cluster's items seem to cancel out, that is the luck of few clusters.
    """
    few = few_clusters(scores, clusters) if clusters is not None and clusters.max() > 0 else None
    runs, mean = len(scores), scores.mean(dtype=float)
    of_items = _of_items(scores, resamples, seed)
    if few is None and runs == 1:
        return mean + of_items
    normal, levels = _normal(resamples, seed + 1 + luck)
    if few and clusters is not None:
        of_clusters = few.widening * _of_items(by_cluster(scores, clusters), resamples, seed)
        of_items = max(of_items, of_clusters, key=np.std)
    if runs == 1 and few:
        return mean + of_items * _stretch(few.freedom)[levels]
    variance = (scores.mean(axis=1, dtype=float).var(ddof=1) + _step(scores) ** 2 / 12) / runs
    if wide or runs == 2:
        if few:
            of_items = of_items * _stretch(few.freedom)[_normal(resamples, seed)[1]]
        return mean + of_items + variance**0.5 * _t(runs - 1, resamples, seed + 1 + luck)
    share = variance / (variance + of_items.var()) if variance else 0.0
    lost = share / (runs - 1) + ((1 - share) / few.freedom if few else 0.0)  # one over the degrees of freedom
    stretched = _stretch(1 / lost)[levels] if lost else 1.0
    return mean + (of_items + variance**0.5 * normal) * stretched


def _of_items(scores: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return by how much the mean of scores (runs, units) changes where other units are drawn (resamples,), without single runs' noise."""
    units, means = scores.shape[1], scores.mean(axis=0, dtype=float)
    drawn = (_draws(units, resamples, seed) @ means.astype(np.float32) / units).astype(float)
    return _own_share(scores) ** 0.5 * (drawn - means.mean())


def _step(scores: np.ndarray) -> float:
    """Return the step in which runs' means are counted: 1 / items of right or wrong answers and their differences, else 0.

    Runs whose counts are equal need not be equal: Sheppard's correction of their variance is a twelfth of its square.
    """
    return 1 / scores.shape[1] if np.isin(scores, (-1, 0, 1)).all() else 0.0


@dataclass(frozen=True)
class FewClusters:
    """What clusters are worth: degrees of freedom of their variance, and by what a resampled deviation is too small."""

    freedom: float
    widening: float


def few_clusters(scores: np.ndarray, clusters: np.ndarray) -> FewClusters:
    """Return the degrees of freedom of a clustered mean of scores (runs, items), and the correction of its bias.

    Bell and McCaffrey's (Survey Methodology 28:169, 2002) for clusters whose sums vary by size, as Imbens and Kolesár propose
    (Rev Econ Stat 98:701, 2016): with an effect of the cluster and one of the item, told apart by an analysis of variance.
    """
    sizes = np.bincount(clusters).astype(float)
    own, shared = _within_and_between(scores.mean(axis=0, dtype=float), clusters, sizes)
    variances, weights = sizes * own + sizes**2 * shared, sizes / sizes.sum()  # of the clusters' sums
    if not variances.any():
        variances = sizes
    total, w2 = variances.sum(), weights @ weights
    # Residuals are e = S - w sum(S); their covariance is diag(V) + B with B of rank two. Traces of it and of its square.
    cross, inner = variances @ weights, -2 * variances * weights + total * weights**2
    trace = total + inner.sum()
    square = variances @ variances + 2 * (variances @ inner)
    square += 2 * (variances @ variances) * w2 + total**2 * w2**2 + 2 * cross**2 - 4 * total * cross * w2
    return FewClusters(float(trace**2 / square), float((total / trace) ** 0.5))


def _within_and_between(means: np.ndarray, clusters: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Return the variance of items within clusters and that of clusters, from items' means (items,); unequal sizes allowed.

    Estimates of a one-way analysis of variance (Searle, Casella and McCulloch 1992, Variance Components, section 3.6).
    """
    items, count = len(means), len(sizes)
    of_clusters = np.bincount(clusters, means) / sizes
    within = float(((means - of_clusters[clusters]) ** 2).sum()) / max(items - count, 1)
    between = float(sizes @ (of_clusters - means.mean()) ** 2) / (count - 1)
    if items == count:
        return between, 0.0
    usual_size = (items - float(sizes @ sizes) / items) / (count - 1)
    return within, max((between - within) / usual_size, 0.0)


def by_cluster(scores: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return scores (runs, items) as scores (runs, clusters) whose mean over clusters is the mean over items, in each run.

    `clusters` (items,) numbers the cluster of each item. What a cluster deviates from the mean is weighted by its size, so drawing
    clusters gives the linearized variance of a mean of clustered items (Cochran 1977, Sampling Techniques, section 9A).
    """
    mean = float(scores.mean(dtype=float))
    sizes = np.bincount(clusters)
    sums = np.stack([np.bincount(clusters, row, len(sizes)) for row in scores.astype(float)])
    return mean + len(sizes) / len(clusters) * (sums - mean * sizes)


def _own_share(scores: np.ndarray) -> float:
    """Return which share of the variance between items' means comes from the items themselves.

    The rest is noise of single runs, which the spread of the runs includes already. Computed from the mean squares of a
    two-way analysis of variance (items, runs).
    """
    means = scores.mean(axis=0, dtype=float)
    if len(scores) == 1:
        return 1.0
    rest = scores - means - (scores.mean(axis=1, keepdims=True, dtype=float) - means.mean())
    return max(0.0, 1 - rest.var() / ((len(scores) - 1) * means.var())) if means.var() else 0.0


@functools.lru_cache(maxsize=4)
def _t(freedom: int, resamples: int, seed: int) -> np.ndarray:
    """Return values of Student's t (resamples,): its quantiles in random order, because random draws of its tails vary
    too much.
    """
    from scipy.special import stdtrit

    quantiles = stdtrit(freedom, (np.arange(resamples) + 0.5) / resamples)
    return np.random.default_rng([seed, freedom]).permutation(quantiles)


@functools.lru_cache(maxsize=4)
def _normal(resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw standard normal numbers (resamples,) and the level of each for _stretch: all levels in each part."""
    from scipy.special import ndtri

    generator = np.random.default_rng(seed)
    levels = np.concatenate([generator.permutation(_LEVELS) for _ in range(-(-resamples // _LEVELS))])[:resamples]
    order = generator.permutation(resamples)
    return ndtri((order + 0.5) / resamples), levels[order]


def _stretch(freedom: float) -> np.ndarray:
    """Return the factors (_LEVELS,) that make Student's t of normal numbers: quantiles of the root of freedom / chi squared.

    Not as many as there are numbers: each cell has another freedom, and 10,000 quantiles take as long as its resampling.
    """
    from scipy.special import gammaincinv

    return (freedom / (2 * gammaincinv(freedom / 2, (np.arange(_LEVELS) + 0.5) / _LEVELS))) ** 0.5


@functools.lru_cache(maxsize=4)
def _draws(size: int, resamples: int, seed: int) -> np.ndarray:
    """Return how often each of `size` items is drawn in each resample: counts (resamples, size), exact in float32.

    They are the same for all arrays of a size, so the resampled means of an array are one matrix product.
    """
    generator = np.random.default_rng([seed, size])
    counts = np.empty((resamples, size), np.float32)
    for start in range(0, resamples, 1000):  # in parts: the indices take twice the memory of the counts
        rows = min(1000, resamples - start)
        positions = generator.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        counts[start : start + rows] = np.bincount(positions.ravel(), minlength=rows * size).reshape(rows, size)
    return counts


def percentiles(resampled: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Return the middle of resampled means, 95 % of them."""
    low, high = np.percentile(resampled, (50 - 50 * level, 50 + 50 * level))
    return float(low), float(high)


def unseen(items: int, level: float = LEVEL) -> float:
    """Return the largest share of items that may differ where none of so many did: an end of the exact binomial interval.

    At 95 % about 3.7 / items (Clopper and Pearson 1934, Biometrika 26:404).
    """
    return 1 - ((1 - level) / 2) ** (1 / items)


def bootstrap_p(resampled: np.ndarray) -> float:
    """Return the two-sided p of a difference of zero: twice the smaller share of resampled differences beside it."""
    side = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    return min(1.0, 2 * (1 + side) / (1 + len(resampled)))


def holm(p: list[float]) -> list[float]:
    """Adjust p values for multiple tests (Holm 1979): significant at alpha where the adjusted value is at most alpha."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def smallest_detectable(resampled: np.ndarray, exact_items: int | None = None) -> float:
    """Return the smallest true difference that a two-sided test at 5 % detects with power 80 %, before any correction.

    It is half of the middle 95 % of resampled differences plus half of their middle 60 %: 1.96 and 0.84 standard errors
    if they are normal, more with few runs. The exact McNemar test of `exact_items` items needs 6 items that differ in
    one direction (5 have p = 0.06); if 7.9 are expected, at least 6 occur with probability 80 % (Poisson).
    """
    from scipy.special import gammaincinv

    low, lower, upper, high = np.percentile(resampled, (2.5, 20, 80, 97.5))
    return max(float(high - low + upper - lower) / 2, gammaincinv(6, 0.8) / exact_items if exact_items else 0.0)


# --- planning -------------------------------------------------------------------------------------------------------


def spreads(differences: np.ndarray) -> tuple[float, float]:
    """Estimate a plan's standard deviations from differences (runs, items): of items' own parts, of the runs' means.

    What items have of their own stays when more replicates are trained; the noise of single answers is in the runs' means.
    """
    runs = differences.mean(axis=1, dtype=float)
    items = (_own_share(differences) if len(runs) > 1 else 1.0) * differences.mean(axis=0, dtype=float).var(ddof=1)
    return float(items**0.5), float(runs.std(ddof=1)) if len(runs) > 1 else 0.0


def smallest_effect(items: int, replicates: int, item_sd: float, run_sd: float, equivalence: bool = False) -> float:
    """Return the smallest true difference that so many items and replicates (3 or more) find in 4 of 5 studies, at 5 %.

    With `equivalence`, the smallest margin within which arms that do not differ are called equivalent as often. Spreads are those
    of `spreads`. The interval is bootstrap's: Student's t with (replicates - 1) / share degrees of freedom. Fractions.
    """
    from scipy.special import nctdtrinc, stdtrit

    of_items, of_runs = item_sd**2 / items, run_sd**2 / replicates
    error = (of_items + of_runs) ** 0.5
    if error == 0:
        return 0.0
    freedom = min((replicates - 1) * error**2 / of_runs, 1e6) if of_runs else 1e6
    if equivalence:  # either of the one-sided tests fails in one of ten studies
        return float(error * (stdtrit(freedom, 0.95) + stdtrit(freedom, 0.9)))
    return float(error * nctdtrinc(freedom, 0.2, stdtrit(freedom, 0.975)))


def replicates_needed(
    effect: float, items: int, item_sd: float, run_sd: float, equivalence: bool = False, most: int = 200
) -> int | None:
    """Return the fewest replicates, 3 or more, with a smallest_effect of at most `effect`; None where `most` are too few.

    More replicates do not help where the items are too few for it.
    """
    plans = (r for r in range(3, most + 1) if smallest_effect(items, r, item_sd, run_sd, equivalence) <= effect)
    return next(plans, None)
