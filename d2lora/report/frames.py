"""Give results, items and training curves as pandas frames, from manifests and records alone: no torch, no logs.

`import d2lora` has these functions (docs/results.md).
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from d2lora.errors import UserError
from d2lora.outputs import project_path
from d2lora.records import ManifestCell, Record, Records, read_items
from d2lora.report import axes, formats, manifest, tuning
from d2lora.report.compare import pairs
from d2lora.report.content import Sweep
from d2lora.report.points import Point, arm_name
from d2lora.report.results import COLUMNS, CellResults, result_rows
from d2lora.report.rows import Row, frame
from d2lora.scoring import shown_metrics
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.evaluate import EvaluateSpec
from d2lora.stages.warmup import WarmupSpec

_ITEM_COLUMNS = ["benchmark", "metric", "model", "task", "method", "init", "warmup", "recipe", "m", "n", "seed"]
_CURVE_COLUMNS = ["sweep", "stage", "key", "label", "arm", "model", "task", "method", "init", "m", "n", "seed", "step"]
_NAMED = ("model", "task", "method", "init")
Folder = str | Path


def results(*sweeps: str, output: Folder = "outputs") -> pd.DataFrame:
    """Return a row for each cell, benchmark and metric of the named sweeps, or of all.

    Columns: those of results.csv, and every setting by its key that the result depends on. `value`, `low` and `high` (the
    95 % interval) are fractions; `n` and `m` are rows, `n_asked` and `m_asked` as typed ("all"). `low` and `high` are of one
    training: for right or wrong those of the tables, for others 1.96 standard errors (the tables resample items). A cell
    without its evaluation has no value.

    UserError for a sweep that was never started; a warning for one that is damaged.
    """
    folder = project_path(str(output))
    records, rows = Records(folder), []
    for name in sweeps or manifest.sweeps(folder):
        try:
            rows += list(result_rows(manifest.read_manifest(folder, name), records, whole=True))
        except UserError as error:
            if sweeps:
                raise
            warnings.warn(f"sweep {name} is left out: {error}", stacklevel=2)
    return frame(rows, COLUMNS)


def table(sweep: str, output: Folder = "outputs") -> pd.DataFrame:
    """Return the entries of a sweep's tables, seeds folded: values with their intervals, and comparisons with LoRA.

    The same as table.csv, but that `n` is a number of rows and `n_asked` as typed. UserError for a sweep that was never
    started or is damaged.
    """
    folder = project_path(str(output))
    planned, records = manifest.read_manifest(folder, sweep), Records(folder)
    points, fixed = tuning.points(planned, records)
    own = Sweep(sweep, planned.cells, points, records, planned.tuning, fixed).own_tables
    rows = [row | {"n": _rows_of(row), "n_asked": row["n"]} for row in formats.table_rows(own)]
    return frame(rows, formats.TABLE_COLUMNS)


def _rows_of(row: Row) -> int | None:
    """Return the n of a table's entry; of "all" as many rows as its records say, None while there are none."""
    return row["samples"] if row["n"] == "all" else row["n"]


def items(
    sweep: str, benchmark: str | None = None, cells: tuple[str, str] | None = None, output: Folder = "outputs"
) -> pd.DataFrame:
    """Return the items of LoRA and D2LoRA side by side: a row for each item of each pair that tables compare, and seed.

    `answer_lora`, `answer_d2lora`, `score_lora` and `score_d2lora` are those of the benchmark's first metric, `change` is
    the second score minus the first: 1 and -1 are items that flipped. `benchmark` keeps one benchmark. `cells` compares two
    cells by their ids instead (columns `_first` and `_second`).

    UserError for a sweep or a cell that does not exist.
    """
    folder = project_path(str(output))
    planned, records = manifest.read_manifest(folder, sweep), Records(folder)
    if cells:
        first, second = (_cell(planned.cells + planned.earlier, sweep, cell) for cell in cells)
        parts = list(_items_of_cells(first, second, records))
    else:
        points = [p for p in tuning.points(planned, records)[0] if benchmark in (None, p.benchmark)]
        parts = list(_items_of_pairs(points, records))
    parts = [part for part in parts if benchmark is None or benchmark in set(part.benchmark)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=_ITEM_COLUMNS)


def _cell(planned: Sequence[ManifestCell], sweep: str, id: str) -> ManifestCell:
    cell = next((cell for cell in planned if cell.id == id), None)
    if cell is None:
        raise UserError(f"cells={id}: no cell of sweep {sweep}; results({sweep!r}).cell_id lists them")
    return cell


