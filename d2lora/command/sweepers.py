"""Let sweepers other than d2lora's own (Optuna's, Hydra's basic one) run cells: with a plan, a manifest and a report.

Such a sweeper gives a launcher cell after cell, each a job that knows nothing of the others. What a grid has beyond its
jobs is done around the sweeper, in the process that was started.
"""

import contextlib
import json
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from d2lora import mirror, plan, report, worker
from d2lora.command import preflight, rehearsal, summary, terminal, tuning
from d2lora.command.grid import Composer, cell_of, expand, one_of, valid_cells
from d2lora.command.guard import end_with, one_line, refuse
from d2lora.errors import UserError
from d2lora.outputs import Outputs
from d2lora.plan import Cell
from d2lora.report import manifest
from d2lora.store import Store

_OPTIMIZERS = ("OptunaSweeper", "NevergradSweeper", "AxSweeper")  # they need a value from each job
_DIRECTIONS = (  # where Optuna's, Nevergrad's and Ax's have it, and its values that look for the worst and the best
    ("direction", "minimize", "maximize"),
    ("optim.maximize", "False", "true"),
    ("ax_config.experiment.minimize", "True", "false"),
)
_RESULTS = "optimization_results.yaml"  # where those write what they chose

_begun: list[Cell] = []  # cells of the sweep that another sweeper runs: all, or one where it makes them as it goes


class OtherSweepers(Callback):
    """Plans a sweep of another sweeper before its first job."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check and print the plan, and begin the manifest. A dry run ends here, and so does wrong input."""
        if _name(config) == "GridSweeper":
            return
        try:
            _begin(config)
        except (UserError, OmegaConfBaseException, HydraException) as error:
            raise SystemExit(refuse(error)) from None
        except Exception:  # Hydra would only warn, and train without a plan, a manifest or a word of dry_run
            traceback.print_exc()
            raise SystemExit(1) from None


def _name(config: DictConfig) -> str:
    """Return the class of a config's sweeper."""
    return str(config.hydra.sweeper.get("_target_", "")).rpartition(".")[2]


def _begin(config: DictConfig) -> None:
    cells = _cells(config)
    first, store = cells[0].config, Store(Outputs.of(cells[0].config).root)
    if first.tune:
        raise UserError(
            f"tune={','.join(first.tune)}: leave hydra/sweeper={_choice(config)} out: d2lora's own sweeper does it"
        )
    _check_objective(config, first.objective)
    if first.is_validated:
        tuning.refuse_the_test(first)
    rehearsal.remember()
    note = [] if len(cells) > 1 else [f"  one cell of those that hydra/sweeper={_choice(config)} will choose"]
    print(summary.plan_text(cells, store, notes=[*preflight.coverage(cells), *note]), flush=True)
    if first.dry_run:
        raise SystemExit(0)
    manifest.begin_manifest(store.outputs.root, first.sweep)
    (Path(config.hydra.sweep.dir) / _RESULTS).unlink(missing_ok=True)
    _begun[:] = cells


def _choice(config: DictConfig) -> str:
    return str(config.hydra.runtime.choices.get("hydra/sweeper"))


def _cells(config: DictConfig) -> list[Cell]:
    """Return the cells of the basic sweeper's grid; of other sweepers one, with the first of each setting's values."""
    loader = GlobalHydra.instance().config_loader()
    parser, compose = OverridesParser.create(config_loader=loader), Composer(config, loader)
    params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}))
    arguments = list(config.hydra.overrides.task)
    if _name(config) == "BasicSweeper":
        return plan.unique(valid_cells(compose, expand(parser, params, arguments)))
    cell = compose(one_of(parser, params, arguments))
    preflight.check(cell.config, set())
    return [_without_test(cell)]


def _check_objective(config: DictConfig, objective: Sequence[str]) -> None:
    """Raise UserError where a sweeper that optimizes has nothing to optimize, or would look for the worst."""
    if _name(config) not in _OPTIMIZERS:
        return
    # hydra-optuna-sweeper 1.3.0 is of 2023, and Optuna 5 says of most of what it uses that version 6 will not have it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="optuna|hydra_plugins")
    if not objective:
        raise UserError(
            f"hydra/sweeper={_choice(config)}: name what it optimizes: objective=BENCHMARK/METRIC, for example objective=lab_math/accuracy"
        )
    for key, smallest, largest in _DIRECTIONS:
        value = str(OmegaConf.select(config.hydra.sweeper, key)).rpartition(".")[2]  # a text, a truth value, or an enum
        if value == smallest:
            told = f"more of {', '.join(objective)} is better: hydra.sweeper.{key}={largest}"
            raise UserError(f"hydra.sweeper.{key}={value.lower()}: {told}")


