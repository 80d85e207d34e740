"""Manifests joined to records: results.csv, and the points that tables and figures show, each with its items' scores."""

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from d2lora import stats
from d2lora.errors import UserError
from d2lora.keys import canonical
from d2lora.report.manifest import read_manifest, sweeps
from d2lora.scoring import shown_metrics
from d2lora.settings import QUANTIZING, amount
from d2lora.store import read_record

COLUMNS = [
    "cell_id",
    "sweep",
    "model",
    "task",
    "method",
    "init",
    "warmup",
    "recipe",
    "lr",
    "reference",
    "m",
    "n",
    "seed",
    "benchmark",
    "metric",
    "value",
    "stderr",
    "items",
    "cut",
    "empty",
    "eval_batch",
    "train_seconds",
    "eval_seconds",
    "peak_memory_mb",
    "stage_key",
    "misfits",
    "left_out",
    "batch_flips",
    "batch_difference",
]
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


class Records:
    """Records by stage name and key, and the items of evaluations, each read once."""

    def __init__(self, output: Path) -> None:
        self.folder = output / "store"
        self.known: dict[tuple[str, str], dict] = {}
        self.items: dict[str, dict[str, np.ndarray]] = {}

    def get(self, stage: str, key: str | None) -> dict | None:
        """The record, None if the stage is not finished. UserError if it is damaged."""
        if key is None:
            return None
        if (stage, key) not in self.known:
            found = read_record(self.folder / stage / key)
            if found is None:
                return None
            self.known[stage, key] = found
        return self.known[stage, key]

    def scores(self, key: str, metric: str) -> np.ndarray:
        """The metric of each item (items,) of a finished evaluation; metric "index" is the items' places in their set.

        UserError if the items are not those of the record.
        """
        if key not in self.items:
            record = self.known["evaluate", key]
            self.items[key] = _read_scores(self._file(key), record["metrics"])
        return self.items[key][metric]

    def texts(self, key: str, places: list[int]) -> list[dict]:
        """Whole items of a finished evaluation by their place in its file."""
        wanted = set(places)
        with self._file(key).open() as lines:
            found = {i: json.loads(line) for i, line in enumerate(lines) if i in wanted}
        return [found[i] for i in places]

    def _file(self, key: str) -> Path:
        return self.folder / "evaluate" / key / "items.jsonl"


def _read_scores(file: Path, metrics: dict) -> dict[str, np.ndarray]:
    columns = ["index", *metrics]
    try:
        text = file.read_text().strip().replace("\n", ",")  # one call of the decoder a file: a third of the time
        table = np.array([[item[c] for c in columns] for item in json.loads(f"[{text}]")], float)
        table = table.reshape(-1, len(columns))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: not readable ({error!r}); move its folder away to have it done again") from None
    scores = {c: table[:, i].astype(np.float32) for i, c in enumerate(columns)}
    for metric, summary in metrics.items():
        if (
            len(table) != summary["items"]
            or abs(float(table[:, columns.index(metric)].mean()) - summary["value"]) > 1e-6
        ):
            raise UserError(f"{file}: its items do not give the record's {metric}; move its folder away")
    return scores


# --- results.csv ---------------------------------------------------------------------------------------------------


def result_rows(manifest: dict, records: Records) -> Iterator[dict]:
    """One row a cell, benchmark and metric; a cell without its evaluation has one row with empty values.

    Earlier cells of the sweep's name have rows where they are finished.
    """
    finished = (
        c for c in manifest["earlier"] if all(records.get("evaluate", k) for k in c["stages"]["evaluate"].values())
    )
    for cell in [*manifest["cells"], *finished]:
        c, stages = cell["config"], cell["stages"]
        trained = [r for name in ("prepare", "warmup", "adapt") if (r := records.get(name, stages.get(name)))]
        rates = c["recipe"]["lr"]
        common = {
            "cell_id": cell["id"],
            "sweep": manifest["sweep"],
            **{k: c[k]["name"] for k in ("model", "task", "method", "init", "recipe")},
            "warmup": c["warmup"]["name"] if _general(c) else "",
            "lr": rates[c["method"]["name"]] if stages["adapt"] else rates["warmup"] if stages["warmup"] else "",
            "reference": c["method"].get("reference") or "",
            **{k: c[k] for k in ("m", "n", "seed")},
            **unused(trained),
            "train_seconds": round(sum(r["seconds"] for r in trained if r["stage"] != "prepare"), 3),
        }
        for benchmark, key in stages["evaluate"].items():
            record = records.get("evaluate", key)
            flips = records.get("flips", stages.get("flips", {}).get(benchmark))
            memory = max((r["peak_memory_mb"] for r in [*trained, record] if r), default="")
            measured = {
                "eval_seconds": record["seconds"] if record else "",
                "peak_memory_mb": memory,
                "stage_key": key,
                "benchmark": benchmark,
                "eval_batch": (record or {}).get("eval_batch", ""),
                **{k: (record or {}).get("counts", {}).get(k, "") for k in ("cut", "empty")},
            }
            for metric, summary in (
                record["metrics"] if record else {"": {"value": "", "stderr": "", "items": ""}}
            ).items():
                yield common | measured | {"metric": metric, **summary} | _batch(flips, metric)


