"""The statistics against scipy and statsmodels, and against what they promise on made data."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from d2lora import stats

RNG = np.random.default_rng(7)
FIRST = (RNG.random(400) < 0.5).astype(float)
SECOND = np.where(RNG.random(400) < 0.2, 1 - FIRST, FIRST)
ROUGE = RNG.beta(2, 5, size=(1, 100))


@pytest.mark.parametrize(("right", "items"), [(0, 20), (1, 20), (53, 100), (1319, 1319)])
@pytest.mark.parametrize("level", [0.95, 0.9])
def test_wilson_is_scipy_s(right: int, items: int, level: float) -> None:
    expected = scipy.stats.binomtest(right, items).proportion_ci(level, method="wilson")
    assert stats.wilson(right, items, level) == pytest.approx((expected.low, expected.high))


def test_mcnemar_is_statsmodels_exact_test() -> None:
    tests = pytest.importorskip("statsmodels.stats.contingency_tables")
    for first, second in ((FIRST, SECOND), (FIRST[:30], SECOND[:30]), (FIRST, np.ones(400))):
        table = [[np.sum((first == a) & (second == b)) for b in (0, 1)] for a in (0, 1)]
        assert stats.mcnemar(first, second) == pytest.approx(tests.mcnemar(table, exact=True).pvalue)
    assert stats.mcnemar(FIRST, FIRST) == 1.0


def test_holm_is_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    for p in ([0.01, 0.04, 0.03, 0.005], [0.5, 0.6], [0.02], list(RNG.random(30) ** 3)):
        assert stats.holm(p) == pytest.approx(list(multitest.multipletests(p, method="holm")[1]))
    assert stats.holm([]) == []


def normal(spread: float) -> np.ndarray:
    """Resampled differences that are as normal as 10,000 can be."""
    return scipy.stats.norm.ppf((np.arange(10_000) + 0.5) / 10_000) * spread


def test_smallest_detectable_difference_has_the_power_that_statsmodels_finds() -> None:
    power = pytest.importorskip("statsmodels.stats.power")
    spread, items = 0.4, 1000
    expected = power.TTestPower().solve_power(nobs=items, alpha=0.05, power=0.8) * spread
    assert stats.smallest_detectable(normal(spread / items**0.5)) == pytest.approx(expected, rel=5e-3)


def found_by_mcnemar(items: int, won: float, lost: float, tries: int = 1000) -> float:
    """How often the exact test finds a difference where a share `won` of items is right in one arm alone, `lost` in the other."""
    draws = RNG.multinomial(items, [won, lost, 1 - won - lost], size=tries)
    found = 0
    for won_items, lost_items, _ in draws:
        first, second = np.zeros(items), np.zeros(items)
        second[:won_items], first[won_items : won_items + lost_items] = 1, 1
        found += stats.mcnemar(first, second) <= 0.05
    return found / tries


def test_a_difference_of_that_size_is_found_four_times_in_five() -> None:
    """Simulated: 500 items, 20 % of which only one arm has right."""
    items, discordant = 500, 0.2
    size = stats.smallest_detectable(normal((discordant / items) ** 0.5), items)
    assert 0.74 < found_by_mcnemar(items, (discordant + size) / 2, (discordant - size) / 2) < 0.86


def test_the_exact_test_needs_six_items_and_finds_them_four_times_in_five_where_eight_are_expected() -> None:
    nothing, some = np.zeros(100), np.repeat([1.0, 0.0], [6, 94])
    assert stats.mcnemar(nothing, some) < 0.05 < stats.mcnemar(nothing, np.roll(some, -1) * some)
    size = stats.smallest_detectable(normal(0.001), 1000)
    assert size == pytest.approx(7.906e-3, rel=1e-3)
    assert 0.77 < found_by_mcnemar(1000, size, 0.0, 2000) < 0.83


@pytest.mark.parametrize("runs", [3, 5])
def test_with_several_runs_too_it_is_found_four_times_in_five(runs: int) -> None:
    """Runs that spread by 2 points around a difference of the size that such a spread lets be found."""
    spread = np.linspace(-1, 1, runs)
    spread *= 0.02 / spread.std(ddof=1)
    size = stats.smallest_detectable(stats.bootstrap(np.repeat(spread[:, None], 100, axis=1)))
    found = [
        stats.bootstrap_p(stats.bootstrap(np.repeat(size + RNG.normal(0, 0.02, (runs, 1)), 100, axis=1), 2000)) <= 0.05
        for _ in range(300)
    ]
    assert 0.7 < np.mean(found) < 0.88


# Both arms right, only the first, only the second, neither. Newcombe 1998 (Stat Med 17:2635), table II; Fagerland, Lydersen and
# Laake 2014 (Stat Med 33:2850), table V.
@pytest.mark.parametrize(
    ("counts", "published"), [((36, 12, 2, 0), (0.0569, 0.3404)), ((1, 1, 7, 12), (-0.507, -0.026))]
)
def test_the_interval_of_a_difference_is_newcombe_s(counts: tuple[int, ...], published: tuple[float, float]) -> None:
    first, second = np.repeat([1.0, 1.0, 0.0, 0.0], counts), np.repeat([1.0, 0.0, 1.0, 0.0], counts)
    assert stats.newcombe(second, first) == pytest.approx(published, abs=5e-4)
    assert stats.newcombe(first, second) == pytest.approx((-published[1], -published[0]), abs=5e-4)
    (low, high), (lower, upper) = stats.newcombe(first, second), stats.newcombe(first, second, 0.9)
    assert low < lower < upper < high


@pytest.mark.parametrize("items", [100, 1319])
def test_the_interval_of_a_difference_agrees_with_the_exact_test(items: int) -> None:
    first = np.repeat([1.0, 0.0], [items // 2, items - items // 2])
    for discordant in (0, 4, 6, 20):
        second = first.copy()
        second[-discordant or items :] = 1
        low, high = stats.newcombe(first, second)
        assert (low > 0) == (stats.mcnemar(first, second) < 0.05)
        assert low < discordant / items < high
    assert stats.newcombe(np.ones(items), np.ones(items))[1] > 0


def test_one_run_s_bootstrap_is_scipy_s() -> None:
    difference = (SECOND - FIRST)[None]
    for scores in (difference, ROUGE):
        expected = scipy.stats.bootstrap((scores[0],), np.mean, n_resamples=10_000, method="percentile", rng=1)
        drawn = stats.bootstrap(scores)
        width = expected.confidence_interval.high - expected.confidence_interval.low
        assert stats.percentiles(drawn) == pytest.approx(tuple(expected.confidence_interval), abs=0.04 * width)
        assert drawn.std() == pytest.approx(expected.standard_error, rel=0.04)


def test_several_runs_spread_is_that_of_runs_and_of_items() -> None:
    """Scores = item + run: Student's t with (runs - 1) / share degrees of freedom; wide, a t of the runs and a normal of the items."""
    items, runs = RNG.normal(size=200), np.array([-0.3, 0.05, 0.1, 0.15])
    scores = items[None] + runs[:, None]
    low, high = stats.percentiles(stats.bootstrap(scores))
    error = runs.std(ddof=1) / 2, items.std() / 200**0.5
    total = np.hypot(*error)
    assert (high - low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, 3 * total**2 / error[0] ** 2) * total, rel=0.05)
    both = error[0] * RNG.standard_t(3, 200_000) + error[1] * RNG.normal(size=200_000)
    wide = stats.percentiles(stats.bootstrap(scores, wide=True))
    assert (wide[1] - wide[0]) / 2 == pytest.approx(np.quantile(both, 0.975), rel=0.05)
    alone = stats.percentiles(stats.bootstrap(scores.mean(axis=0, keepdims=True)))
    assert high - low > 1.2 * (alone[1] - alone[0]), "the spread between training runs must widen the interval"


