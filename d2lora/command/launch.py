"""Run a grid from its plan to its report. A launcher does the jobs that are left; whether they are done, only the store
says.
"""

import dataclasses
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
from d2lora.command.grid import Composer, expand, valid_cells, values_without_cells, without_warmup
from d2lora.command.guard import end_with, one_line
from d2lora.command.launchers import Launcher as Facts
from d2lora.command.launchers import launcher_of
from d2lora.errors import UserError
from d2lora.outputs import Outputs
from d2lora.plan import Cell, Job
from d2lora.report import manifest
from d2lora.stages import Stage
from d2lora.store import Store


def sweep(
    config: DictConfig, loader: ConfigLoader, launcher: Launcher, params: object, arguments: Sequence[str]
) -> None:
    """Run a whole grid.

    The command ends with 1 if a stage is missing at the end; UserError (and nothing written) for invalid cells.
    """
    grid = expand(OverridesParser.create(config_loader=loader), params, arguments)
    compose, this = Composer(config, loader), launcher_of(config)
    every = valid_cells(compose, grid, composed=functools.partial(_ahead, this, this.count(config)))
    cells = plan.unique(every)
    first = cells[0].config
    store = Store(Outputs.of(first).root)
    tuner = tuning.Tuner(cells, compose, store) if first.tune else None
    planned = _plan(cells, tuner, store, this.count(config), this.engines(first.plan.engines))
    if not first.dry_run:
        _refuse_twice(first.sweep, this.queued(config.hydra.job.name))
    rehearsal.remember()
    for line in (*values_without_cells(every), *without_warmup(cells)):
        print(line, file=sys.stderr)
    print(planned, flush=not first.dry_run)
    if not first.dry_run:
        train = functools.partial(_train, config, launcher, store=store)
        cells, new = train_tuned(train, tuner) if tuner else _train_all(train, cells, store)
        _finish(cells, store, new)


def _ahead(facts: Facts, workers: int, cells: list[Cell]) -> None:
    """Have a launcher's workers start while the rows are checked, if there will be work for them."""
    if cells and not cells[0].config.dry_run:
        store = Store(Outputs.of(cells[0].config).root)
        if any(not store.done(stage) for stage in plan.stages(cells)):
            facts.ahead(workers)


def _plan(cells: list[Cell], tuner: tuning.Tuner | None, store: Store, workers: int, engines: int) -> str:
    """Return the plan as text; where settings are tuned, up to the choice."""
    notes = [*preflight.coverage(cells), *preflight.repeats(cells)]
    if tuner is None:
        return summary.plan_text(cells, store, workers, notes, engines=engines)
    begun, _ = tuner.begin()
    return summary.plan_text(begun, store, workers, [*notes, tuner.note()], tuner.later(), engines)


# Does what is left of cells' stages, and tells whether something was.
Train = Callable[[list[Cell]], bool]


def _train_all(train: Train, cells: list[Cell], store: Store) -> tuple[list[Cell], bool]:
    manifest.write_manifest(store.outputs.root, cells)
    return cells, train(cells)


def train_tuned(train: Train, tuner: tuning.Tuner) -> tuple[list[Cell], bool]:
    """Do the candidates, choose, and do the chosen ones' evaluations on the test.

    Returns the cells as they are after the choice, and whether something was left to do.
    """
    output = tuner.store.outputs.root
    begun, standing = tuner.begin()
    manifest.write_manifest(output, begun, standing)
    new = train(begun)
    cells, chosen, tuning_choice = tuner.choose()
    manifest.write_manifest(output, cells, tuning_choice)
    print(tuning.summary(tuning_choice), flush=True)
    return cells, (bool(chosen) and train(chosen)) or new


def _refuse_twice(sweep: str, jobs: list[str]) -> None:
    """Raise UserError while jobs of this sweep are queued: the same command again would start them twice."""
    if jobs:
        raise UserError(
            f"sweep={sweep}: {len(jobs)} of its Slurm jobs are still queued or running ({', '.join(jobs[:5])}): wait for them, or `scancel` them"
        )


def _train(config: DictConfig, launcher: Launcher, cells: list[Cell], store: Store) -> bool:
    """Let the launcher do the stages that are not done yet, and tell whether there were any."""
    output, this = Outputs.of(cells[0].config).root, launcher_of(config)
    new = any(not store.done(s) for s in plan.stages(cells))
    text, at_work = (functools.partial(f, cells, store) for f in (summary.progress_text, summary.at_work))
    this.begin(launcher)
    with terminal.board(text, at_work, output):  # type: ignore[arg-type] # joined, the two types are lost
        launch_batches(functools.partial(launch_once, launcher, config), cells, store, this)
    this.dismiss()
    return new


