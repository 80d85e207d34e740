"""Write and read manifests: what a sweep planned, each cell's resolved config with the keys of its stages.

`cells` are those of the sweep's latest grid, which its tables show. `earlier` are those of earlier grids of the same
name; their results stay in results.csv, and their records in the store.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from d2lora.errors import UserError
from d2lora.outputs import Outputs, lock, write_json
from d2lora.plan import Cell
from d2lora.records import Manifest, ManifestCell, StageKeys, Tuning, reason
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.contamination import ContaminationSpec
from d2lora.stages.evaluate import EvaluateSpec
from d2lora.stages.flips import FlipsSpec
from d2lora.stages.prepare import PrepareSpec
from d2lora.stages.warmup import WarmupSpec


def write_manifest(output: Path, cells: list[Cell], tuning: Tuning | None = None) -> None:
    """Write a grid's manifest: each cell's resolved config, the keys of its stages, and what is chosen if settings are tuned."""
    sweep, entries = cells[0].config.sweep, [entry(c) for c in cells]
    with _held(output, sweep) as before:
        _write(output, sweep, entries, [*before.earlier, *before.cells], tuning)


def begin_manifest(output: Path, sweep: str) -> None:
    """Begin a sweep whose cells are added one by one; those of its earlier grids stay as such."""
    with _held(output, sweep) as before:
        _write(output, sweep, [], [*before.earlier, *before.cells], None)


def add_to_manifest(output: Path, cell: Cell) -> None:
    """Add a single cell to its sweep's manifest."""
    sweep = cell.config.sweep
    with _held(output, sweep) as before:
        others = [other for other in before.cells if other.id != cell.id]
        _write(output, sweep, [*others, entry(cell)], before.earlier, before.tuning)


@contextlib.contextmanager
def _held(output: Path, sweep: str) -> Iterator[Manifest]:
    """Yield the sweep's manifest, or an empty one, locked against other processes so that no cell is lost."""
    file = Outputs(output).manifest(sweep)
    with lock(file.with_suffix(".lock")):
        try:
            before = read_manifest(output, sweep) if file.exists() else None
        except UserError:
            before, aside = None, Outputs(output).damaged_manifest(sweep)
            file.replace(aside)
            print(f"{file}: damaged, so it begins anew; the old one is now {aside.name}", file=sys.stderr)
        yield before or Manifest(sweep=sweep, cells=[])


def _write(
    output: Path, sweep: str, cells: list[ManifestCell], earlier: list[ManifestCell], tuning: Tuning | None
) -> None:
    planned = {entry.id for entry in cells}
    others = {entry.id: entry for entry in earlier if entry.id not in planned}
    whole = Manifest(sweep=sweep, cells=cells, earlier=list(others.values()))
    if tuning:
        whole = whole.model_copy(update={"tuning": tuning})
    write_json(Outputs(output).manifest(sweep), whole.as_read())


def entry(cell: Cell) -> ManifestCell:
    """Return a cell as manifests list it."""
    left_out: dict[str, Any] = dict.fromkeys(("output", "dry_run", "skip_invalid", "job", "data_root"), True)
    if not cell.config.is_validated:  # then nothing reads them
        left_out |= {"tune": True, "task": {"validation": True}}
    config = cell.config.model_dump(exclude=left_out)
    chain = cell.chain
    # A cell that an optimizing sweeper tried has only those on validation benchmarks: the sweep's tables show them.
    tested = chain.evaluations if cell.config.tune else chain.evaluations or chain.validations
    evaluations = {s.subject: s.key for s in tested}
    trained = dict.fromkeys(spec.KIND for spec in (PrepareSpec, WarmupSpec, AdaptSpec)) | {
        s.kind: s.key for s in chain.trainings
    }
    checks = {s.subject: s.key for s in chain.contamination}
    flips = {s.subject: s.key for s in chain.flips}  # of a bfloat16 model only
    stages = {**trained, EvaluateSpec.KIND: evaluations, ContaminationSpec.KIND: checks}
    if flips:
        stages[FlipsSpec.KIND] = flips
    if chain.validations and tested is not chain.validations:
        stages["validation"] = {s.subject: s.key for s in chain.validations}
    return ManifestCell(id=cell.id, config=config, stages=StageKeys.model_validate(stages))


def sweeps(output: Path) -> list[str]:
    """Return the names of all sweeps with a manifest."""
    return sorted(f.stem for f in Outputs(output).manifests.glob("*.json"))


def read_manifest(output: Path, sweep: str) -> Manifest:
    """Read a sweep's manifest. UserError if there is none, or if it is damaged."""
    file = Outputs(output).manifest(sweep)
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict) or "cells" not in content:
            raise ValueError("no manifest")
        return Manifest.model_validate({"sweep": sweep} | content)
    except FileNotFoundError:
        started = ", ".join(sweeps(output)) or "none"
        raise UserError(f"sweep={sweep}: no such sweep was started here (there: {started})") from None
    except ValueError as error:
        what = reason(error) if isinstance(error, ValidationError) else error
        raise UserError(f"{file}: damaged ({what}); start the sweep again to have it written anew") from None
