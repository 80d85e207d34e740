"""A grid: composes all cells first (which also checks them), plans their stages, and gives a launcher what is left."""

import functools
import itertools
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from d2lora import pipeline, plan, report
from d2lora.command import cli, progress, rehearsal, summary
from d2lora.errors import UserError
from d2lora.mirror import runs
from d2lora.plan import Cell, Job, Stage
from d2lora.report import manifest
from d2lora.settings import Config
from d2lora.store import Store

_SLURM_SECONDS = 20  # between two looks at Slurm's queue


def sweep(config: DictConfig, loader: Any, launcher: Any, params: dict | list, arguments: Sequence[str]) -> None:
    """Do a whole grid. Exits with 1 if a stage is missing at the end; UserError (nothing written) for invalid cells."""
    grid = expand(OverridesParser.create(config_loader=loader), params, arguments)
    cells = valid_cells(Composer(config, loader), grid)
    output = pipeline.output(cells[0].config)
    store, workers = Store(output), _workers(config)
    planned = summary.plan_text(cells, store, workers, cli.coverage(cells))
    if not cells[0].config.dry_run:
        _refuse_twice(config, cells[0].config.sweep)
    rehearsal.remember()
    if cells[0].config.dry_run:
        print(planned)
        return
    print(planned, flush=True)
    manifest.write_manifest(output, cells)
    new = any(not store.done(s) for s in plan.stages(cells))
    shown = [functools.partial(f, cells, store) for f in (summary.progress_text, summary.at_work)]
    with progress.board(*shown, output):
        apart = "submitit" in config.hydra.launcher.get("_target_", "")  # a process a job: none takes others along
        _launch_all(functools.partial(_launch_once, launcher, config), cells, store, together=apart)
    _dismiss_workers(config)
    damaged = [fault for stage in plan.stages(cells) if (fault := _damage(store, stage))]
    lost = [s for s in plan.stages(cells) if not store.done(s)]
    print(tables := report.finish(output, cells[0].config.sweep, draw=new))
    if damaged or lost:
        print(summary.failures_text(output, lost), *damaged, sep="", end="", file=sys.stderr)
    if not damaged and (told := runs.report(cells, store, tables)):
        print(told)
    if damaged or lost:
        raise SystemExit(1)


def _dismiss_workers(config: DictConfig) -> None:
    """Have joblib's workers end beside the report: they take seconds, and it would keep them for another call."""
    if "joblib" in config.hydra.launcher.get("_target_", ""):
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor(reuse=True).shutdown(wait=False)


def _damage(store: Store, stage: Stage) -> str | None:
    """What is wrong with a stage's record, if there is one and it can't be read."""
    try:
        store.record(stage)
    except UserError as error:
        return f"damaged: {error}\n"
    return None


# Hands jobs to the launcher, and says what stopped it before its end, if something did.
Launch = Callable[[list[Job]], str | None]


def _launch_all(launch: Launch, cells: list[Cell], store: Store, together: bool) -> None:
    """The batches of plan.batches, each without what the failure of a preparation or warm-up blocks."""
    done = {s.key for s in plan.stages(cells) if store.done(s)}
    for stage in plan.stages(cells):
        pipeline.failure(cells[0].config, stage).unlink(missing_ok=True)  # of an earlier try
    for batch in plan.batches(cells, done):
        _launch(launch, [job for job in batch if all(map(store.done, job.waits_for))], store, together)


