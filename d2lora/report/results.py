"""Write results.csv: the results of all sweeps, one row for each cell, benchmark and metric."""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from d2lora.errors import UserError
from d2lora.outputs import Outputs
from d2lora.records import Manifest, ManifestCell, Record, Records
from d2lora.report import axes, tuning
from d2lora.report.axes import general
from d2lora.report.manifest import read_manifest, sweeps
from d2lora.stages.evaluate import EvaluateSpec
from d2lora.stages.flips import FlipsSpec
from d2lora.stages.prepare import PrepareSpec

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
_NO_SCORE = {"value": "", "stderr": "", "items": ""}


def result_rows(manifest: Manifest, records: Records) -> Iterator[dict]:
    """Yield one row for each cell, benchmark and metric; a cell without its evaluation has one row with empty values.

    Beside COLUMNS, rows have the settings that the sweep's cells differ in, by key, if the cell depends on them. Cells
    of earlier grids with the sweep's name have rows if they are finished.
    """
    finished = (c for c in manifest.earlier if all(records.get(EvaluateSpec.KIND, k) for k in _evaluations(c).values()))
    roles = tuning.roles(manifest.tuning)
    _, keys = axes.differing_settings(manifest.cells)
    for cell in [*manifest.cells, *finished]:
        c, stages = cell.config, cell.stages
        trained = [r for name, key in stages.trained().items() if (r := records.get(name, key))]
        rates = c["recipe"]["lr"]
        common = {
            "cell_id": cell.id,
            "sweep": manifest.sweep,
            **{k: c[k]["name"] for k in ("model", "task", "method", "init", "recipe")},
            "warmup": c["warmup"]["name"] if general(c) else "",
            "lr": rates[c["method"]["name"]] if stages.adapt else rates["warmup"] if stages.warmup else "",
            "reference": c["method"].get("reference") or "",
            **{k: c[k] for k in ("m", "n", "seed")},
            **({"tuned": roles[cell.id]} if cell.id in roles else {}),
            **unused(trained),
            "train_seconds": round(sum(r.seconds for r in trained if r.stage != PrepareSpec.KIND), 3),
        }
        for benchmark, key in _evaluations(cell).items():
            record = records.get(EvaluateSpec.KIND, key)
            flips = records.get(FlipsSpec.KIND, stages.flips.get(benchmark))
            memory = max((r.peak_memory_mb for r in [*trained, record] if r), default="")
            measured = {
                "eval_seconds": record.seconds if record else "",
                "peak_memory_mb": memory,
                "stage_key": key,
                "benchmark": benchmark,
                "eval_batch": record.eval_batch if record and record.eval_batch is not None else "",
                **{k: record.counts.get(k, "") if record else "" for k in ("cut", "empty")},
            }
            scores = {m: s.as_read() for m, s in record.scores.items()} if record else {"": _NO_SCORE}
            for metric, score in scores.items():
                others = axes.axes_of(cell, benchmark, keys)
                yield common | measured | {"metric": metric, **score} | _batch(flips, metric) | others


def _evaluations(cell: ManifestCell) -> dict[str, str]:
    """The keys of a cell's evaluations by benchmark, those on validation benchmarks too."""
    return cell.stages.validation | cell.stages.evaluate


def _batch(flips: Record | None, metric: str) -> dict:
    """Return the share of a bfloat16 base's answers that the batch size changes, and the difference of the metric."""
    scores = flips.scores if flips else {}
    names = {"batch_flips": "answers_flipped", "batch_difference": f"{metric}_difference"}
    return {column: scores[name].value for column, name in names.items() if name in scores}


def unused(trained: list[Record]) -> dict[str, int | str]:
    """Return how many rows a cell's trainings left out: too long ones, and others by reason; empty without a training."""
    counted = [r for r in trained if r.stage != PrepareSpec.KIND and r.data]
    reasons: Counter[str] = Counter()
    for record in counted:
        reasons.update(record.passed_over)
    left_out = "; ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
    return {"misfits": sum(r.misfits for r in counted) if counted else "", "left_out": left_out}


def write_results(output: Path, records: Records) -> tuple[Path, list[str]]:
    """Write outputs/report/results.csv from all manifests. Return the file, and a line for each sweep that is left out
    as damaged.
    """
    file = Outputs(output).results
    file.parent.mkdir(parents=True, exist_ok=True)
    rows, damaged = [], []
    for sweep in sweeps(output):
        try:
            rows += list(result_rows(read_manifest(output, sweep), records))
        except UserError as error:
            damaged.append(f"sweep {sweep} is not in results.csv: {error}")
    others = dict.fromkeys(key for row in rows for key in row if key not in COLUMNS)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, [*COLUMNS, *others])
        writer.writeheader()
        writer.writerows(rows)
    return file, damaged
