"""Manifests joined to records: results.csv, the grid's table, and what a sweep says of itself. Reads no log, never W&B.

`python -m d2lora.report [SWEEP ...]` does it for the named sweeps, or for all.
"""

import argparse
import csv
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from d2lora import data, figures, plan
from d2lora.errors import UserError
from d2lora.plan import Cell, Stage
from d2lora.store import Store, read_record, write_json

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
    "train_seconds",
    "eval_seconds",
    "peak_memory_mb",
    "stage_key",
]
METHODS = ("sft", "dpo", "orpo")
# What a table shows beside method, m and n, when its cells differ in it.
_LABELS = ("model", "task", "init", "warmup", "recipe", "seed")


# --- manifests -----------------------------------------------------------------------------------------------------


def write_manifest(output: Path, cells: list[Cell]) -> None:
    """The grid as planned: each cell's resolved config and the keys of its stages."""
    sweep = cells[0].config.sweep
    write_json(_manifest(output, sweep), {"sweep": sweep, "cells": [_entry(c) for c in cells]})


def add_to_manifest(output: Path, cell: Cell) -> None:
    """A cell typed by hand joins its sweep's manifest."""
    entries = read_manifest(output, cell.config.sweep)["cells"] if _manifest(output, cell.config.sweep).exists() else []
    kept = [e for e in entries if e["id"] != cell.id]
    write_json(_manifest(output, cell.config.sweep), {"sweep": cell.config.sweep, "cells": [*kept, _entry(cell)]})


def _entry(cell: Cell) -> dict:
    config = cell.config.model_dump(exclude={"output", "dry_run", "skip_invalid", "job", "data_root"})
    chain = cell.chain
    evaluations = dict(zip(plan.benchmarks(cell.config), (s.key for s in chain.evaluations), strict=True))
    trained = {"warmup": chain.warmup and chain.warmup.key, "adapt": chain.adapt and chain.adapt.key}
    checks = {pair.name: s.key for pair, s in zip(plan.pairs(cell.config), chain.contamination, strict=True)}
    return {"id": cell.id, "config": config, "stages": {**trained, "evaluate": evaluations, "contamination": checks}}


def _manifest(output: Path, sweep: str) -> Path:
    return output / "manifests" / f"{sweep}.json"


def read_manifest(output: Path, sweep: str) -> dict:
    """A sweep's manifest. UserError if there is none or it is damaged."""
    file = _manifest(output, sweep)
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        there = ", ".join(sorted(f.stem for f in file.parent.glob("*.json"))) or "none"
        raise UserError(f"sweep={sweep}: no such sweep was started here (there: {there})") from None
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); start the sweep again to have it written anew") from None


# --- rows ----------------------------------------------------------------------------------------------------------


class Records:
    """Records by stage name and key, read once."""

    def __init__(self, output: Path) -> None:
        self.folder = output / "store"
        self.known: dict[tuple[str, str], dict] = {}

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


def result_rows(manifest: dict, records: Records) -> Iterator[dict]:
    """One row a cell, benchmark and metric; a cell without its evaluation has one row with empty values."""
    for cell in manifest["cells"]:
        c, stages = cell["config"], cell["stages"]
        trained = [r for name in ("warmup", "adapt") if (r := records.get(name, stages[name]))]
        rates = c["recipe"]["lr"]
        common = {
            "cell_id": cell["id"],
            "sweep": manifest["sweep"],
            **{k: c[k]["name"] for k in ("model", "task", "method", "init", "recipe")},
            "warmup": c["warmup"]["name"] if stages["warmup"] else "",
            "lr": rates[c["method"]["name"]] if stages["adapt"] else rates["warmup"] if stages["warmup"] else "",
            "reference": c["method"].get("reference") or "",
            **{k: c[k] for k in ("m", "n", "seed")},
            "train_seconds": round(sum(r["seconds"] for r in trained), 3) if trained else 0,
        }
        for benchmark, key in stages["evaluate"].items():
            record = records.get("evaluate", key)
            memory = max((r["peak_memory_mb"] for r in [*trained, record] if r), default="")
            measured = {
                "eval_seconds": record["seconds"] if record else "",
                "peak_memory_mb": memory,
                "stage_key": key,
                "benchmark": benchmark,
            }
            for metric, summary in (
                record["metrics"] if record else {"": {"value": "", "stderr": "", "items": ""}}
            ).items():
                yield common | measured | {"metric": metric, **summary}


def write_results(output: Path) -> Path:
    """outputs/report/results.csv from all manifests."""
    records, file = Records(output), output / "report" / "results.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        for manifest in sorted((output / "manifests").glob("*.json")):
            writer.writerows(result_rows(read_manifest(output, manifest.stem), records))
    return file


# --- the table -----------------------------------------------------------------------------------------------------