def _launch(launch: Launch, jobs: list[Job], store: Store, together: bool) -> None:
    """Have jobs done. Whether they worked is judged by the store alone, so a launcher may say what it likes.

    A worker that the system kills takes its siblings with it on some launchers (joblib), and some (submitit) stop waiting for
    them. So what was at work when the launcher stopped is tried once more: all of it `together` where a job has a process
    of its own, else each alone. What had not begun goes on together.
    """
    waves: list[list[Job]] = [jobs] if jobs else []
    tried: list[Job] = []
    while waves:
        wave = waves.pop(0)
        before = {stage.key: _begun(stage, store) for job in wave for stage in job.stages}
        stopped = launch(wave)
        if stopped is None:
            continue
        left = [job for job in wave if _unsettled(job, store)]
        begun = [job for job in left if any(_begun(stage, store) - before[stage.key] for stage in job.stages)]
        dead = [job for job in begun if job in tried or len(wave) == 1]
        for job in dead:
            error = RuntimeError(f"its worker died without a word: killed by the system, often for memory ({stopped})")
            pipeline.report_failure(job.cell.config, next(s for s in job.stages if not store.done(s)), error)
        if len(left) == len(wave) and not begun:
            print(f"the launcher stopped: {stopped}", file=sys.stderr)
            continue
        again = [job for job in begun if job not in dead]
        rest = [job for job in left if job not in begun]
        tried += again
        waves += [wave for wave in [rest, *([again] if together else [[job] for job in again])] if wave]


def _launch_once(launcher: Any, config: DictConfig, jobs: list[Job]) -> str | None:
    """What stopped the launcher; None if it came to its end. No job of it is at work any more, either way."""
    overrides = [[*job.cell.overrides, f"job={[s.key for s in job.stages]}"] for job in jobs]
    try:
        # Not in catch_warnings: leaving it would undo the filters that libraries set as jobs in this process import them.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs")  # joblib renews workers that grew
        launcher.launch(overrides, initial_job_idx=0)
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:
        _wait_for_siblings(config)
        return f"{type(error).__name__}: {cli.one_line(error) if isinstance(error, Exception) else error}"
    return None


def _wait_for_siblings(config: DictConfig) -> None:
    """Wait for jobs that a launcher gave up on when another failed: processes of this one, or Slurm's."""
    import psutil

    psutil.wait_procs([p for p in psutil.Process().children(recursive=True) if "submitit" in " ".join(_command(p))])
    while _slurm_busy(config):
        time.sleep(_SLURM_SECONDS)


def _slurm_busy(config: DictConfig) -> bool:
    """Whether Slurm has jobs of this sweep, or may have: while it does not answer, it is asked again."""
    try:
        return bool(_slurm_jobs(config))
    except UserError:
        return True


def _command(process: Any) -> list[str]:
    """What a process was started with; nothing of one that has ended."""
    import psutil

    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _unsettled(job: Job, store: Store) -> bool:
    """Whether a job has neither all its records nor a failure that says why."""
    left = [s for s in job.stages if not store.done(s)]
    return bool(left) and not any(pipeline.failure(job.cell.config, s).exists() for s in left)


def _begun(stage: Stage, store: Store) -> set[str]:
    """The folders of workers that began a stage and did not finish it, also of earlier sweeps; none of a stage that is done."""
    return set() if store.done(stage) else {f.name for f in store.place(stage).parent.glob(f".{stage.key}-*")}


