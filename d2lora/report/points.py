"""Points: what tables and figures show, from a manifest and its records, each with its items' scores."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from tqdm import tqdm

from d2lora import stats
from d2lora.errors import UserError
from d2lora.keys import canonical
from d2lora.records import Manifest, ManifestCell, Records
from d2lora.report.looks import QUANTIZING
from d2lora.scoring import shown_metrics
from d2lora.settings import amount

# What a table shows beside method, m and n, when its cells differ in it.
LABELS = ("model", "task", "init", "warmup", "recipe")
# How, not what: in no stage's key, so no axis.
MACHINE = tuple(
    f"recipe.{k}"
    for k in ("micro_batch", "eval_batch", "attention", "gradient_checkpointing", "threads", "checkpoint_minutes")
)
_FROM_RECIPE = ("method.epochs", "warmup.epochs")  # conf takes them from recipe.epochs


def differing(points: Iterable[Any]) -> list[str]:
    """The labels that points differ in, whatever has them; that LoRA has no warm-up is no difference."""
    points = list(points)
    return [k for k in LABELS if len({getattr(p, k) for p in points} - {""}) > 1]


@dataclass(frozen=True)
class Run:
    """One training seed of a point: the keys of its stages."""

    cell: str
    evaluate: str
    adapt: str | None
    warmup: str | None
    prepare: str | None = None
    flips: str | None = None  # of a bfloat16 base


@dataclass(eq=False)
class Point:
    """One entry of a table: what a cell of the grid scores in one metric of one benchmark, over its training seeds."""

    model: str
    task: str
    method: str
    init: str
    warmup: str  # empty where there is none
    recipe: str
    m: int | str
    n: int | str
    benchmark: str
    metric: str  # empty while no cell has a result
    limit: int | None = None  # of its benchmark's items: the first ones only
    runs: dict[int, Run] = field(default_factory=dict)  # by seed
    scores: dict[int, np.ndarray] = field(default_factory=dict)  # by seed, of finished evaluations: (items,)
    samples: int | None = None  # task samples trained on, where a record says so
    tested: set[str] = field(default_factory=set)  # what its evaluations tested on: fingerprints, one if all is well

    @property
    def arm(self) -> str:
        return "LoRA" if self.m == 0 else f"D2LoRA({amount(self.m)}, n)"

    @property
    def is_base(self) -> bool:
        """The base itself: one evaluation serves all seeds, methods, initializations and recipes but those of own_base."""
        return self.m == 0 and self.n == 0 and not self.own_base

    @property
    def own_base(self) -> bool:
        """Whether it starts from a quantized base, which is another model than the base itself."""
        return self.init in QUANTIZING

    @cached_property
    def table(self) -> np.ndarray:
        """Scores (runs, items), equal evaluations once."""
        return np.stack(list({self.runs[s].evaluate: x for s, x in self.scores.items()}.values()))

    @property
    def value(self) -> float | None:
        return float(self.table.mean(dtype=float)) if self.scores else None

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the value: stats.interval."""
        return stats.interval(self.table) if self.scores else None


def points_of(manifest: Manifest, records: Records) -> list[Point]:
    """The sweep's points in the benchmarks' main metrics; seeds folded. UserError where that would hide an axis."""
    labels = shown_labels(manifest.cells)
    metrics = main_metrics(manifest, records)
    points: dict[tuple, Point] = {}
    for cell in tqdm(manifest.cells, desc=f"reading {manifest.sweep}", leave=False, disable=None):
        c, stages = cell.config, cell.stages
        names = {k: c[k]["name"] for k in LABELS} | ({} if general(c) else {"warmup": ""})
        for benchmark, key in stages.evaluate.items():
            flips = stages.flips.get(benchmark)
            run = Run(cell.id, key, stages.adapt, stages.warmup, stages.prepare, flips)
            for metric in metrics[benchmark]:
                axes = (*(names[k] for k in labels), c["method"]["name"], c["m"], c["n"], benchmark, metric)
                if axes not in points:
                    shape = {"method": c["method"]["name"], "m": c["m"], "n": c["n"]}
                    shape["limit"] = c["task"]["benchmark"].get(benchmark, {}).get("limit")
                    points[axes] = Point(**names, **shape, benchmark=benchmark, metric=metric)
                _add(points[axes], c["seed"], run, records)
    return list(points.values())


def _add(point: Point, seed: int, run: Run, records: Records) -> None:
    point.runs[seed] = run
    record = records.get("evaluate", run.evaluate)
    if record and point.metric in record.scores:
        point.scores[seed] = records.scores(run.evaluate, point.metric)
        spec = record.spec
        point.tested.add(canonical(spec.get("benchmark") or spec.get("lm_eval")))
        if len(point.tested) > 1:
            raise UserError(
                f"seeds of one cell were tested on different items of {point.benchmark} ({run.cell}): give each its own sweep=NAME"
            )
    if (adapt := records.get("adapt", run.adapt)) and adapt.data is not None:
        point.samples = adapt.data["samples"]


def main_metrics(manifest: Manifest, records: Records) -> dict[str, list[str]]:
    """Each benchmark's metrics to show: [""] while it has no result."""
    shown: dict[str, list[str]] = {}
    for cell in manifest.cells:
        for benchmark, key in cell.stages.evaluate.items():
            metrics = shown.setdefault(benchmark, [])
            if not metrics and (record := records.get("evaluate", key)):
                metrics += shown_metrics(list(record.scores))
    return {benchmark: metrics or [""] for benchmark, metrics in shown.items()}


def shown_labels(cells: list[ManifestCell]) -> list[str]:
    """The axes beside method, m and n that the cells differ in and a table can show; seeds are folded.

    UserError naming what they differ in otherwise. A setting may differ with what is shown of where it is from: DPO's epochs
    with the method and the recipe.
    """
    names = [{k: c.config[k]["name"] for k in (*LABELS, "method")} for c in cells]
    labels = [k for k in LABELS if len({n[k] for n in names}) > 1]
    groups: dict[str, dict[tuple, Any]] = defaultdict(dict)
    for cell, name in zip(cells, names, strict=True):
        for key, value in flat(cell.config):
            if not _is_axis(key, cell.config):
                continue
            origins = {key.split(".")[0], "recipe"} if key in _FROM_RECIPE else {key.split(".")[0]}
            shown = tuple(name[k] for k in (*labels, "method") if k in origins)
            before = groups[key].setdefault(shown, value)
            if before != value:
                raise UserError(
                    f"a table would hide that its cells differ in {key} ({before} and {value}): give each its own sweep=NAME"
                )
    return labels


def _is_axis(key: str, config: dict) -> bool:
    """Whether a table would hide that cells differ in this setting, if it did not show it."""
    if key in MACHINE or (key == "recipe.packing" and not config["recipe"]["lora"]["dropout"]):
        return False
    top = key.split(".")[0]
    return top not in ("n", "m", "sweep", "seed") and (top != "warmup" or general(config))


def general(config: dict) -> bool:
    """Whether a cell uses general data: in a warm-up, or to start its adapter."""
    return config["m"] != 0 or config["init"].get("data") == "general"


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values, as text, of nested mappings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, str(value)


def size(amount: int | str) -> float:
    """Sorts amounts: all comes last."""
    return float("inf") if amount == "all" else float(amount)
