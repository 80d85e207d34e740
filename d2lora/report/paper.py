"""Define the paper's Tables 1 and 3 and Figures 1 to 4 by their cells, at the paper's scale and the lab's, with its
numbers.
"""

import csv
import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from d2lora.report.axes import LABELS
from d2lora.report.looks import PLAIN
from d2lora.report.points import Point
from d2lora.settings.controls import NO_CONTROL
from d2lora.settings.methods import Dpo, Orpo, Sft

SFT, DPO, ORPO = (method.model_fields["name"].default for method in (Sft, Dpo, Orpo))
_ALL_TITLES = 7000  # Table 1's last column says 7k and can only mean all pairs that are not held out
_WARMUPS = ("", "mix40k")  # none, and the paper's mix


@dataclass(frozen=True)
class Scale:
    """The names that the paper's two tasks and their benchmarks have at one scale."""

    math: tuple[str, str]  # task, benchmark
    titles: tuple[str, str]
    forgetting: tuple[str, str]
    small: int  # the largest n of Figure 4, the smallest but 0 of the other artefacts


SCALES = (
    Scale(("math", "gsm8k"), ("title", "econ_titles"), ("math", "arc_easy"), 1000),
    Scale(("lab-math", "lab_math"), ("lab-title", "lab_title"), ("lab-math", "lab_recall"), 100),
    # Grids without lab_recall, as the lab's task has it by itself.
    Scale(("lab-math", "lab_math"), ("lab-title", "lab_title"), ("lab-math", "lab_facts"), 100),
)


@dataclass(frozen=True)
class Artefact:
    """A table or figure: which cells it shows, in what panels."""

    name: str
    caption: str
    role: Literal["math", "titles", "forgetting"]
    methods: tuple[str, ...] = (SFT, DPO, ORPO)
    sizes: Literal["large", "small"] = "large"
    warmed: bool = True  # whether D2LoRA is in it
    panel: Literal["all", "method"] = "method"


TABLES = (
    Artefact("table1", "Table 1: ROUGE of LoRA and D2LoRA in title generation", "titles", (SFT,)),
    Artefact("table3", "Table 3: accuracy of SFT, DPO and ORPO, LoRA and D2LoRA, in mathematical reasoning", "math"),
)
FIGURES = (
    Artefact("figure1", "Figure 1: SFT, DPO and ORPO with LoRA over n", "math", warmed=False, panel="all"),
    Artefact("figure2", "Figure 2: LoRA and D2LoRA over n for each method", "math"),
    Artefact("figure3", "Figure 3: what the base knew (forgetting) over n for each method", "forgetting"),
    Artefact("figure4", "Figure 4: LoRA and D2LoRA with ORPO and few samples", "math", (ORPO,), "small"),
)


def select(artefact: Artefact, points: Iterable[Point]) -> list[Point]:
    """Return the points of an artefact; none unless they have at least two sizes n and all its methods and arms, once
    each.

    The artefact has rows for methods and arms only, so a sweep over models, initializations, warm-up sets, recipes or
    several m is shown in the sweep's own table instead.
    """
    points = list(points)
    wanted = set(itertools.product(artefact.methods, {False, artefact.warmed}))
    for scale in SCALES:
        chosen = [p for p in points if _belongs(artefact, scale, p)]
        sizes, arms = {p.n for p in chosen} - {0}, {(p.method, p.m != 0) for p in chosen}
        if len(sizes) > 1 and arms == wanted and _is_one_grid(chosen):
            return chosen
    return []


def _is_one_grid(points: list[Point]) -> bool:
    """Tell whether points differ in nothing but method, n, and whether there is a warm-up."""
    keys = dict.fromkeys(k for p in points for k in p.axes)
    return all(len({p.value_of(k) for p in points} - {"", 0}) <= 1 for k in (*LABELS, "m", *keys))


def _belongs(artefact: Artefact, scale: Scale, point: Point) -> bool:
    if (point.task, point.benchmark) != getattr(scale, artefact.role):
        return False
    if point.control != NO_CONTROL or point.method not in artefact.methods or not (artefact.warmed or point.m == 0):
        return False
    size = float("inf") if point.n == "all" else float(point.n)
    return 0 < size <= scale.small if artefact.sizes == "small" else size == 0 or size >= scale.small


def value(point: Point) -> float | None:
    """Return the paper's number for a point, as a fraction; None if it has none for this model, task, size and so on.

    The paper does not say which ROUGE Table 1 has, so its number is shown beside each. Nor does it say whether a pair's
    next step or its whole remaining solution is learned, so its number is shown beside both values of
    `task.continuation`.
    """
    usual = (point.init, point.recipe, point.limit, point.axes) == (PLAIN, "paper", None, {})
    if not usual or point.tuned or point.warmup not in _WARMUPS:
        return None
    n = _ALL_TITLES if point.task == "title" and point.n == "all" else point.n
    metric = "rouge" if point.metric.startswith("rouge") else point.metric
    return _numbers().get((point.model, point.task, point.benchmark, metric, point.method, str(point.m), str(n)))


@functools.cache
def _numbers() -> dict[tuple, float]:
    keys = ("model", "task", "benchmark", "metric", "method", "m", "n")
    with (files("d2lora.report") / "reference.csv").open() as file:
        return {tuple(row[k] for k in keys): float(row["value"]) / 100 for row in csv.DictReader(file)}
