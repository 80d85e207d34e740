"""Make points, the entries of tables and figures, from a manifest and its records, with their items' scores."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from tqdm import tqdm

from d2lora import stats
from d2lora.errors import UserError
from d2lora.keys import canonical
from d2lora.records import Manifest, Records
from d2lora.report import axes
from d2lora.report.axes import LABELS, Axes, general
from d2lora.report.looks import QUANTIZING
from d2lora.scoring import is_graded, shown_metrics
from d2lora.settings import amount
from d2lora.settings.controls import NO_CONTROL, control_of
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.evaluate import EvaluateSpec


def differing(points: Iterable[Any]) -> list[str]:
    """Return the named parts and other settings that points differ in; that some do not depend on one is no difference."""
    points = list(points)
    labels = [k for k in LABELS if len({getattr(p, k) for p in points} - {""}) > 1]
    keys = dict.fromkeys(k for p in points for k in p.axes)
    return labels + [k for k in keys if len({p.axes[k] for p in points if k in p.axes}) > 1]


def by_benchmark(points: Iterable["Point"]) -> dict[str, list["Point"]]:
    """Return points by their benchmark and metric, as "lab_math accuracy"."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.measure, []).append(point)
    return groups


def label_texts(point: Any, keys: Iterable[str]) -> list[str]:
    """Return what a point has of named parts and settings, for a row's label or a panel's title: milora, lr=0.001."""
    names = [point.axes.get(k) and axes.text(k, point.axes[k]) if k not in LABELS else getattr(point, k) for k in keys]
    return [name for name in names if name]