def _items_of_pairs(points: Sequence[Point], records: Records) -> Iterator[pd.DataFrame]:
    """Yield the items of each pair of points and seed, in the first metric of each benchmark."""
    first: dict[str, str] = {}
    for point in points:
        first.setdefault(point.benchmark, point.metric)
    for lora, d2lora, seeds in pairs(p for p in points if p.metric == first[p.benchmark]):
        for seed in seeds:
            run = lora.runs.get(seed) or next(iter(lora.runs.values()))  # the base has one for all seeds
            keys = run.evaluate, d2lora.runs[seed].evaluate
            shape = {name: getattr(d2lora, name) for name in _ITEM_COLUMNS[:-1]} | {"n": d2lora.rows, "seed": seed}
            yield _side_by_side(keys, ("lora", "d2lora"), d2lora.metric, records, shape | d2lora.axes)


def _items_of_cells(first: ManifestCell, second: ManifestCell, records: Records) -> Iterator[pd.DataFrame]:
    """Yield the items of each benchmark that two cells share, in its first metric."""
    for benchmark, key in first.stages.evaluate.items():
        other = second.stages.evaluate.get(benchmark)
        record = records.get(EvaluateSpec.KIND, key)
        if record and records.get(EvaluateSpec.KIND, other) and other:
            metric = shown_metrics(list(record.scores))[0]
            shape: Row = {"benchmark": benchmark, "metric": metric}
            yield _side_by_side((key, other), ("first", "second"), metric, records, shape)


def _side_by_side(
    keys: tuple[str, str], names: tuple[str, str], metric: str, records: Records, shape: Row
) -> pd.DataFrame:
    """Return two evaluations' items, joined by their rows in the test set. UserError if those are of two test sets."""
    columns = {"prompt": "prompt", "gold": "gold", "answer": "answer", metric: "score"}
    one, other = (
        pd.DataFrame(read_items(records.outputs.record(EvaluateSpec.KIND, key)))
        .set_index("index")[list(columns)]
        .rename(columns=columns)
        for key in keys
    )
    golds = one.gold.astype(str).align(other.gold.astype(str), join="inner")
    if not golds[0].equals(golds[1]):
        raise UserError(f"{shape['benchmark']}: these are items of two test sets: their golds differ row by row")
    suffixes = tuple(f"_{name}" for name in names)
    joined = one.join(other.drop(columns=["prompt", "gold"]), lsuffix=suffixes[0], rsuffix=suffixes[1], how="inner")
    joined["change"] = joined[f"score{suffixes[1]}"] - joined[f"score{suffixes[0]}"]
    return joined.reset_index().assign(**shape)[[*shape, "index", *joined.columns]]


def curves(sweep: str, output: Folder = "outputs") -> pd.DataFrame:
    """Return what the trainings of a sweep logged: a row for each logged step of each warm-up and adaptation, once each.

    `step` counts optimizer steps; losses and rewards are means over the steps since the row before. `key` is the training's:
    `adapter_key` or `warmup_key` of `results`. A warm-up that several cells share has their m, and no n, task or method.

    UserError for a sweep that was never started.
    """
    folder = project_path(str(output))
    planned, records = manifest.read_manifest(folder, sweep), Records(folder)
    trainings: dict[str, list[Row]] = {}
    for cell in planned.cells:
        results_of_cell = CellResults(sweep, cell, records)
        for record in results_of_cell.trained:
            if record.stage in (WarmupSpec.KIND, AdaptSpec.KIND) and record.key not in trainings:
                trainings[record.key] = [_training(results_of_cell, record) | entry for entry in record.log]
    return frame([row for log in trainings.values() for row in log], _CURVE_COLUMNS)


def _training(of: CellResults, record: Record) -> Row:
    """Return what a training is: its key, its arm, what it starts from and its sizes."""
    config, adapted = of.cell.config, record.stage == AdaptSpec.KIND
    names = {part: config[part]["name"] for part in _NAMED}
    shape = {"sweep": of.sweep, "stage": record.stage, "key": record.key, "label": record.label} | names
    shape |= {"arm": arm_name(config["m"], axes.control(config)), "m": of.size("m"), "n": of.size("n")}
    shape |= {"seed": config["seed"]}
    return shape if adapted else shape | {"task": None, "method": None, "n": None, "arm": "warm-up"}
