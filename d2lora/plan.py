"""Derive the stages of cells, each once, and the order in which a grid does them. No torch here.

    contamination (one for each pair of a test and a training set)
    flips (one for each bfloat16 base and benchmark)
    prepare (initializations computed from weights or data) -> warm-up -> adapt -> evaluate (one for each benchmark)

A stage's key is a hash of everything that can change its result and of its parent's key, so cells share stages wherever
possible: a warm-up's key has no n, method or task, so one serves the whole grid; the base's evaluation has no seed or
recipe.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from d2lora.keys import digest
from d2lora.settings import Config
from d2lora.settings.controls import MergedControl
from d2lora.stages import (
    Stage,
    adapt,
    contamination,
    evaluate,
    flips,
    merge,
    prepare,
    warmup,
)
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.contamination import ContaminationSpec
from d2lora.stages.evaluate import EvaluateSpec
from d2lora.stages.flips import FlipsSpec
from d2lora.stages.merge import MergeSpec
from d2lora.stages.prepare import PrepareSpec
from d2lora.stages.warmup import WarmupSpec


@dataclass(frozen=True)
class Chain:
    """The stages of one cell, in order."""

    prepare: Stage[PrepareSpec] | None = None
    warmup: Stage[WarmupSpec] | None = None
    adapt: Stage[AdaptSpec] | None = None
    merge: Stage[MergeSpec] | None = None
    evaluations: tuple[Stage[EvaluateSpec], ...] = ()
    validations: tuple[Stage[EvaluateSpec], ...] = ()  # evaluations that settings are chosen by
    contamination: tuple[Stage[ContaminationSpec], ...] = ()
    flips: tuple[Stage[FlipsSpec], ...] = ()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return all stages, checks included."""
        return self.contamination + self.flips + self.results

    @property
    def results(self) -> tuple[Stage, ...]:
        """Return the stages that the cell's result comes from, without the checks of data and base."""
        return self.trainings + self.validations + self.evaluations

    @property
    def trainings(self) -> tuple[Stage, ...]:
        """Return the stages that make an adapter, in order."""
        return tuple(stage for stage in (self.prepare, self.warmup, self.adapt, self.merge) if stage)

    @property
    def adapter(self) -> Stage | None:
        """Return the stage whose adapter is evaluated; None for the base itself."""
        return self.merge or self.adapt or self.warmup or self.prepare


def chain(config: Config) -> Chain:
    """Return the stages of a cell. UserError for a data set or model that is not where the config says."""
    prepared = prepare.stage(config)
    warmed = warmup.stage(config, prepared)
    control = config.effective_control
    merged: Stage[MergeSpec] | None = None
    if isinstance(control, MergedControl):  # the warm-up's adapter is added to one that was trained without it
        adapted = adapt.stage(config, prepared, warmed=False)
        merged = merge.stage(config, control, adapted, warmed) if adapted and warmed else None
    else:
        adapted = adapt.stage(config, warmed or prepared, warmed=warmed is not None)
    adapter = merged or adapted or warmed or prepared
    return Chain(
        prepare=prepared,
        warmup=warmed,
        adapt=adapted,
        merge=merged,
        evaluations=tuple(evaluate.stages(config, adapter)),
        validations=tuple(evaluate.validations(config, adapter)),
        contamination=contamination.stages(config),
        flips=tuple(flips.stages(config)),
    )


# --- a grid --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A point of the grid: its config, its stages and the overrides that compose it."""

    config: Config
    chain: Chain
    overrides: tuple[str, ...] = ()

    @functools.cached_property
    def id(self) -> str:
        """Return a readable name with a hash of what the cell computes: equal cells have equal ids.

        Where settings are tuned, a cell is the same whether or not it is evaluated on the test in the end.
        """
        c, chain = self.config, self.chain
        computed = digest(
            [s.key for s in chain.trainings + (chain.validations or chain.evaluations)] + [c.method.name, c.task.name],
            8,
        )
        return f"{c.task.name}-{c.method.name}-m{c.m}-n{c.n}-s{c.seed}-{computed}"


