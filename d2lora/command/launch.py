"""A grid from its plan to its report: what is left of it goes to a launcher, and the store alone says what was done."""

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from d2lora import mirror, plan, report, worker
from d2lora.command import preflight, rehearsal, summary, terminal, tuning
from d2lora.command.grid import Composer, expand, valid_cells, values_without_cells
from d2lora.command.guard import one_line
from d2lora.command.launchers import launcher_of
from d2lora.errors import UserError
from d2lora.outputs import Outputs
from d2lora.plan import Cell, Job
from d2lora.records import Tuning
from d2lora.report import manifest
from d2lora.stages import Stage
from d2lora.store import Store


def sweep(
    config: DictConfig, loader: ConfigLoader, launcher: Launcher, params: object, arguments: Sequence[str]
) -> None:
    """Do a whole grid. Exits with 1 if a stage is missing at the end; UserError (nothing written) for invalid cells."""
    grid = expand(OverridesParser.create(config_loader=loader), params, arguments)
    compose = Composer(config, loader)
    every = valid_cells(compose, grid)
    cells, this = plan.unique(every), launcher_of(config)
    first = cells[0].config
    store = Store(Outputs.of(first).root)
    tuner = tuning.Tuner(cells, compose, store) if first.tune else None
    planned = _plan(cells, tuner, store, this.count(config))
    if not first.dry_run:
        _refuse_twice(first.sweep, this.queued(config.hydra.job.name))
    rehearsal.remember()
    for line in values_without_cells(every):
        print(line, file=sys.stderr)
    print(planned, flush=not first.dry_run)
    if not first.dry_run:
        do = functools.partial(_train, config, launcher, store=store)
        cells, new = do_tuned(do, tuner) if tuner else (cells, do(cells, cells))
        _finish(cells, store, new)


def _plan(cells: list[Cell], tuner: tuning.Tuner | None, store: Store, workers: int) -> str:
    """Return the plan as text; where settings are tuned, up to the choice."""
    notes = preflight.coverage(cells)
    if tuner is None:
        return summary.plan_text(cells, store, workers, notes)
    begun, _ = tuner.begin()
    return summary.plan_text(begun, store, workers, [*notes, tuner.note()], tuner.later())


# Writes the manifest of a sweep's cells, with what is chosen where settings are tuned, and does what is left of some of them. Tells
# whether there was something to do.
Do = Callable[..., bool]


def do_tuned(do: Do, tuner: tuning.Tuner) -> tuple[list[Cell], bool]:
    """Do the candidates, choose, and do the chosen ones' evaluations on the test.

    Returns the cells as they are after the choice, and whether there was something to do.
    """
    begun, standing = tuner.begin()
    first = do(begun, begun, standing)
    cells, chosen, made = tuner.choose()
    print(tuning.summary(made), flush=True)
    return cells, do(cells, chosen, made) or first


def _refuse_twice(sweep: str, jobs: list[str]) -> None:
    """UserError while jobs of this sweep are still queued: typed again, it would start them twice."""
    if jobs:
        raise UserError(
            f"sweep={sweep}: {len(jobs)} of its Slurm jobs are still queued or running ({', '.join(jobs[:5])}): wait for them, or `scancel` them"
        )


def _train(
    config: DictConfig,
    launcher: Launcher,
    every: list[Cell],
    cells: list[Cell],
    made: Tuning | None = None,
    *,
    store: Store,
) -> bool:
    """Write the manifest of `every` cell and have the launcher do what is left of the stages of `cells`; tell whether something was."""
    output, this = Outputs.of(every[0].config).root, launcher_of(config)
    manifest.write_manifest(output, every, made)
    if not cells:
        return False
    new = any(not store.done(s) for s in plan.stages(cells))
    text, at_work = (functools.partial(f, cells, store) for f in (summary.progress_text, summary.at_work))
    with terminal.board(text, at_work, output):  # type: ignore[arg-type] # joined, the two types are lost
        launch_batches(functools.partial(launch_once, launcher, config), cells, store, this.apart)
    this.dismiss()
    return new


