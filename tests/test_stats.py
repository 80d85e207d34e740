"""The statistics against scipy and statsmodels, and against what they promise on made data."""

import numpy as np
import pytest
import scipy.stats

from d2lora import stats

RNG = np.random.default_rng(7)
FIRST = (RNG.random(400) < 0.5).astype(float)
SECOND = np.where(RNG.random(400) < 0.2, 1 - FIRST, FIRST)
ROUGE = RNG.beta(2, 5, size=(1, 100))


@pytest.mark.parametrize(("right", "items"), [(0, 20), (1, 20), (53, 100), (1319, 1319)])
def test_wilson_is_scipy_s(right: int, items: int) -> None:
    expected = scipy.stats.binomtest(right, items).proportion_ci(method="wilson")
    assert stats.wilson(right, items) == pytest.approx((expected.low, expected.high))


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


def test_smallest_detectable_difference_has_the_power_that_statsmodels_finds() -> None:
    power = pytest.importorskip("statsmodels.stats.power")
    spread, items = 0.4, 1000
    expected = power.TTestPower().solve_power(nobs=items, alpha=0.05, power=0.8) * spread
    assert stats.smallest_detectable(spread / items**0.5) == pytest.approx(expected, rel=5e-3)


def test_a_difference_of_that_size_is_found_four_times_in_five() -> None:
    """Simulated: 500 items, 20 % of which only one arm has right."""
    items, discordant, tries = 500, 0.2, 1000
    size = stats.smallest_detectable((discordant / items) ** 0.5, items)
    draws = RNG.multinomial(items, [(discordant + size) / 2, (discordant - size) / 2, 1 - discordant], size=tries)
    found = 0
    for won, lost, _ in draws:
        second = np.repeat([1.0, 0.0, 0.0], [won, lost, items - won - lost])
        first = np.repeat([0.0, 1.0, 0.0], [won, lost, items - won - lost])
        found += stats.mcnemar(first, second) <= 0.05
    assert 0.74 < found / tries < 0.86


def test_the_exact_test_needs_six_items() -> None:
    nothing, some = np.zeros(100), np.repeat([1.0, 0.0], [6, 94])
    assert stats.mcnemar(nothing, some) < 0.05 < stats.mcnemar(nothing, np.roll(some, -1) * some)
    assert stats.smallest_detectable(0.001, 100) == 0.06


def test_one_run_s_bootstrap_is_scipy_s() -> None:
    difference = (SECOND - FIRST)[None]
    for scores in (difference, ROUGE):
        expected = scipy.stats.bootstrap((scores[0],), np.mean, n_resamples=10_000, method="percentile", rng=1)
        drawn = stats.bootstrap(scores)
        width = expected.confidence_interval.high - expected.confidence_interval.low
        assert stats.percentiles(drawn) == pytest.approx(tuple(expected.confidence_interval), abs=0.04 * width)
        assert drawn.std() == pytest.approx(expected.standard_error, rel=0.04)


def test_several_runs_spread_is_that_of_runs_and_of_items() -> None:
    """Scores = item + run: the variance of their mean is var(run) / runs + var(item) / items."""
    items, runs = RNG.normal(size=200), np.array([-0.3, 0.05, 0.1, 0.15])
    drawn = stats.bootstrap(items[None] + runs[:, None])
    expected = runs.var(ddof=1) / 4 + items.var() / 200
    assert drawn.var() == pytest.approx(expected, rel=0.05)
    alone = stats.bootstrap((items[None] + runs[:, None]).mean(axis=0, keepdims=True))
    assert drawn.std() > 1.2 * alone.std(), "the spread between training runs must widen the interval"


@pytest.mark.parametrize("runs", [2, 3])
def test_chance_alone_is_seldom_called_more(runs: int) -> None:
    """Two arms that differ in nothing but the luck of their seeds (2 points each): at most about 5 % are called different."""
    called, tries = 0, 150
    for _ in range(tries):
        items, luck, noise = RNG.random(200), RNG.normal(0, 0.02, (2, runs, 1)), RNG.normal(0, 0.2, (2, runs, 200))
        first, second = (items + luck + noise > 0.5).astype(float)
        called += stats.bootstrap_p(stats.bootstrap(second - first, 2000)) < 0.05
    assert called / tries < 0.09


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
