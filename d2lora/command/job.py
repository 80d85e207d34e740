"""Define Hydra's task function: it does one cell, or a worker's share of a grid."""

import contextlib
import sys

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from d2lora import mirror, plan, worker
from d2lora.command import preflight, rehearsal, summary, sweepers, terminal, tuning
from d2lora.command.grid import cell_of, without_warmup
from d2lora.command.guard import disk_failed, end_with, one_line, reader_may_leave, refuse
from d2lora.errors import UserError
from d2lora.outputs import Outputs
from d2lora.plan import Cell
from d2lora.records import ManifestCell
from d2lora.report import manifest
from d2lora.settings import Config, parse
from d2lora.store import Store


def job(config: DictConfig) -> object:
    """Do a single cell and return its exit code, or do a worker's share of a grid and return how many stages failed.

    A cell that another sweeper chose gives its objective.
    """
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return share(config) if config.job is not None else sweepers.trial(config)
    # Handled here as guard would, because Hydra prints a line of its own for each exception that it sees.
    with reader_may_leave():
        try:
            code = one_cell(cell_of(config, HydraConfig.get().overrides.task))
        except (UserError, OmegaConfBaseException) as error:
            code = refuse(error)
        except OSError as error:
            code = disk_failed(error)
    end_with(code)
    return code


def one_cell(cell: Cell) -> int:
    """Do all stages of a cell, print its results, and return the exit code; a dry run prints the plan only."""
    output = Outputs.of(cell.config).root
    store = Store(output)
    tuning.refuse_single(cell.config)
    preflight.check(cell.config, set())
    notes = [*preflight.coverage([cell]), *(repeated := preflight.repeats([cell]))]
    rehearsal.remember()
    for line in (*without_warmup([cell]), *([] if cell.config.dry_run else repeated)):
        print(line.strip(), file=sys.stderr)
    if cell.config.dry_run:
        print(summary.plan_text([cell], store, notes=notes))
        return 0
    manifest.add_to_manifest(output, cell)
    with terminal.Bar() as bar:
        lost = worker.do(cell.config, cell, store, bar.stage)
    print(summary.cell_text(cell, store))
    if mirrored := mirror.where_cell(cell, store):
        print(mirrored)
    print(summary.failures_text(output, lost), end="", file=sys.stderr)
    return 1 if lost else 0


def others(cell: Cell) -> list[Cell]:
    """Return the other cells that a shared job has stages of, as the sweep's manifest has their configs; the worker computes their keys
    again. UserError for a manifest that is damaged.
    """
    missing = set(cell.config.job or ()) - {stage.key for stage in cell.chain.stages}
    outputs, sweep = Outputs.of(cell.config), cell.config.sweep
    if not missing or not outputs.manifest(sweep).exists():  # then the worker refuses keys that it does not know
        return []
    planned = manifest.read_manifest(outputs.root, sweep)
    cells: list[Cell] = []
    for entry in [*planned.cells, *planned.earlier]:
        evaluations = set(entry.stages.evaluations.values())
        if missing & evaluations:
            missing -= evaluations
            cells.append(_cell(entry, cell.config))
    return cells


def _cell(entry: ManifestCell, beside: Config) -> Cell:
    """Return a cell of a manifest, with the settings that a manifest leaves out as the job's own cell has them."""
    own = {name: getattr(beside, name) for name in ("output", "data_root")}
    own |= {name: getattr(beside, name).model_dump() for name in ("plan", "wandb")}
    config = parse(entry.config | own)
    return Cell(config, plan.chain(config))


def share(config: DictConfig) -> int:
    """Do a worker's share of a grid and return how many of its stages have no record.

    No exception but Ctrl-C leaves it, because some launchers drop the other jobs after one.
    """
    try:
        cell = cell_of(config)
        output = Outputs.of(cell.config).root
        more = others(cell)
        with terminal.Note(output) as note:
            return len(worker.do(cell.config, cell, Store(output), note.stage, more))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if config.job:  # recorded, so that the summary shows it: it would be only in the launcher's log otherwise
            with contextlib.suppress(OSError):
                worker.write_failure(Outputs.at(config.output), config.job[0], "a job", error)
        print(f"error: {one_line(error) if isinstance(error, Exception) else error!r}", file=sys.stderr)
        return 1
