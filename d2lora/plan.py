"""Cells -> stages, each once, and in which order a grid does them. No torch here.

    contamination (one a pair of test and training set)
    flips (one a bfloat16 base and benchmark)
    prepare (initializations computed from weights or data) -> warm-up -> adapt -> evaluate (one a benchmark)

A stage's key is a hash of everything that can change its result and of its parent's key, so cells share what they can:
a warm-up knows no n, method or task and serves the whole grid; the base's evaluation knows no seed or recipe.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from d2lora.keys import digest
from d2lora.settings import Config
from d2lora.stages import (
    Stage,
    adapt,
    contamination,
    evaluate,
    flips,
    prepare,
    warmup,
)
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.contamination import ContaminationSpec
from d2lora.stages.evaluate import EvaluateSpec
from d2lora.stages.flips import FlipsSpec
from d2lora.stages.prepare import PrepareSpec
from d2lora.stages.warmup import WarmupSpec


@dataclass(frozen=True)
class Chain:
    """The stages of one cell, in order."""

    warmup: Stage[WarmupSpec] | None
    adapt: Stage[AdaptSpec] | None
    evaluations: tuple[Stage[EvaluateSpec], ...]
    contamination: tuple[Stage[ContaminationSpec], ...] = ()
    prepare: Stage[PrepareSpec] | None = None
    flips: tuple[Stage[FlipsSpec], ...] = ()
    validations: tuple[Stage[EvaluateSpec], ...] = ()  # evaluations that settings are chosen by

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.contamination + self.flips + self.results

    @property
    def results(self) -> tuple[Stage, ...]:
        """The stages that the cell's result comes from: checks of data and base change none."""
        return self.trainings + self.validations + self.evaluations

    @property
    def trainings(self) -> tuple[Stage, ...]:
        """The stages that make an adapter, in order."""
        return tuple(stage for stage in (self.prepare, self.warmup, self.adapt) if stage)

    @property
    def adapter(self) -> Stage | None:
        """The stage whose adapter is evaluated; None for the base itself."""
        return self.adapt or self.warmup or self.prepare


def chain(config: Config) -> Chain:
    """Return the stages of a cell. UserError for a data set or model that is not where the config says."""
    start = prepare.stage(config)
    first = warmup.stage(config, start)
    second = adapt.stage(config, first or start)
    evaluations = tuple(evaluate.stages(config, second or first or start))
    validations = tuple(evaluate.validations(config, second or first or start))
    checks, batches = contamination.stages(config), tuple(flips.stages(config))
    return Chain(first, second, evaluations, checks, start, batches, validations)


# --- a grid --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A point of the grid: its config, its stages and the overrides that compose it."""

    config: Config
    chain: Chain
    overrides: tuple[str, ...] = ()

    @functools.cached_property
    def id(self) -> str:
        """A readable name with a hash of what the cell computes: equal cells have equal ids.

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
    """What one worker does in one go: an adaptation with its evaluations, or less. `cell` composes it, `stages` are its share."""

    cell: Cell
    stages: tuple[Stage, ...]

    @property
    def waits_for(self) -> list[Stage]:
        """The stages of other jobs that must be done before."""
        return [s.parent for s in self.stages if s.parent and s.parent not in self.stages]

    @property
    def cost(self) -> float:
        """Relative length, a sample that is trained on as 1."""
        return sum(stage.cost for stage in self.stages)


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """Equal cells once, in order: the first of them."""
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.id, cell)
    return list(first.values())


def stages(cells: Iterable[Cell]) -> list[Stage]:
    """Every stage of the cells once, in an order in which parents come first."""
    return list({s.key: s for cell in cells for s in cell.chain.stages}.values())


def batches(cells: list[Cell], done: set[str]) -> list[list[Job]]:
    """The jobs of a grid in the batches that a launcher gets, each longest first. Nothing in a batch waits for another job of
    it, so no worker waits for a lock.

    First preparations; then warm-ups, evaluations of the base, the cells without warm-up and the checks of base and data; then those
    with a warm-up; last what else is to be evaluated of an adaptation that another cell's job makes. The checks of data are the
    shortest. As a worker's first job they would have joblib measure it without torch: with torch it would then seem to leak, and
    be renewed.
    """
    taken = set(done)
    checks = [job for cell in cells if (job := _job(cell, cell.chain.contamination, taken)).stages]
    flip_jobs = [job for cell in cells if (job := _job(cell, cell.chain.flips, taken)).stages]
    prepares = _alone([(cell, cell.chain.prepare) for cell in cells], taken)
    first = [*_alone([(cell, cell.chain.warmup) for cell in cells], taken), *flip_jobs, *checks]
    second: list[Job] = []
    last: list[Job] = []
    for cell in cells:
        job = _job(cell, cell.chain.stages, taken)
        if job.stages:
            elsewhere = any(isinstance(s.spec, AdaptSpec) and s.key not in done for s in job.waits_for)
            (last if elsewhere else second if cell.chain.warmup else first).append(job)
    return [sorted(jobs, key=lambda job: -job.cost) for jobs in (prepares, first, second, last)]


def _alone(stages_of: Iterable[tuple[Cell, Stage | None]], taken: set[str]) -> list[Job]:
    """Return jobs of the preparations or warm-ups that are left, one each; without evaluations, for which others would wait."""
    return [_job(cell, (stage,), taken) for cell, stage in stages_of if stage and stage.key not in taken]


def _job(cell: Cell, wanted: Iterable[Stage], taken: set[str]) -> Job:
    left = tuple(s for s in wanted if s.key not in taken)
    taken.update(s.key for s in left)
    return Job(cell, left)
