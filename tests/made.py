"""Write records with made-up scores, as a run would, to test and time reports. Nothing is trained."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import composing
import numpy as np

from d2lora.plan import Cell, chain
from d2lora.records import Record
from d2lora.report.manifest import write_manifest
from d2lora.scoring import KINDS
from d2lora.settings import Config
from d2lora.stages import Stage
from d2lora.store import Store

PROVENANCE = {
    "packages": {"torch": "2.13.0", "trl": "1.16.0"},
    "python": "3.11.7",
    "git": {"commit": "0123abc", "dirty": False},
    "hardware": {"machine": "x86_64", "cores": 1, "cpu": "EPYC 7551", "simd": "AVX2"},
    "started": "2026-01-01T00:00:00+00:00",
    "threads": 1,
}
METRICS = {kind.name: kind.metrics for kind in KINDS}


def cells(config: Config, **axes: Iterable) -> list[Cell]:
    """Return the grid of a config over the values of its top-level keys, each cell once."""
    grid = [{}]
    for key, values in axes.items():
        grid = [{**point, key: value} for point in grid for value in values]
    configs = (config.model_copy(update=point) for point in grid)
    return list({c.id: c for c in (Cell(m, chain(m)) for m in configs)}.values())


def grid(*overrides: str, methods: Iterable[str] = ("sft",), **axes: Iterable) -> list[Cell]:
    """Compose a small grid: grid("scale=paper", methods=["sft", "dpo"], n=[0, 1000])."""
    bases = [composing.cell("sweep=mine", f"method={method}", *overrides).config for method in methods]
    return [cell for base in bases for cell in cells(base, **axes)]


def gain(cell: Cell) -> float:
    """Return the chance to solve an item of medium difficulty: it grows with n, and a warm-up adds little."""
    n = 7000 if cell.config.n == "all" else int(cell.config.n)
    return 0.4 + 0.04 * np.log1p(n / 50) + (0.02 if cell.config.m != 0 else 0.0)


def publish(
    output: Path,
    grid: list[Cell],
    items: int = 40,
    ability: Callable[[Cell], float] = gain,
    text: Callable[[int], str] = lambda i: f"answer {i}",
    provenance: Callable[[Stage], dict] = lambda stage: PROVENANCE,
    missing: Callable[[Stage], bool] = lambda stage: False,
    more: Callable[[Stage], dict] = lambda stage: {},
) -> None:
    """Write the grid's manifest and the record of each of its stages through the store, but for `missing` ones."""
    store = Store(output)
    write_manifest(output, grid)
    with mock.patch("d2lora.store.sync"):  # thousands of files that need not outlive a power cut
        for cell in grid:
            for stage in cell.chain.stages:
                if not missing(stage):
                    store.ensure(stage, lambda f, s=stage, c=cell: _record(f, s, c, s.subject, items, ability, text, provenance, more))  # fmt: skip


def do(
    store: Store,
    cell: Cell,
    stages: Iterable[Stage],
    ability: Callable[[Cell], float] = gain,
    more: Callable[[Stage], dict] = lambda stage: {},
    items: int = 40,
) -> None:
    """Publish the records of some of a cell's stages, as its job would."""
    with mock.patch("d2lora.store.sync"):
        for stage in stages:
            store.ensure(stage, lambda f, s=stage: _record(f, s, cell, s.subject, items, ability, lambda i: f"answer {i}", lambda s: PROVENANCE, more))  # fmt: skip


def record(stage: Stage, **facts: object) -> Record:
    """Return the record of a stage that took a second and 100 MB; `facts` are further fields, or other values of these."""
    content = {"key": stage.key, "stage": stage.kind, "label": stage.label, "version": 1, "spec": stage.spec.content()}
    content |= {"parent": stage.parent.key if stage.parent else None, "metrics": {}, "provenance": PROVENANCE}
    return Record.model_validate(content | {"seconds": 1.0, "load_seconds": 0.0, "peak_memory_mb": 100.0} | facts)


def _record(folder, stage, cell, benchmark, items, ability, text, provenance, more) -> Record:
    facts = _facts(folder, stage, cell, benchmark, items, ability, text)
    return record(
        stage, **{"provenance": provenance(stage)} | facts | (more(stage) if stage.kind == "evaluate" else {})
    )


def _facts(folder, stage, cell, benchmark, items, ability, text) -> dict:
    """Return the fields that depend on the stage's kind; an evaluation's items are written into the folder."""
    if stage.kind == "contamination":
        return {"metrics": {"exact": {"value": 0.0, "items": items}}, "data": {"rows": 100}}
    if stage.kind == "flips":
        scored = METRICS[cell.config.task.benchmark[benchmark].kind]
        names = ["answers_flipped", *(f"{m}_{k}" for m in scored for k in ("flipped", "difference"))]
        found = {m: {"value": 0.031 if m.endswith("flipped") else 0.004, "stderr": 0.01, "items": 200} for m in names}
        facts = {"benchmark": benchmark, "base": cell.config.model.name, "batches": list(stage.spec.batches)}
        return facts | {"metrics": found}
    if stage.kind != "evaluate":
        n = stage.spec.content().get("n", stage.spec.content().get("m"))
        samples = 6970 if n == "all" else n
        log = [{"step": step, "epoch": step / 10, "loss": 1 / step, "learning_rate": 1e-3} for step in (1, 5, 10)]
        seen = {"samples_seen": samples, "tokens_seen": 9 * (samples or 0), "log": log}
        return {"metrics": seen, "data": {"samples": samples, "misfits": 0}}
    kind = cell.config.benchmarks[benchmark].kind
    scores = _scores(stage, kind, items, ability(cell))
    with (folder / "items.jsonl").open("w") as file:
        for i in range(items):
            item = {"index": i, "prompt": f"question {i}: {text(i)}", "answer": text(i), "gold": f"gold {i}"}
            file.write(json.dumps(item | {m: x[i] for m, x in scores.items()}) + "\n")
    metrics = {m: {"value": sum(x) / items, "stderr": float(np.std(x, ddof=1) / items**0.5), "items": items} for m, x in scores.items()}  # fmt: skip
    return {"benchmark": benchmark, "metrics": metrics}


def _scores(stage: Stage, kind: str, items: int, ability: float) -> dict[str, list[float]]:
    """Make scores of each item. Items have a fixed difficulty, so evaluations agree more than by chance."""
    difficulty = np.random.default_rng(0).random(items)
    noise = np.random.default_rng(int(hashlib.sha256(stage.key.encode()).hexdigest()[:8], 16)).normal(0, 0.15, items)
    solved = ability - difficulty + noise
    values = {"rouge": np.clip(0.3 + solved / 3, 0, 1), "likelihood": solved / 10 - 0.4}.get(
        kind, (solved > 0).astype(float)
    )
    fading = 0.8 if kind == "rouge" else 1.0  # ROUGE-2 is not ROUGE-1
    return {m: (values * fading**i).tolist() for i, m in enumerate(METRICS[kind])}