def arm_name(m: int | str, control: str) -> str:
    """Return the name of an arm of any n: LoRA, D2LoRA(40k, n), or that of a control arm."""
    return "LoRA" if m == 0 else control_of(control).label.format(m=amount(m), n="n")


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
    control: str = NO_CONTROL  # the control arm that it is of
    limit: int | None = None  # of its benchmark's items: the first ones only
    axes: Axes = field(default_factory=dict)  # other settings that the sweep's cells differ in and that it depends on
    runs: dict[int, Run] = field(default_factory=dict)  # by seed
    scores: dict[int, np.ndarray] = field(default_factory=dict)  # by seed, of finished evaluations: (items,)
    clusters: np.ndarray | None = None  # of its items (items,), where the benchmark says which belong together
    draws: set[int] = field(default_factory=set)  # its cells' data_seed
    samples: int | None = None  # task samples trained on, where a record says so
    tuned: Axes = field(default_factory=dict)  # settings that were chosen for it on validation, each arm's its own
    tested: set[str] = field(default_factory=set)  # what its evaluations tested on: fingerprints, one if all is well

    @property
    def arm(self) -> str:
        return arm_name(self.m, self.control)

    @property
    def measure(self) -> str:
        """Return the benchmark and metric that it is a score in: lab_math accuracy."""
        return f"{self.benchmark} {self.metric}".strip()

    @property
    def arm_label(self) -> str:
        """Return the label of an arm with a warm-up or of a control arm, with {m} and {n} to fill in."""
        return control_of(self.control).label

    def value_of(self, key: str) -> int | str:
        """Return n, m, a named part or another setting; empty where the point does not depend on it."""
        return getattr(self, key) if key in ("n", "m", "method", "control", *LABELS) else self.axes.get(key, "")

    @property
    def rows(self) -> int | None:
        """Return n as a number of rows; of "all" as many as its records say, None while there are none."""
        return self.samples if self.n == "all" else int(self.n)

    @property
    def is_base(self) -> bool:
        """Tell whether it is the base itself: one evaluation serves all seeds, methods, initializations and recipes,
        except own_base.
        """
        return self.m == 0 and self.n == 0 and not self.own_base

    @property
    def own_base(self) -> bool:
        """Tell whether it starts from a quantized base, which is another model than the base itself."""
        return self.init in QUANTIZING

    @cached_property
    def table(self) -> np.ndarray:
        """Return the scores (runs, items); seeds with the same evaluation count once."""
        return np.stack(list({self.runs[s].evaluate: x for s, x in self.scores.items()}.values()))

    @property
    def units(self) -> np.ndarray:
        """Return scores by what may be drawn by itself (runs, units): items, or clusters where items belong together."""
        return self.units_of(self.table)

    def units_of(self, scores: np.ndarray) -> np.ndarray:
        """Return scores, or differences, of its items (runs, items) by item or cluster (runs, units)."""
        return scores if self.clusters is None else stats.by_cluster(scores, self.clusters)

    @property
    def value(self) -> float | None:
        return float(self.table.mean(dtype=float)) if self.scores else None

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of the value: stats.interval; of clustered items, from clusters drawn again."""
        return stats.interval(self.table, is_graded(self.metric), self.clusters) if self.scores else None


def interval_of(records: Records, key: str, metric: str, varies: str | None) -> tuple[float, float]:
    """Return the 95 % interval of a finished evaluation's metric, as tables have it for one training.

    `varies` is the benchmark's pattern of what differs between items of one template.
    """
    records.get(EvaluateSpec.KIND, key)
    return stats.interval(records.scores(key, metric)[None], is_graded(metric), records.clusters(key, varies))


def varies_of(config: dict[str, Any], benchmark: str) -> str | None:
    """Return a benchmark's pattern of what differs between items of one template, from a manifest's cell; older ones have none."""
    task = config["task"]
    return (task["benchmark"].get(benchmark) or (task.get("validation") or {}).get(benchmark) or {}).get("varies")


def points_of(manifest: Manifest, records: Records, folded: Collection[str] = ()) -> list[Point]:
    """Return the sweep's points in the benchmarks' main metrics, with the seeds folded and every other axis told apart.

    `folded` are settings of which each arm has one value, chosen for it: they are no axes.
    """
    labels, differing_keys = axes.differing_settings(manifest.cells)
    keys = [key for key in differing_keys if key not in folded]
    metrics = main_metrics(manifest, records)
    points: dict[tuple[object, ...], Point] = {}
    for cell in tqdm(manifest.cells, desc=f"reading {manifest.sweep}", leave=False, disable=None):
        c, stages = cell.config, cell.stages
        names = {k: c[k]["name"] for k in LABELS} | ({} if general(c) else {"warmup": ""})
        shape = {"method": c["method"]["name"], "m": c["m"], "n": c["n"], "control": axes.control(c)}
        for benchmark, key in stages.evaluate.items():
            others = axes.axes_of(cell, benchmark, keys)
            run = Run(cell.id, key, stages.adapt, stages.warmup, stages.prepare, stages.flips.get(benchmark))
            limit = c["task"]["benchmark"].get(benchmark, {}).get("limit")
            for metric in metrics[benchmark]:
                identity = (*(names[k] for k in labels), *shape.values(), benchmark, metric, *sorted(others.items()))
                if identity not in points:
                    points[identity] = Point(
                        **names, **shape, benchmark=benchmark, metric=metric, limit=limit, axes=others,
                        tuned=axes.axes_of(cell, benchmark, folded),
                    )  # fmt: skip
                points[identity].draws.add(c["data_seed"])
                _add(points[identity], c["seed"], run, records, varies_of(c, benchmark))
    return list(points.values())


def _add(point: Point, seed: int, run: Run, records: Records, varies: str | None) -> None:
    before = point.runs.setdefault(seed, run)
    if before.evaluate != run.evaluate:  # promise 10: two results under one seed are an axis that was not told apart
        raise UserError(f"a table would hide what tells {before.cell} from {run.cell}: give each its own sweep=NAME")
    record = records.get(EvaluateSpec.KIND, run.evaluate)
    if record and point.metric in record.scores:
        point.scores[seed] = records.scores(run.evaluate, point.metric)
        point.clusters = records.clusters(run.evaluate, varies)
        spec = record.spec
        point.tested.add(canonical(spec.get("benchmark") or [spec.get("lm_eval"), spec.get("harness")]))
        if len(point.tested) > 1:
            raise UserError(
                f"seeds of one cell were tested on different items of {point.benchmark} ({run.cell}): give each its own sweep=NAME"
            )
    if (adapt := records.get(AdaptSpec.KIND, run.adapt)) and adapt.data:
        point.samples = adapt.data.samples


def main_metrics(manifest: Manifest, records: Records) -> dict[str, list[str]]:
    """Return each benchmark's metrics to show: [""] while it has no result."""
    metrics_of: dict[str, list[str]] = {}
    for cell in manifest.cells:
        for benchmark, key in cell.stages.evaluate.items():
            metrics = metrics_of.setdefault(benchmark, [])
            if not metrics and (record := records.get(EvaluateSpec.KIND, key)):
                metrics += shown_metrics(list(record.scores))
    return {benchmark: metrics or [""] for benchmark, metrics in metrics_of.items()}


def size(amount: int | str) -> float:
    """Return a sort key for amounts: "all" comes last."""
    return float("inf") if amount == "all" else float(amount)
