"""What the comparisons of one table say together: counts, the effect pooled over its cells, and both in words."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from d2lora import stats
from d2lora.report.compare import ALPHA, Comparison, count_beyond_chance, count_decided, draws_of, seeds_text


@dataclass(frozen=True)
class Pooled:
    """D2LoRA minus LoRA, averaged over cells: a fraction with its 95 % interval. `cells` are in it, `left_out` are not."""

    difference: float
    interval: tuple[float, float]
    cells: int
    left_out: int


def pooled(comparisons: Iterable[Comparison]) -> Pooled | None:
    """Average the comparisons that were asked the same items and share the same seeds; None where that are fewer than two.

    An item's difference is averaged over cells before items are drawn again and runs are judged, so what cells share (items, and
    an arm that several are compared with) is not taken for independent.
    """
    unique = list(dict.fromkeys(comparisons))
    groups: dict[tuple[object, ...], list[Comparison]] = {}
    for c in unique:
        groups.setdefault((*sorted(c.lora.tested | c.d2lora.tested), c.seeds, c.differences.shape), []).append(c)
    largest = max(groups.values(), key=len, default=[])
    if len(largest) < 2:
        return None
    differences = np.mean([c.differences for c in largest], axis=0)
    interval = stats.percentiles(stats.bootstrap(differences, clusters=largest[0].clusters))
    return Pooled(float(differences.mean(dtype=float)), interval, len(largest), len(unique) - len(largest))


def verdict(comparisons: Iterable[Comparison]) -> str:
    """Say in words and numbers what the comparisons of one table say, so that nobody reads noise as a gain."""
    unique = list(dict.fromkeys(comparisons))
    if not unique:
        return "No pair of LoRA and D2LoRA to compare yet."
    better, worse = ([c for c in unique if sign * c.difference > 0] for sign in (1, -1))
    text = (
        f"D2LoRA beats LoRA in {len(better)} of {cells_text(len(unique))}; beyond chance in {count_beyond_chance(better)}"
        f" (Holm, alpha {100 * ALPHA:.0f} %). "
        f"LoRA beats D2LoRA in {len(worse)}; beyond chance in {count_beyond_chance(worse)}."
    )
    parts = [text, _equivalence(unique), _pooled(unique), _mean(unique), _seeds(unique)]
    return " ".join(filter(None, parts))


def cells_text(count: int) -> str:
    """Return a number of cells: 1 cell, 2 cells."""
    return f"{count} cell{'s'[: count != 1]}"


def _equivalence(unique: list[Comparison]) -> str:
    within = f"Equivalent within {unique[0].margin_text} (two one-sided tests, {100 * ALPHA:.0f} %)"
    return f"{within} in {count_decided(unique, 'equivalent')}, undecided in {count_decided(unique, 'undecided')}."


def _pooled(unique: list[Comparison]) -> str:
    effect = pooled(unique)
    if effect is None:
        return ""
    unit = unique[0].unit
    difference, low, high = (unit.value(x, "+") for x in (effect.difference, *effect.interval))
    # Items that all differ alike, mostly by nothing, resample to themselves: such an interval would look as if all were known.
    interval = f"[{low}, {high}] (95 %)" if np.ptp(effect.interval) else "(all items differ alike: no interval)"
    text = f"Pooled over {cells_text(effect.cells)}: {difference} {unit.several} {interval}"
    left_out = f", without {cells_text(effect.left_out)} of other items or seeds" if effect.left_out else ""
    return f"{text}{left_out}."


def _mean(unique: list[Comparison]) -> str:
    unit = unique[0].unit
    text = f"The mean difference is {unit.value(sum(c.difference for c in unique) / len(unique), '+')} {unit.several}"
    detectable = [c.detectable for c in unique if c.detectable]
    if detectable:
        sizes = dict.fromkeys(unit.rounded(size) for size in (min(detectable), max(detectable)))
        span = " to ".join(size.removesuffix(f" {unit.several}") for size in sizes)
        text += f"; before Holm's correction a cell shows differences from {span} {unit.several} on, four times in five"
    return f"{text}."


def _seeds(unique: list[Comparison]) -> str:
    seeds = {s for c in unique for s in c.seeds}
    fewer = sum(len(c.seeds) < len(seeds) for c in unique)
    text = seeds_text(seeds, draws_of(p for c in unique for p in (c.lora, c.d2lora)))
    return text + (f" {cells_text(fewer)} with fewer: see seeds." if fewer else "")