def _finish(cells: list[Cell], store: Store, new: bool) -> None:
    """Write and print the report, mirror it to W&B, and end with 1 if a stage's record is missing or damaged."""
    output = Outputs.of(cells[0].config).root
    damaged = [fault for stage in plan.stages(cells) if (fault := _damage(store, stage))]
    lost = [s for s in plan.stages(cells) if not store.done(s)]
    print(tables := report.finish(output, cells[0].config.sweep, draw=new))
    if damaged or lost:
        print(summary.failures_text(output, lost), *damaged, sep="", end="", file=sys.stderr)
    if not damaged and (mirrored := mirror.report(cells, store, tables)):
        print(mirrored)
    end_with(1 if damaged or lost else 0)


def _damage(store: Store, stage: Stage) -> str | None:
    """Return a line if a stage's record can't be read; None if it can, or does not exist."""
    try:
        store.record(stage)
    except UserError as error:
        return f"damaged: {error}\n"
    return None


# Hands jobs to the launcher; returns the error that stopped it before its end, or None.
Launch = Callable[[list[Job]], str | None]


def launch_batches(launch: Launch, cells: list[Cell], store: Store, facts: Facts) -> None:
    """Launch the batches of plan.batches, without what a failed preparation or training blocks."""
    done = {s.key for s in plan.stages(cells) if store.done(s)}
    for stage in plan.stages(cells):
        Outputs.of(cells[0].config).failed(stage.key).unlink(missing_ok=True)  # a failure of an earlier run
    for batch in plan.batches(cells, done, facts.engines(cells[0].config.plan.engines)):
        ready = [job for each in batch if (job := _ready(each, store))]
        if any(job.shared for job in ready):
            facts.dismiss()  # idle workers would keep their base in the GPU's memory, which the engine needs
        launch_batch(launch, ready, store, facts.apart)


def _ready(job: Job, store: Store) -> Job | None:
    """Return a job that waits for nothing, a shared one without the evaluations of adapters that are missing; None if it is blocked."""
    if not job.shared:
        return job if all(map(store.done, job.waits_for)) else None
    stages = tuple(s for s in job.stages if all(map(store.done, s.parents)))
    return dataclasses.replace(job, stages=stages) if stages else None


def launch_batch(launch: Launch, jobs: list[Job], store: Store, apart: bool) -> None:
    """Launch jobs, and again those whose worker died.

    Only the store tells whether a job is done, whatever the launcher reports. When the system kills a worker, some
    launchers (joblib) end the other workers too, and some (submitit) stop waiting for them. So jobs that were running
    when the launcher stopped are tried once more: together if each has a process of its own (`apart`), else one by one.
    Jobs that had not begun go on together.
    """
    waves: list[list[Job]] = [jobs] if jobs else []
    retried: list[Job] = []
    while waves:
        wave = waves.pop(0)
        begun_before = _begun(wave, store)
        stopped = launch(wave)
        if stopped is None:
            continue
        unfinished = [job for job in wave if _unsettled(job, store)]
        begun = [job for job in unfinished if _begun([job], store) - begun_before]
        if len(unfinished) == len(wave) and not begun:
            print(f"the launcher stopped: {stopped}", file=sys.stderr)
            continue
        dead = [job for job in begun if job in retried or len(wave) == 1]
        _report_dead(dead, store, stopped)
        again = [job for job in begun if job not in dead]
        rest = [job for job in unfinished if job not in begun]
        retried += again
        waves += [wave for wave in [rest, *([again] if apart else [[job] for job in again])] if wave]


def launch_once(launcher: Launcher, config: DictConfig, jobs: list[Job]) -> str | None:
    """Run jobs with the launcher.

    Return the error that stopped it, or None; either way none of its jobs is running any more.
    """
    overrides = [[*job.cell.overrides, f"job={[s.key for s in job.stages]}"] for job in jobs]
    try:
        # joblib warns when it replaces workers whose memory grew. Not ignored by catch_warnings: leaving that would undo the
        # filters that libraries set when jobs in this process import them.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs")
        launcher.launch(overrides, initial_job_idx=0)
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:
        launcher_of(config).wait_for_siblings(config.hydra.job.name)
        return f"{type(error).__name__}: {one_line(error) if isinstance(error, Exception) else error}"
    return None


def _report_dead(jobs: Iterable[Job], store: Store, stopped: str) -> None:
    """Write a failure for jobs whose worker died twice, or died when it was alone."""
    for job in jobs:
        error = RuntimeError(
            f"its worker died without an error: killed by the system, often for lack of memory ({stopped})"
        )
        stage = next(s for s in job.stages if not store.done(s))
        worker.write_failure(store.outputs, stage.key, stage.label, error)


def _unsettled(job: Job, store: Store) -> bool:
    """Tell whether a job has neither all its records nor a failure that says why."""
    missing = [s for s in job.stages if not store.done(s)]
    failed = [Outputs.of(job.cell.config).failed(s.key).exists() for s in missing]
    return bool(missing) and not (all(failed) if job.shared else any(failed))


def _begun(jobs: Iterable[Job], store: Store) -> set[str]:
    """Return the folders of workers that began a stage, now or in an earlier run, and did not publish it."""
    missing = {stage for job in jobs for stage in job.stages if not store.done(stage)}
    return {folder.name for stage in missing for folder in store.begun(stage)}