def tables(manifest: dict, records: Records) -> str:
    """The grid as text, one table a benchmark: rows are method and LoRA or D2LoRA, columns n. Missing cells say so.

    UserError if cells differ in something that the table does not show: it would compare unequal things in silence.
    """
    labels = shown_labels(manifest["cells"])
    rows = list(result_rows(manifest, records))
    parts = []
    for benchmark, metric in dict.fromkeys(_main_metrics(rows)):
        columns = sorted({r["n"] for r in rows if r["benchmark"] == benchmark}, key=_size)
        lines: dict[tuple, dict] = defaultdict(dict)
        for row in rows:
            if row["benchmark"] == benchmark and row["metric"] in (metric, ""):
                arm = "LoRA" if row["m"] == 0 else f"D2LoRA({plan.amount(row['m'])}, n)"
                shown = tuple(str(row[k]) for k in labels if not (k == "warmup" and row["m"] == 0))
                place = (METHODS.index(row["method"]), _size(row["m"]), " ".join([row["method"].upper(), arm, *shown]))
                lines[place][row["n"]] = (
                    f"{100 * row['value']:.2f} ± {196 * row['stderr']:.2f}" if row["metric"] else "missing"
                )
        parts.append(_text_table(f"{benchmark}: {metric or 'no result yet'} in %, ± 95 % of its items", columns, lines))
    return "\n\n".join(parts)


def _main_metrics(rows: list[dict]) -> Iterator[tuple[str, str]]:
    """(benchmark, metric) of the tables to print: each benchmark's first metric, ROUGE's all."""
    found: dict[str, list[str]] = {}
    for row in rows:
        metrics = found.setdefault(row["benchmark"], [])
        if row["metric"] and row["metric"] not in metrics and (not metrics or row["metric"].startswith("rouge")):
            metrics.append(row["metric"])
    for benchmark, metrics in found.items():
        for metric in metrics or [""]:
            yield benchmark, metric


def _text_table(title: str, columns: list, lines: dict[tuple, dict]) -> str:
    head = ["", *(f"n={plan.amount(n)}" for n in columns)]
    body = [
        [place[-1], *(values.get(n, "-") for n in columns)]
        for place, values in sorted(lines.items(), key=lambda item: item[0])
    ]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    return "\n".join(
        [
            title,
            *(
                "  ".join(
                    text.ljust(w) if i == 0 else text.rjust(w)
                    for i, (text, w) in enumerate(zip(row, widths, strict=True))
                )
                for row in [head, *body]
            ),
        ]
    )


def _size(amount: int | str) -> float:
    return float("inf") if amount == "all" else float(amount)


def shown_labels(cells: list[dict]) -> list[str]:
    """The axes beside method, m and n that the cells differ in and a table can show.

    UserError naming what they differ in otherwise. A setting may differ with what is shown: DPO's epochs with the method.
    """
    names = [{k: c["config"][k] if k == "seed" else c["config"][k]["name"] for k in _LABELS} for c in cells]
    labels = [k for k in _LABELS if len({n[k] for n in names}) > 1]
    groups: dict[str, dict[tuple, Any]] = defaultdict(dict)
    for cell, name in zip(cells, names, strict=True):
        for key, value in _flat(cell["config"]):
            top = key.split(".")[0]
            shown = tuple(name[k] for k in labels if k == top) + (
                (cell["config"]["method"]["name"],) if top == "method" else ()
            )
            if top in ("n", "m", "sweep", "seed") or (top == "warmup" and cell["config"]["m"] == 0):
                continue
            before = groups[key].setdefault(shown, value)
            if before != value:
                raise UserError(
                    f"a table would hide that its cells differ in {key} ({before} and {value}): give each its own sweep=NAME"
                )
    return labels


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, str(value)


# --- what a run says -----------------------------------------------------------------------------------------------


def plan_text(cells: list[Cell], store: Store, workers: int = 1) -> str:
    """What a sweep will do: cells, stages, what is shared and done, samples to be seen, and about how long."""
    stages = plan.stages(cells)
    left = [s for s in stages if not store.done(s)]
    used = Counter(s.key for c in cells for s in c.chain.stages)
    lines = [
        f"sweep {cells[0].config.sweep}: {len(cells)} cell{'s'[: len(cells) > 1]}, {len(stages)} stages, {len(stages) - len(left)} done, {len(left)} to do"
    ]
    for name in ("contamination", "warmup", "adapt", "evaluate"):
        these = [s for s in stages if s.name == name]
        if these:
            shared = sum(used[s.key] > 1 for s in these)
            done = sum(store.done(s) for s in these)
            lines.append(
                f"  {name:<8} {len(these):>4} stages, {shared} shared by several cells, {done} done{_samples(name, these, cells)}"
            )
    if len(cells) <= 12 or cells[0].config.dry_run:
        lines += [f"  {_cell_line(c, store)}" for c in cells]
    if left:
        lines.append(f"  about {_duration(left, store, workers)}")
    return "\n".join(lines)