def test_noise_of_single_runs_counts_once() -> None:
    """Scores that are noise alone: their spread is a t of the runs' means, and the items add nothing of their own."""
    scores = RNG.normal(size=(5, 300))
    scores -= scores.mean(axis=0)  # no item is better than another
    low, high = stats.percentiles(stats.bootstrap(scores))
    expected = scipy.stats.t.ppf(0.975, 4) * scores.mean(axis=1).std(ddof=1) / 5**0.5
    assert (high - low) / 2 == pytest.approx(expected, rel=0.03)


SPREADS = {  # standard deviations, in the ability that solves an item: of runs, of items in an arm, of items in a run
    "runs dominate": (0.2, 0.0, 0.05),
    "runs and items": (0.05, 0.1, 0.1),
    "items dominate": (0.0, 0.3, 0.02),
    "noise dominates": (0.0, 0.0, 0.3),
}


@pytest.mark.parametrize("runs", [2, 3, 5])
@pytest.mark.parametrize("spread", SPREADS)
def test_chance_alone_is_seldom_called_more(runs: int, spread: str) -> None:
    """Two arms that differ in nothing but luck: about 5 % are called different; two runs may be too careful, none too bold."""
    luck, own, noise = SPREADS[spread]
    called, tries, items = 0, 300, 200
    for _ in range(tries):
        ability = RNG.random(items) + RNG.normal(0, luck, (2, runs, 1)) + RNG.normal(0, own, (2, 1, items))
        first, second = (ability + RNG.normal(0, noise, (2, runs, items)) > 0.5).astype(float)
        called += stats.bootstrap_p(stats.bootstrap(second - first, 2000)) < 0.05
    assert called / tries < 0.09, "7 % and two standard errors of 300 tries"
    if runs == 5 and spread != "runs and items":
        assert called / tries > 0.02


