"""What the report's intervals and tests promise, measured on simulated grids in which the truth is known.

python benchmarks/intervals.py [--grids 1000] [--items 500] [--replicates 3] [--output OUTPUTS]

A grid is LoRA and D2LoRA at four sizes of n, each in some replicates, all on the same items. An item is solved where a normal
number exceeds a threshold; the number is a sum of the item's difficulty, what the arm has of its own on it, the luck of a
training (the same on all items), and noise. Three figures that a lab's records show fix their spreads: the standard deviation
of an arm's accuracy over trainings, and on which share of the items two trainings of an arm, or two arms, disagree. The defaults
are assumptions in the range of the lab's; with --output they are read from the finished evaluations there.

Prints, for 95 % intervals, in how many cases they hold the truth; how often a difference of zero is called beyond chance at 5 %
(nominal 5 %), in a cell and after Holm's correction anywhere in a grid; how often +3 points are found.
Bounds: coverage 93 to 97 %, false positives at most 6.5 %.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from d2lora import stats

RESAMPLES = 2000  # a fifth of a report's: it moves a coverage by less than a tenth of a point
SIZES = 4  # of n in a grid
EFFECT = 0.03
LAB_TEMPLATES = (85, 80, 61, 37, 28, 27, 16, 11, 11, 10, 8, 6, 5, 5, 5, *[3] * 10, *[1] * 75)  # lab-math's test, about


@dataclass(frozen=True)
class Spreads:
    """How scores vary: fractions. `run_sd` is seen on `items` items, so it holds the noise of single items too."""

    accuracy: float = 0.6
    run_sd: float = 0.015
    between_runs: float = 0.15  # share of items on which two trainings of an arm disagree
    between_arms: float = 0.20
    templates: tuple[
        int, ...
    ] = ()  # sizes, of shares, of groups of items that have difficulty, and an arm's gain, in common
    shared: float = 0.5  # the group's share of an item's difficulty and of what an arm has of its own on it

    def deviations(self, items: int) -> tuple[float, float, float, float]:
        """Return the standard deviations of difficulty, an arm's own, a training's luck and noise; their squares add up to 1."""
        shared, same_arm = (
            _correlation(self.accuracy, self.between_arms),
            _correlation(self.accuracy, self.between_runs),
        )
        slope = NormalDist().pdf(NormalDist().inv_cdf(self.accuracy))
        luck = max(self.run_sd**2 - self.between_runs / 2 / items, 0.0) / slope**2
        parts = shared, max(same_arm - shared, 0.0), luck
        return tuple(max(x, 0.0) ** 0.5 for x in (*parts, 1 - sum(parts)))  # type: ignore[return-value]


def _correlation(accuracy: float, disagreement: float) -> float:
    """Return the correlation of two normal numbers that exceed a threshold with chance `accuracy` and disagree so often.

    They disagree with chance 4 T(h, sqrt((1 - r) / (1 + r))), Owen's T (Owen 1956), h being the threshold.
    """
    from scipy.optimize import brentq
    from scipy.special import owens_t

    threshold = NormalDist().inv_cdf(accuracy)
    gap = lambda r: 4 * owens_t(threshold, ((1 - r) / (1 + r)) ** 0.5) - disagreement  # noqa: E731
    return float(brentq(gap, -0.99, 0.9999))


def scores(spreads: Spreads, arms: np.ndarray, runs: int, items: int, generator: np.random.Generator) -> np.ndarray:
    """Simulate right and wrong (arms, runs, items) of arms with the true accuracies `arms` (arms,)."""
    difficulty, own, luck, noise = spreads.deviations(items)
    normal = lambda *shape: generator.standard_normal(shape, np.float32)  # noqa: E731
    groups = clusters_of(spreads, items)

    def of_items(count: int) -> np.ndarray:
        if groups is None:
            return normal(count, 1, items)
        of_groups = normal(count, 1, int(groups.max()) + 1)[:, :, groups]
        return spreads.shared**0.5 * of_groups + (1 - spreads.shared) ** 0.5 * normal(count, 1, items)

    ability = difficulty * of_items(1) + own * of_items(len(arms))
    ability = ability + luck * normal(len(arms), runs, 1) + noise * normal(len(arms), runs, items)
    thresholds = np.array([NormalDist().inv_cdf(a) for a in arms])
    return (ability > -thresholds[:, None, None]).astype(np.float32)


def clusters_of(spreads: Spreads, items: int) -> np.ndarray | None:
    """Return the group of each item (items,), of sizes in proportion to `templates`; None where items are independent."""
    if not spreads.templates:
        return None
    ends = np.cumsum(spreads.templates) / sum(spreads.templates) * items
    return np.searchsorted(ends, np.arange(items), side="right")


@dataclass
class Measured:
    """Shares of cases: what intervals held, and what tests called beyond chance."""

    value: float
    difference: float
    pooled: float
    false: float
    false_holm: float
    found: float
    half_width: float  # of a difference's interval, in points


def measure(spreads: Spreads, grids: int, runs: int, items: int, sizes: int = SIZES) -> Measured:
    """Simulate grids without an effect, and with +3 points for the power."""
    generator = np.random.default_rng(0)
    rows = [_grid(spreads, runs, items, sizes, generator) for _ in range(grids)]
    means = [float(np.mean([row[i] for row in rows])) for i in range(7)]
    return Measured(*means)


def _grid(spreads: Spreads, runs: int, items: int, sizes: int, generator: np.random.Generator) -> tuple[float, ...]:
    truth = np.repeat(spreads.accuracy, 2 * sizes)
    arms = scores(spreads, truth, runs, items, generator)
    differences, draw = arms[sizes:] - arms[:sizes], partial(stats.bootstrap, clusters=clusters_of(spreads, items))
    values = [_holds(draw(a, RESAMPLES), spreads.accuracy) for a in arms]
    drawn = [draw(d, RESAMPLES) for d in differences]
    p = [stats.bootstrap_p(d) for d in drawn]
    far = [stats.bootstrap_p(draw(d, RESAMPLES, wide=True)) for d in differences]
    pooled = draw(differences.mean(axis=0), RESAMPLES)
    effect = scores(spreads, np.array([spreads.accuracy, spreads.accuracy + EFFECT]), runs, items, generator)
    found = stats.bootstrap_p(draw(effect[1] - effect[0], RESAMPLES)) <= 0.05
    widths = [np.subtract(*stats.percentiles(d)[::-1]) / 2 for d in drawn]
    return (
        np.mean(values), np.mean([_holds(d, 0.0) for d in drawn]), _holds(pooled, 0.0), np.mean(np.array(p) <= 0.05),
        min(stats.holm(far if sizes > 1 else p)) <= 0.05, found, 100 * np.mean(widths),
    )  # fmt: skip


def _holds(resampled: np.ndarray, truth: float) -> bool:
    low, high = stats.percentiles(resampled)
    return low <= truth <= high


def spreads_of(output: Path) -> Spreads:
    """Read the spreads from all sweeps of an output folder: means over its accuracies and their pairs of LoRA and D2LoRA.

    Without a point of two seeds or more, those of trainings stay as assumed.
    """
    from d2lora.records import Records
    from d2lora.report import compare, manifest
    from d2lora.report.points import points_of

    records = Records(output)
    points = [p for s in manifest.sweeps(output) for p in points_of(manifest.read_manifest(output, s), records)]
    points = [p for p in points if p.scores and p.metric == "accuracy" and stats.is_binary(p.table)]
    pairs = set(compare.comparisons(points).values())
    if not pairs:
        raise SystemExit(f"{output}: no pair of LoRA and D2LoRA with answers that are right or wrong")
    found = Spreads(
        accuracy=float(np.mean([p.value for p in points])),
        between_arms=float(np.mean([np.abs(c.differences).mean() for c in pairs])),
    )
    several = [p.table for p in points if len(p.table) > 1]
    if not several:
        print(f"{output}: one seed: how trainings spread is assumed")
        return replace(found, between_runs=min(found.between_runs, found.between_arms))
    return replace(
        found,
        run_sd=float(np.mean([t.mean(axis=1).var(ddof=1) for t in several])) ** 0.5,
        between_runs=float(np.mean([np.abs(np.diff(t, axis=0)).mean() for t in several])),
    )


def conditions(lab: Spreads, replicates: int) -> Iterator[tuple[str, Spreads, int, int]]:
    """Yield what is simulated: a name, spreads, replicates, sizes of n in a grid."""
    yield f"as the lab, {replicates} replicates", lab, replicates, SIZES
    for runs in sorted({2, 3, 5} - {replicates}):
        yield f"as the lab, {runs} replicates", lab, runs, 1
    yield "trainings spread by 1 point", replace(lab, run_sd=0.01), replicates, 1
    yield "trainings spread by 2 points", replace(lab, run_sd=0.02), replicates, 1
    yield "trainings spread by 5 points", replace(lab, run_sd=0.05), replicates, 1
    yield "an arm's trainings agree (2 % of items differ)", replace(lab, between_runs=0.02), replicates, 1
    yield "arms differ by noise alone", replace(lab, between_runs=lab.between_arms), replicates, 1
    yield "50 passages of 10 items", replace(lab, templates=(10,) * 50), replicates, 1
    yield "templates as lab-math's", replace(lab, templates=LAB_TEMPLATES), replicates, 1
    yield "accuracy 95 %", Spreads(0.95, lab.run_sd / 2, 0.03, 0.04), replicates, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, default=1000)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--replicates", type=int, default=3)
    parser.add_argument("--only", default="", help="conditions whose name has this")
    parser.add_argument("--output", type=Path, help="an output folder whose evaluations give the spreads")
    args = parser.parse_args()
    lab, clock = spreads_of(args.output) if args.output else Spreads(), time.monotonic()
    print(f"{args.grids} grids, {args.items} items; {'read' if args.output else 'assumed'}: {lab}\n")
    print(
        "| spreads | value | difference | pooled | false positives | after Holm, in a grid | +3 points found | ± points |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, spreads, runs, sizes in conditions(lab, args.replicates):
        if args.only not in name:
            continue
        m = measure(spreads, args.grids, runs, args.items, sizes)
        shares = (m.value, m.difference, m.pooled, m.false, m.false_holm, m.found)
        print(f"| {name} | {' | '.join(f'{100 * x:.1f}' for x in shares)} | {m.half_width:.1f} |", flush=True)
    print(f"\n{time.monotonic() - clock:.0f} s")


if __name__ == "__main__":
    main()