def _slurm_jobs(config: DictConfig) -> list[str]:
    """This sweep's jobs that Slurm has queued or running; none with another launcher. UserError if Slurm does not answer."""
    if "Slurm" not in config.hydra.launcher.get("_target_", "") or not shutil.which("squeue"):
        return []
    command = ["squeue", "--me", "--noheader", "--format=%i", f"--name={config.hydra.job.name}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:  # taken for "no jobs" it would have them started twice
        raise UserError(f"Slurm does not say whether jobs of this sweep are left: squeue: {answer.stderr.strip()}")
    return answer.stdout.split()


def _refuse_twice(config: DictConfig, sweep: str) -> None:
    """UserError while Slurm still has jobs of this sweep: typed again, it would start them twice."""
    if jobs := _slurm_jobs(config):
        raise UserError(
            f"sweep={sweep}: {len(jobs)} of its Slurm jobs are still queued or running ({', '.join(jobs[:5])}): wait for them, or `scancel` them"
        )


def _workers(config: DictConfig) -> int:
    """How many jobs the launcher runs at once, as far as its config says."""
    count = config.hydra.launcher.get("n_jobs", 1) or 1
    return count if count > 0 else os.cpu_count() or 1


# --- composing -----------------------------------------------------------------------------------------------------


def expand(parser: OverridesParser, params: dict | list, arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides of each cell. `params` is a grid (key -> values) or a list of grids, which are joined.

    A key on the command line replaces that of the sweep's file, in every grid of it.
    """
    grids = params if isinstance(params, list) else [params]
    if not grids or not all(isinstance(grid, dict) for grid in grids):
        raise UserError(f"hydra.sweeper.params={params}: a mapping of keys to values, or a list of such mappings")
    return [cell for grid in grids for cell in _product(parser, grid, arguments)]


def _product(parser: OverridesParser, params: dict, arguments: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """The overrides of each cell of one grid."""
    given = [f"{key}={_listed(value)}" for key, value in params.items()]
    axes: dict[str, list[str]] = {}
    for override in [*parser.parse_overrides(given), *parser.parse_overrides(list(arguments))]:
        key = override.get_key_element()
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise UserError(f"{override.input_line}: a grid needs listed values: {key}=a,b,c or {key}=range(a,b)")
        if override.is_delete():
            axes[key] = [override.input_line or key]
        elif override.is_sweep_override():
            axes[key] = [f"{key}={text}" for text in override.sweep_string_iterator()]
        else:
            axes[key] = [f"{key}={override.get_value_element_as_str()}"]
    return itertools.product(*axes.values())


def _listed(value: Any) -> str:
    """A sweep file's value as on the command line: [a, b] is a,b."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


class Composer:
    """Composes cells. Hydra takes about 0.1 s each, so it is asked once a choice of groups; values are set on copies."""

    def __init__(self, config: DictConfig, loader: Any) -> None:
        self.config, self.loader = config, loader
        self.parser = OverridesParser.create(config_loader=loader)

    def __call__(self, overrides: Iterable[str]) -> Cell:
        """The cell of a list of overrides; UserError for what is wrong with it."""
        overrides = tuple(overrides)
        plain = [o for o in overrides if self._is_plain(o)]
        try:
            composed = self._groups(tuple(o for o in overrides if o not in plain)).copy()
            for key, value in map(self._value, plain):
                if OmegaConf.select(composed, key, default=self) is self and "." not in key:
                    raise UserError(f"{key}: there is no such key; --cfg job shows all")
                OmegaConf.update(composed, key, value)
            return cli.cell(composed, overrides)
        except OmegaConfBaseException as error:
            raise UserError(cli.one_line(error)) from None

    @functools.cache  # noqa: B019 (one composer a process)
    def _is_plain(self, override: str) -> bool:
        parsed = self.parser.parse_override(override)
        return not (parsed.is_add() or parsed.is_delete() or parsed.package) and not self.loader.get_group_options(
            parsed.key_or_group
        )

    @functools.cache  # noqa: B019
    def _value(self, override: str) -> tuple[str, Any]:
        parsed = self.parser.parse_override(override)
        return parsed.key_or_group, parsed.value()

    @functools.cache  # noqa: B019
    def _groups(self, overrides: tuple[str, ...]) -> DictConfig:
        composed = self.loader.load_sweep_config(self.config, list(overrides))
        with open_dict(composed):
            composed.pop("hydra")
        return composed


def valid_cells(
    compose: Composer, grid: Iterable[tuple[str, ...]], check: Callable[[Config, set[str]], None] = cli.check
) -> list[Cell]:
    """The grid's cells, each once. A grid with invalid cells is refused whole, listing them, unless skip_invalid."""
    cells, problems, seen = [], {}, set()
    for overrides in grid:
        try:
            cell = compose(overrides)
            check(cell.config, seen)
            cells.append(cell)
        except (UserError, HydraException) as error:
            problems.setdefault(str(error) if isinstance(error, UserError) else cli.one_line(error), []).append(
                overrides
            )
    skip = any(c.config.skip_invalid for c in cells)
    if problems and not (skip and cells):
        lines = [
            f"{message}" + (f" [{len(found)} of the grid's cells]" if len(found) > 1 else "")
            for message, found in problems.items()
        ]
        raise UserError("; ".join(lines) + ("; skip_invalid=true drops such cells" if cells else ""))
    for message in problems:
        print(f"left out: {message}", file=sys.stderr)
    return plan.unique(cells)