def simulation() -> ModuleType:
    """benchmarks/intervals.py: grids in which the truth is known."""
    file = Path(__file__).parents[2] / "benchmarks" / "intervals.py"
    spec = importlib.util.spec_from_file_location("intervals", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["intervals"] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


INTERVALS = simulation()


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """300 grids here, with their own error; docs/results.md has 1,000 and more conditions: 93 to 97 %."""
    measured = INTERVALS.measure(INTERVALS.Spreads(), grids=300, runs=3, items=500, sizes=2)
    assert 0.92 < measured.value < 0.98
    assert 0.92 < measured.difference < 0.98
    assert 0.91 < measured.pooled < 0.98
    assert measured.false < 0.075
    assert measured.false_holm < 0.065


def planned(items: int) -> tuple[float, float]:
    """Spreads of differences between two arms as in the simulated lab, from 40 studies of eight replicates."""
    generator = np.random.default_rng(3)
    arms = (INTERVALS.scores(INTERVALS.Spreads(), np.array([0.6, 0.6]), 8, items, generator) for _ in range(40))
    squares = [np.square(stats.spreads(second - first)) for first, second in arms]
    item_sd, run_sd = np.mean(squares, axis=0) ** 0.5
    return float(item_sd), float(run_sd)


@pytest.mark.parametrize("effect", [0.03, 0.0])
def test_a_planted_effect_is_found_and_none_is_called_equivalent_at_the_size_that_the_plan_names(effect: float) -> None:
    """+3 points are found, and 0 is called equivalent within 3 points, in four of five studies (250 simulated)."""
    items, margin = 1319, 0.03
    replicates = stats.replicates_needed(margin, items, *planned(items), equivalence=effect == 0)
    assert replicates is not None
    assert 3 < replicates < 20
    generator, right = np.random.default_rng(4), 0
    for _ in range(250):
        truth = np.array([0.6, 0.6 + effect])
        first, second = INTERVALS.scores(INTERVALS.Spreads(), truth, replicates, items, generator)
        drawn = stats.bootstrap(second - first, 2000)
        low, high = stats.percentiles(drawn, 0.9)
        right += stats.bootstrap_p(drawn) <= 0.05 if effect else -margin < low and high < margin
    assert right / 250 > 0.75, "80 % less two standard errors of 250 studies"


def test_a_plan_says_where_items_are_too_few_however_many_replicates_there_are() -> None:
    assert stats.replicates_needed(0.01, 500, 0.22, 0.02) is None
    assert stats.replicates_needed(0.01, 500, 0.0, 0.0) == 3
    assert stats.smallest_effect(10**9, 4, 0.2, 0.02) == pytest.approx(
        0.01 * scipy.optimize.brentq(lambda d: 1 - scipy.stats.nct.cdf(scipy.stats.t.ppf(0.975, 3), 3, d) - 0.8, 1, 9)
    )


def test_two_runs_that_agree_by_chance_show_nothing() -> None:
    """Equal counts in both runs on other items: without a correction for whole items the interval had no width."""
    difference = np.zeros((2, 40))
    difference[0, :2], difference[1, 2:4] = 1, 1
    drawn = stats.bootstrap(difference)
    low, high = stats.percentiles(drawn)
    assert low < 0 < high
    assert stats.bootstrap_p(drawn) > 0.05


def test_p_of_the_bootstrap_agrees_with_its_interval_and_a_t_test() -> None:
    noise = RNG.normal(size=(1, 300))
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    for shift in (0.0, 0.08, 0.125, 0.3):
        drawn = stats.bootstrap(noise + shift)
        low, _ = stats.percentiles(drawn)
        assert (stats.bootstrap_p(drawn) < 0.05) == (low > 0)
        assert stats.bootstrap_p(drawn) == pytest.approx(scipy.stats.ttest_1samp(noise[0] + shift, 0).pvalue, abs=0.02)


def test_the_same_data_give_the_same_numbers() -> None:
    before = stats.bootstrap(ROUGE)
    stats._draws.cache_clear()
    assert (stats.bootstrap(ROUGE) == before).all()
    assert not (stats.bootstrap(ROUGE, seed=1) == before).all()


def test_intervals_say_something_where_all_items_are_right() -> None:
    low, high = stats.interval(np.ones((1, 100)))
    assert 0.9 < low < 0.99
    assert high == pytest.approx(1)
    assert stats.interval(ROUGE) == stats.percentiles(stats.bootstrap(ROUGE))


def test_an_interval_of_shares_promises_nothing_impossible() -> None:
    low, high = stats.interval(np.repeat([[0.2], [0.9]], 50, axis=1))
    assert (low, high) == (0, 1), "two runs say little"
    low, high = stats.interval(np.repeat([[-3.0], [4.0]], 50, axis=1))
    assert low < -3, "not shares"
    low, high = stats.interval(np.ones((2, 100)))
    assert 0.9 < low < high == 1


def test_means_of_clusters_are_the_runs_means_and_items_that_agree_count_once() -> None:
    """50 passages with ten questions each, all right or all wrong: 50 answers, not 500."""
    right = RNG.random((3, 50)) < 0.6
    scores, clusters = np.repeat(right, 10, axis=1).astype(float), np.repeat(np.arange(50), 10)
    units = stats.by_cluster(scores, clusters)
    assert units.shape == (3, 50)
    assert units.mean(axis=1) == pytest.approx(scores.mean(axis=1))
    assert units == pytest.approx(right.astype(float)), "of one size, they are the clusters' means"
    assert stats.by_cluster(scores, np.arange(500)) == pytest.approx(scores), "items for themselves stay as they are"


def test_clustered_intervals_hold_where_those_of_items_do_not() -> None:
    """300 studies of one run: clusters of 1 to 19 items that share most of their luck."""
    generator, held = np.random.default_rng(11), {"items": 0, "clusters": 0}
    for _ in range(300):
        sizes = generator.integers(1, 20, 60)
        clusters = np.repeat(np.arange(60), sizes)
        scores = (generator.normal(0, 1, 60)[clusters] + generator.normal(0, 0.5, sizes.sum()) > 0).astype(float)[None]
        for name, units in (("items", scores), ("clusters", stats.by_cluster(scores, clusters))):
            low, high = stats.percentiles(stats.bootstrap(units, 2000))
            held[name] += low <= 0.5 <= high
    assert held["items"] / 300 < 0.7
    assert 0.9 < held["clusters"] / 300 < 0.98


def test_few_unequal_clusters_are_worth_what_bell_and_mccaffrey_say() -> None:
    """The closed form is that of the matrices; equal clusters have one degree of freedom less than there are."""
    clusters = np.repeat(np.arange(20), 10)
    few = stats.few_clusters((RNG.random((3, 200)) < 0.5).astype(float), clusters)
    assert (few.freedom, few.widening) == (pytest.approx(19), pytest.approx((20 / 19) ** 0.5))
    sizes = np.array([85, 80, 61, 37, 5, 3, 2, 1])
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    scores = (RNG.normal(0, 1, len(sizes))[clusters] + RNG.normal(0, 0.3, (1, len(clusters))) > 0).astype(float)
    few = stats.few_clusters(scores, clusters)
    own, shared = stats._within_and_between(scores.mean(axis=0), clusters, sizes.astype(float))
    residuals = np.eye(len(sizes)) - np.outer(sizes / sizes.sum(), np.ones(len(sizes)))
    covariance = residuals @ np.diag(sizes * own + sizes**2 * shared) @ residuals.T
    assert few.freedom == pytest.approx(np.trace(covariance) ** 2 / np.trace(covariance @ covariance))
    assert few.widening**2 == pytest.approx((sizes * own + sizes**2 * shared).sum() / np.trace(covariance))


def test_few_clusters_hold_the_truth_and_never_make_an_interval_shorter() -> None:
    """300 studies of three runs on 20 clusters of unequal sizes: percentiles of clusters alone hold in nine of ten."""
    generator = np.random.default_rng(3)
    sizes = np.array([60, 50, 40, 20, 10, *[5] * 15])
    clusters, held = np.repeat(np.arange(20), sizes), {"alone": 0, "few": 0}
    for _ in range(300):
        ability = generator.normal(0, 0.7, 20)[clusters] + generator.normal(0, 0.7, len(clusters))
        scores = (ability + generator.normal(0, 0.5, (3, len(clusters))) > 0).astype(float)
        drawn = {
            "alone": stats.bootstrap(stats.by_cluster(scores, clusters), 1000),
            "few": stats.bootstrap(scores, 1000, clusters=clusters),
        }
        for name, means in drawn.items():
            low, high = stats.percentiles(means)
            held[name] += low <= 0.5 <= high
    assert held["alone"] / 300 < 0.92
    assert held["few"] / 300 > 0.93
    # Each cluster's differences cancel out: the clusters' means do not vary, and say nothing of how others would.
    cancelling = np.tile([1.0, -1.0], (3, 50))
    items, few = (stats.bootstrap(cancelling, clusters=c) for c in (None, np.repeat(np.arange(50), 2)))
    assert few.std() >= 0.99 * items.std()


def test_only_right_and_wrong_are_counted_in_whole_items() -> None:
    """Runs of a likelihood whose means are equal differ by nothing; counts of right answers that are equal might."""
    fine = np.tile(np.linspace(0, 0.001, 50), (3, 1))
    assert np.ptp(stats.bootstrap(fine)) < 0.001
    assert np.ptp(stats.bootstrap(np.zeros((3, 50)))) > 0.01
    assert np.ptp(stats.bootstrap(np.full((3, 50), 0.25))) == 0