def _finish(cells: list[Cell], store: Store, new: bool) -> None:
    """Write and print the report, mirror it, and exit with 1 if a stage's record is missing or damaged."""
    output = Outputs.of(cells[0].config).root
    damaged = [fault for stage in plan.stages(cells) if (fault := _damage(store, stage))]
    lost = [s for s in plan.stages(cells) if not store.done(s)]
    print(tables := report.finish(output, cells[0].config.sweep, draw=new))
    if damaged or lost:
        print(summary.failures_text(output, lost), *damaged, sep="", end="", file=sys.stderr)
    if not damaged and (told := mirror.report(cells, store, tables)):
        print(told)
    if damaged or lost:
        raise SystemExit(1)


def _damage(store: Store, stage: Stage) -> str | None:
    """What is wrong with a stage's record, if there is one and it can't be read."""
    try:
        store.record(stage)
    except UserError as error:
        return f"damaged: {error}\n"
    return None


# Hands jobs to the launcher, and says what stopped it before its end, if something did.
Launch = Callable[[list[Job]], str | None]


def launch_batches(launch: Launch, cells: list[Cell], store: Store, apart: bool) -> None:
    """Launch the batches of plan.batches, each without what the failure of a preparation or warm-up blocks."""
    done = {s.key for s in plan.stages(cells) if store.done(s)}
    for stage in plan.stages(cells):
        Outputs.of(cells[0].config).failed(stage.key).unlink(missing_ok=True)  # of an earlier try
    for batch in plan.batches(cells, done):
        launch_batch(launch, [job for job in batch if all(map(store.done, job.waits_for))], store, apart)


def launch_batch(launch: Launch, jobs: list[Job], store: Store, apart: bool) -> None:
    """Have jobs done. Whether they worked is judged by the store alone, so a launcher may say what it likes.

    A worker that the system kills takes its siblings with it on some launchers (joblib), and some (submitit) stop waiting for
    them. So what was at work when the launcher stopped is tried once more: all of it together where a job has a process of
    its own (`apart`), else each alone. What had not begun goes on together.
    """
    waves: list[list[Job]] = [jobs] if jobs else []
    tried: list[Job] = []
    while waves:
        wave = waves.pop(0)
        begun_before = _begun(wave, store)
        stopped = launch(wave)
        if stopped is None:
            continue
        left = [job for job in wave if _unsettled(job, store)]
        begun = [job for job in left if _begun([job], store) - begun_before]
        if len(left) == len(wave) and not begun:
            print(f"the launcher stopped: {stopped}", file=sys.stderr)
            continue
        dead = [job for job in begun if job in tried or len(wave) == 1]
        _report_dead(dead, store, stopped)
        again = [job for job in begun if job not in dead]
        rest = [job for job in left if job not in begun]
        tried += again
        waves += [wave for wave in [rest, *([again] if apart else [[job] for job in again])] if wave]


def launch_once(launcher: Launcher, config: DictConfig, jobs: list[Job]) -> str | None:
    """What stopped the launcher; None if it came to its end. No job of it is at work any more, either way."""
    overrides = [[*job.cell.overrides, f"job={[s.key for s in job.stages]}"] for job in jobs]
    try:
        # Not in catch_warnings: leaving it would undo the filters that libraries set as jobs in this process import them.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs")  # joblib renews workers that grew
        launcher.launch(overrides, initial_job_idx=0)
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:
        launcher_of(config).wait_for_siblings(config.hydra.job.name)
        return f"{type(error).__name__}: {one_line(error) if isinstance(error, Exception) else error}"
    return None


def _report_dead(jobs: Iterable[Job], store: Store, stopped: str) -> None:
    """Write the failure of jobs whose worker died twice, or alone."""
    for job in jobs:
        error = RuntimeError(f"its worker died without a word: killed by the system, often for memory ({stopped})")
        stage = next(s for s in job.stages if not store.done(s))
        worker.write_failure(store.outputs, stage.key, stage.label, error)


def _unsettled(job: Job, store: Store) -> bool:
    """Whether a job has neither all its records nor a failure that says why."""
    left = [s for s in job.stages if not store.done(s)]
    return bool(left) and not any(Outputs.of(job.cell.config).failed(s.key).exists() for s in left)


def _begun(jobs: Iterable[Job], store: Store) -> set[str]:
    """The folders of workers that began a stage and did not finish it, also of earlier sweeps; none of a stage that is done."""
    left = {stage for job in jobs for stage in job.stages if not store.done(stage)}
    return {folder.name for stage in left for folder in store.begun(stage)}