def _batch(flips: dict | None, metric: str) -> dict:
    """The share of a bfloat16 base's answers that its batch turns, and what that does to the metric."""
    found = flips["metrics"] if flips else {}
    names = {"batch_flips": "answers_flipped", "batch_difference": f"{metric}_difference"}
    return {column: found[name]["value"] for column, name in names.items() if name in found}


def unused(trained: list[dict]) -> dict[str, int | str]:
    """How many rows a cell's trainings passed over: too long ones, and those left out by reason; empty without a training."""
    counts = [r["data"] for r in trained if r["stage"] != "prepare" and r.get("data")]
    reasons: Counter[str] = Counter()
    for count in counts:
        reasons.update(count.get("left_out", {}))
    left_out = "; ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
    return {"misfits": sum(count.get("misfits", 0) for count in counts) if counts else "", "left_out": left_out}


def write_results(output: Path, records: Records) -> tuple[Path, list[str]]:
    """outputs/report/results.csv from all manifests; the file, and a line for each sweep that is not in it: damaged."""
    file = output / "report" / "results.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    damaged = []
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        for sweep in sweeps(output):
            try:
                writer.writerows(list(result_rows(read_manifest(output, sweep), records)))
            except UserError as error:
                damaged.append(f"sweep {sweep} is not in results.csv: {error}")
    return file, damaged


# --- points --------------------------------------------------------------------------------------------------------


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


def points(manifest: dict, records: Records) -> list[Point]:
    """The sweep's points in the benchmarks' main metrics; seeds folded. UserError where that would hide an axis."""
    labels = shown_labels(manifest["cells"])
    metrics = main_metrics(manifest, records)
    found: dict[tuple, Point] = {}
    for cell in tqdm(manifest["cells"], desc=f"reading {manifest['sweep']}", leave=False, disable=None):
        c, stages = cell["config"], cell["stages"]
        names = {k: c[k]["name"] for k in LABELS} | ({} if _general(c) else {"warmup": ""})
        for benchmark, key in stages["evaluate"].items():
            flips = stages.get("flips", {}).get(benchmark)
            run = Run(cell["id"], key, stages["adapt"], stages["warmup"], stages.get("prepare"), flips)
            for metric in metrics[benchmark]:
                place = (*(names[k] for k in labels), c["method"]["name"], c["m"], c["n"], benchmark, metric)
                if place not in found:
                    shape = {"method": c["method"]["name"], "m": c["m"], "n": c["n"]}
                    shape["limit"] = c["task"]["benchmark"].get(benchmark, {}).get("limit")
                    found[place] = Point(**names, **shape, benchmark=benchmark, metric=metric)
                _add(found[place], c["seed"], run, records)
    return list(found.values())


def _add(point: Point, seed: int, run: Run, records: Records) -> None:
    point.runs[seed] = run
    record = records.get("evaluate", run.evaluate)
    if record and point.metric in record["metrics"]:
        point.scores[seed] = records.scores(run.evaluate, point.metric)
        spec = record["spec"]
        point.tested.add(canonical(spec.get("benchmark") or spec.get("lm_eval")))
        if len(point.tested) > 1:
            raise UserError(
                f"seeds of one cell were tested on different items of {point.benchmark} ({run.cell}): give each its own sweep=NAME"
            )
    if (adapt := records.get("adapt", run.adapt)) and "data" in adapt:
        point.samples = adapt["data"]["samples"]


def main_metrics(manifest: dict, records: Records) -> dict[str, list[str]]:
    """Each benchmark's metrics to show; [""] while it has no result."""
    found: dict[str, list[str]] = {}
    for cell in manifest["cells"]:
        for benchmark, key in cell["stages"]["evaluate"].items():
            metrics = found.setdefault(benchmark, [])
            if not metrics and (record := records.get("evaluate", key)):
                metrics += shown_metrics(list(record["metrics"]))
    return {benchmark: metrics or [""] for benchmark, metrics in found.items()}


def shown_labels(cells: list[dict]) -> list[str]:
    """The axes beside method, m and n that the cells differ in and a table can show; seeds are folded.

    UserError naming what they differ in otherwise. A setting may differ with what is shown of where it is from: DPO's epochs
    with the method and the recipe.
    """
    names = [{k: c["config"][k]["name"] for k in (*LABELS, "method")} for c in cells]
    labels = [k for k in LABELS if len({n[k] for n in names}) > 1]
    groups: dict[str, dict[tuple, Any]] = defaultdict(dict)
    for cell, name in zip(cells, names, strict=True):
        for key, value in flat(cell["config"]):
            if not _is_axis(key, cell["config"]):
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
    return top not in ("n", "m", "sweep", "seed") and (top != "warmup" or _general(config))


def _general(config: dict) -> bool:
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