@dataclass(frozen=True)
class Job:
    """A worker's share: an adaptation with its evaluations, or less. `cell` has the config, `stages` are those to do.

    A `shared` job is evaluations of several cells, each independent of the others, that ask one engine.
    """

    cell: Cell
    stages: tuple[Stage, ...]
    shared: bool = False

    @property
    def waits_for(self) -> list[Stage]:
        """Return the stages of other jobs that must be done before."""
        return [parent for s in self.stages for parent in s.parents if parent not in self.stages]

    @property
    def cost(self) -> float:
        """Return the relative length, in samples that are trained on."""
        return sum(stage.cost for stage in self.stages)


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells without those equal to an earlier one, in order."""
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.id, cell)
    return list(first.values())


def stages(cells: Iterable[Cell]) -> list[Stage]:
    """Return every stage of the cells once, parents first."""
    return list({s.key: s for cell in cells for s in cell.chain.stages}.values())


def batches(cells: list[Cell], done: set[str], engines: int = 1) -> list[list[Job]]:
    """Return the jobs of a grid in batches for the launcher, each sorted longest first.

    No job waits for another job of its batch, so no worker waits for a lock. The batches: preparations; then warm-ups,
    cells without a warm-up, evaluations of the base and checks; then cells with a warm-up; then evaluations of
    adaptations that another cell's job makes; then evaluations that ask an engine, those of one base together, in as many
    jobs as there are `engines` to start. Checks of data are the shortest jobs, so they come last: as a worker's
    first job they would let joblib measure the worker's memory before it imports torch, and joblib would then take the
    import for a leak and replace the worker.
    """
    taken = set(done)
    checks = [job for cell in cells if (job := _job(cell, cell.chain.contamination, taken)).stages]
    flip_jobs = [job for cell in cells if (job := _job(cell, cell.chain.flips, taken)).stages]
    prepares = _alone([(cell, cell.chain.prepare) for cell in cells], taken)
    first = [*_alone([(cell, cell.chain.warmup) for cell in cells], taken), *flip_jobs, *checks]
    second: list[Job] = []
    last: list[Job] = []
    for cell in cells:
        job = _job(cell, (s for s in cell.chain.stages if not evaluate.asks_engine(s)), taken)
        if job.stages:
            elsewhere = any(isinstance(s.spec, AdaptSpec) and s.key not in done for s in job.waits_for)
            (last if elsewhere else second if cell.chain.warmup else first).append(job)
    together = shared_jobs(cells, taken, engines)
    return [sorted(jobs, key=lambda job: -job.cost) for jobs in (prepares, first, second, last, together)]


def shared_jobs(cells: Iterable[Cell], taken: set[str], engines: int) -> list[Job]:
    """Return the jobs of evaluations that ask an engine, of those not `taken`: one for each base, or several for `engines`."""
    by_base: dict[str, dict[str | None, list[tuple[Cell, Stage]]]] = {}  # by base and adapter
    for cell in cells:
        for stage in filter(evaluate.asks_engine, cell.chain.results):
            if stage.key not in taken:
                taken.add(stage.key)
                adapter = stage.parent.key if stage.parent else None
                same_base = by_base.setdefault(cell.config.model.model_dump_json(), {})
                same_base.setdefault(adapter, []).append((cell, stage))
    each = max(1, engines // max(1, len(by_base)))
    parts = [list(adapters.values())[i::each] for adapters in by_base.values() for i in range(each)]
    return [
        Job(part[0][0][0], tuple(stage for same in part for _, stage in same), shared=True) for part in parts if part
    ]


def _alone(stages_of: Iterable[tuple[Cell, Stage | None]], taken: set[str]) -> list[Job]:
    """Return a job for each preparation or warm-up that is not done, without evaluations, for which others would wait."""
    return [_job(cell, (stage,), taken) for cell, stage in stages_of if stage and stage.key not in taken]


def _job(cell: Cell, stages: Iterable[Stage], taken: set[str]) -> Job:
    """Return a cell's job of those stages that no earlier job has, and add them to `taken`."""
    free = tuple(s for s in stages if s.key not in taken)
    taken.update(s.key for s in free)
    return Job(cell, free)