def _samples(name: str, these: list[Stage], cells: list[Cell]) -> str:
    if name in ("contamination", "evaluate"):
        return ""
    every = [s for c in cells for s in c.chain.stages if s.name == name]
    if any(s.samples is None for s in every):
        return "; samples known once the data set is read (n or m is all)"
    once, apart = (sum(s.samples or 0 for s in group) for group in (these, every))
    return f"; {once:,} samples to be seen" + (f" ({apart:,} without sharing)" if apart > once else "")


def _cell_line(cell: Cell, store: Store) -> str:
    chain = cell.chain
    marks = [f"{s.name} {s.key[:8]}{' (done)' if store.done(s) else ''}" for s in chain.stages]
    return f"{cell.id}: {', '.join(marks)}"


def _duration(left: list[Stage], store: Store, workers: int) -> str:
    """An estimate from the seconds that finished stages of the same kind took; says so if there are none."""
    measured: dict[tuple, list[float]] = defaultdict(list)
    for file in store.folder.glob("*/*/record.json"):
        record = json.loads(file.read_text())
        measured[_kind(record["stage"], record["spec"])].append(
            record["seconds"] / max(record.get("metrics", {}).get("samples_seen", 1), 1)
        )
    if any(_kind(s.name, s.spec) not in measured for s in left):
        return "an unknown time: nothing like it was measured here yet"
    seconds = 0.0
    for stage in left:
        times = measured[_kind(stage.name, stage.spec)]
        seconds += sum(times) / len(times) * (stage.samples or 1)
    seconds = seconds / workers + 20  # imports
    text = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
    return text + (f" with {workers} workers" if workers > 1 else "")


def _kind(name: str, spec: dict) -> tuple:
    """What a stage's time a sample depends on most: kind, method and model; of an evaluation, its benchmark."""
    if name == "contamination":
        return name, plan.canonical(spec["train"])
    if name == "evaluate":
        return name, plan.canonical(spec.get("benchmark", spec.get("lm_eval")))
    return name, spec.get("method", {}).get("name"), plan.canonical(spec["model"])


def progress_text(cells: list[Cell], store: Store) -> str:
    """The sweep's line: done, running, left, failures."""
    stages = plan.stages(cells)
    done = sum(store.done(s) for s in stages)
    failed = sum((store.folder.parent / "failed" / f"{s.key}.json").exists() for s in stages)
    running = sum(any(store.place(s).parent.glob(f".{s.key}-*")) for s in stages)
    return f"{cells[0].config.sweep}: {done} of {len(stages)} stages done, {running} running, {len(stages) - done - running - failed} left, {failed} failed"


def cell_text(cell: Cell, store: Store) -> str:
    """A single cell's results."""
    lines = [cell.id]
    for name, stage in zip(plan.benchmarks(cell.config), cell.chain.evaluations, strict=True):
        record = store.record(stage)
        for metric, r in (record["metrics"] if record else {}).items():
            lines.append(f"  {name} {metric}: {100 * r['value']:.2f} % ± {196 * r['stderr']:.2f} ({r['items']} items)")
        if record is None:
            lines.append(f"  {name}: missing")
    return "\n".join(lines)


def failures_text(output: Path, lost: Iterable[Stage]) -> str:
    """What failed and why, and what that blocked."""
    lines = []
    for stage in lost:
        file = output / "failed" / f"{stage.key}.json"
        if file.exists():
            lines.append(f"failed: {stage.label}: {json.loads(file.read_text())['error']} (traceback in {file})")
        else:
            lines.append(
                f"blocked: {stage.label}" + (f", by {stage.parent.label}" if stage.parent else ": no worker did it")
            )
    return "".join(f"{line}\n" for line in lines)


def finish(output: Path, sweep: str, draw: bool = True) -> str:
    """Write results.csv and, if asked to draw, the sweep's curves; return its tables, with where the report is."""
    file, records = write_results(output), Records(output)
    manifest = read_manifest(output, sweep)
    try:
        text, figure = tables(manifest, records), None
        if draw and not shown_labels(manifest["cells"]):
            figure = figures.curves(list(result_rows(manifest, records)), output / "report" / f"{sweep}.png")
    except UserError as error:
        text, figure = f"no table: {error}", None
    return f"{text}\n\nreport: {file}" + (f"\ncurves: {figure}" if figure else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m d2lora.report", description="Write results.csv and print the grids' tables."
    )
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help="names of sweeps; all without any")
    parser.add_argument("--output", default="outputs", help="the folder that holds store and manifests")
    args = parser.parse_args()
    output = data.ROOT / args.output
    try:
        names = args.sweeps or sorted(f.stem for f in (output / "manifests").glob("*.json"))
        if not names:
            raise UserError(f"{output}: nothing was run here yet: python run.py, or make lab")
        for name in names:
            read_manifest(output, name)
            print(f"{name}\n{finish(output, name)}\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
