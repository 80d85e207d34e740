"""What the variance of a score is made of: the items that were asked, the training's seed, the draw of its rows.

Where items belong together, clusters stand for items.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from d2lora.report.points import Point


@dataclass(frozen=True)
class Variances:
    """Variances of one training's score, by what they come from, averaged over arms; `design` says of what."""

    parts: dict[str, float]
    design: str

    def text(self) -> str:
        """Say the shares in percent."""
        total = sum(self.parts.values())
        shares = ", ".join(f"{name} {100 * part / total:.0f} %" for name, part in self.parts.items())
        return f"Shares of the variance of one training's score ({self.design}): {shares}."


def lines(points: Iterable[Point]) -> list[str]:
    """Say the shares where a table's points cross seeds and draws, or have replicates; nothing otherwise."""
    points = list(points)
    variances = crossed(points) or replicated(points)
    return [variances.text()] if variances and sum(variances.parts.values()) > 0 else []


def crossed(points: Iterable[Point]) -> Variances | None:
    """Tell the training's seed from the draw of its rows, where each of several seeds trained on each of several draws.

    A two-way random-effects analysis of variance of the trainings' means without replication (Searle, Casella and McCulloch
    1992, Variance Components, chapter 4); the rest is what seed and draw do together, with the noise of single answers.
    """
    arms: dict[tuple[object, ...], list[Point]] = {}
    for p in points:
        if "data_seed" in p.axes and p.scores:
            arms.setdefault(_arm(p), []).append(p)
    tables = [t for arm in arms.values() if (t := _crossed_scores(arm)) is not None]
    if not tables:
        return None
    draws, seeds, items = tables[0].shape
    means = np.mean([_two_way(t.mean(axis=2)) for t in tables], axis=0)
    of_items = float(np.mean([_of_items(t.reshape(-1, t.shape[2])) for t in tables]))
    parts = (of_items, *means)
    names = ("items", "training seed", "draw of the rows", "rest")
    design = f"{items:,} items, {seeds} seeds on each of {draws} draws, {_arms(len(tables))}"
    return Variances({n: max(float(x), 0.0) for n, x in zip(names, parts, strict=True)}, design)


def _arm(point: Point) -> tuple[object, ...]:
    others = tuple((k, v) for k, v in sorted(point.axes.items()) if k != "data_seed")
    names = (
        point.model,
        point.task,
        point.method,
        point.init,
        point.warmup,
        point.recipe,
        point.m,
        point.n,
        point.control,
    )
    return (*names, *others, *sorted(point.tested))


def _arms(count: int) -> str:
    return f"{count} arms" if count > 1 else "one arm"


def _crossed_scores(arm: list[Point]) -> np.ndarray | None:
    """Return scores (draws, seeds, units) of the seeds that all draws have; None for fewer than two of either."""
    shared = sorted(set.intersection(*(set(p.scores) for p in arm)))
    if len(arm) < 2 or len(shared) < 2:
        return None
    return np.stack([p.units_of(np.stack([p.scores[s] for s in shared])) for p in arm]).astype(float)


def _two_way(means: np.ndarray) -> tuple[float, float, float]:
    """Return the variances of seeds, draws and the rest from means (draws, seeds); small ones may come out negative."""
    draws, seeds = means.shape
    of_draws, of_seeds = means.mean(axis=1, keepdims=True), means.mean(axis=0, keepdims=True)
    rest = means - of_draws - of_seeds + means.mean()
    square_rest = float((rest**2).sum()) / ((draws - 1) * (seeds - 1))
    square_draws, square_seeds = seeds * float(of_draws.var(ddof=1)), draws * float(of_seeds.var(ddof=1))
    return (square_seeds - square_rest) / draws, (square_draws - square_rest) / seeds, square_rest


def _of_items(scores: np.ndarray) -> float:
    """Return what drawing other items adds to the variance of a mean of scores (runs, items), without single answers' noise."""
    runs, items = scores.shape
    rest = scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean()
    noise = float((rest**2).sum()) / ((runs - 1) * (items - 1))
    return (float(scores.mean(axis=0).var(ddof=1)) - noise / runs) / items


def replicated(points: Iterable[Point]) -> Variances | None:
    """Tell the items from the replicates, each another draw of the rows and another training."""
    tables = [p.units.astype(float) for p in points if len(p.draws) > 1 and len(p.scores) > 1 and len(p.table) > 1]
    if not tables:
        return None
    of_items = max(float(np.mean([_of_items(t) for t in tables])), 0.0)
    replicates = float(np.mean([t.mean(axis=1).var(ddof=1) for t in tables]))
    runs, items = tables[0].shape
    return Variances(
        {"items": of_items, "replicate": replicates}, f"{items:,} items, {runs} replicates, {_arms(len(tables))}"
    )