# --- a job ---------------------------------------------------------------------------------------------------------


def trial(config: DictConfig) -> float | list[float] | None:
    """Do a cell that another sweeper chose, and return its objective: a number, or one for each; None without one.

    UserError for wrong input, and for a cell without a value of its objective: the sweeper counts it as failed.
    """
    cell = _without_test(cell_of(config))
    preflight.check(cell.config, set())
    rehearsal.remember()
    store = Store(Outputs.of(cell.config).root)
    manifest.add_to_manifest(store.outputs.root, cell)
    with terminal.Bar() as bar:
        lost = worker.do(cell.config, cell, store, bar.stage)
    print(f"{' '.join(HydraConfig.get().overrides.task)}\n{summary.cell_text(cell, store)}", flush=True)
    if not cell.config.objective:
        return None
    if lost:
        raise UserError(summary.failures_text(store.outputs.root, lost).strip() or f"{cell.id}: not done")
    values = objective_values(cell, store)
    return values[0] if len(values) == 1 else values


def objective_values(cell: Cell, store: Store) -> list[float]:
    """Return the value of each of a cell's objectives. UserError for a metric that the benchmark does not have."""
    evaluations = {stage.subject: stage for stage in (*cell.chain.validations, *cell.chain.evaluations)}
    values = []
    for benchmark, metric in cell.config.objectives:
        record = store.record(evaluations[benchmark])
        scores = record.scores if record else {}
        if metric not in scores:
            raise UserError(f"objective={benchmark}/{metric}: {benchmark} has {', '.join(scores)}")
        values.append(scores[metric].value)
    return values


def _without_test(cell: Cell) -> Cell:
    """Return a cell without its evaluations on the test, where its objective is measured on validation benchmarks."""
    benchmarks = {benchmark for benchmark, _ in cell.config.objectives}
    if not benchmarks or not benchmarks <= cell.config.task.validation.keys():
        return cell
    return tuning.without_test(cell)


# --- after the last job --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Write the report of another sweeper's cells after the last, and let the exit code say whether all are done."""
    try:
        yield
    except Exception as error:
        if not _begun or not _finish():
            raise
        print(f"the sweeper stopped: {one_line(error)}", file=sys.stderr)
    else:
        if _begun:
            _finish()


def _finish() -> bool:
    """Print tables, what the sweeper chose, and what failed. Return whether something did."""
    cell = _begun[0]
    store, sweep = Store(Outputs.of(cell.config).root), cell.config.sweep
    keys = [key for entry in manifest.read_manifest(store.outputs.root, sweep).cells for key in entry.stages.every()]
    lost = [(kind, key) for kind, key in dict.fromkeys(keys) if not store.outputs.record(kind, key).is_dir()]
    print(tables := report.finish(store.outputs.root, sweep))
    if chosen := _chosen(store.outputs.root):
        print(chosen)
    if mirrored := mirror.report(_begun, store, tables):
        print(mirrored)
    print("".join(f"{line}\n" for line in _failures(store.outputs, lost)), end="", file=sys.stderr)
    end_with(1 if lost else 0)
    return bool(lost)


def _chosen(output: Path) -> str:
    """Return what an optimizing sweeper wrote about its choice; empty if nothing."""
    file = output / "hydra" / _RESULTS
    return f"{file.name}:\n{file.read_text().strip()}" if file.exists() else ""


def _failures(outputs: Outputs, lost: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield a line for each stage that failed, and one for the stages that they block."""
    failed = [outputs.failed(key) for _, key in lost if outputs.failed(key).exists()]
    for file in failed:
        content = json.loads(file.read_text())
        yield f"failed: {content['label']}: {content['error']} (traceback in {file})"
    if others := len(lost) - len(failed):
        yield f"blocked: {others} stages more"
