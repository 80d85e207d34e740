"""Cells -> stages, each once. What a stage is, what its key covers, and in which order a grid does them. No torch here.

    contamination (one a pair of test and training set)
    flips (one a bfloat16 base and benchmark)
    prepare (initializations computed from weights or data) -> warm-up -> adapt -> evaluate (one a benchmark)

A stage's key is a hash of everything that can change its result and of its parent's key, so cells share what they can:
a warm-up knows no n, method or task and serves the whole grid; the base's evaluation knows no seed or recipe.
"""

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version

from d2lora import data
from d2lora.data import overlap
from d2lora.settings import QUANTIZING, Benchmark, Config, Task, Warmup, fields

# Raised by hand when a stage's code changes what it computes: tests/test_golden.py fails where results move and these do not.
VERSIONS = {"contamination": 2, "flips": 1, "prepare": 2, "warmup": 2, "adapt": 2, "evaluate": 4}

FLIP_ITEMS = 200  # of a benchmark's, the first: batch 1 is slow


def canonical(value: object) -> str:
    """JSON with one spelling per value; TypeError or ValueError for what JSON can't carry exactly."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    if json.loads(text) != value:
        raise ValueError(f"JSON does not carry {value!r} exactly")
    return text


def digest(value: object, digits: int = 20) -> str:
    """The first hex digits of a JSON value's SHA-256: the name of what is kept by its content."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:digits]


@dataclass(frozen=True)
class Stage:
    """A unit of work. `label` and `samples` are for people: no part of the key."""

    name: str
    spec: dict
    parent: "Stage | None" = None
    label: str = field(default="", compare=False)
    samples: int | None = field(
        default=0, compare=False
    )  # rows x epochs to be seen; None where the data set's size isn't known yet

    @functools.cached_property
    def key(self) -> str:
        """20 hex digits of SHA-256 over name, version, spec and the parent's key."""
        parent = self.parent.key if self.parent else None
        return digest({"stage": self.name, "version": VERSIONS[self.name], "spec": self.spec, "parent": parent})

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class Chain:
    """The stages of one cell, in order."""

    warmup: Stage | None
    adapt: Stage | None
    evaluations: tuple[Stage, ...]
    contamination: tuple[Stage, ...] = ()
    prepare: Stage | None = None
    flips: tuple[Stage, ...] = ()

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.contamination + self.flips + self.results

    @property
    def results(self) -> tuple[Stage, ...]:
        """The stages that the cell's result comes from: checks of data and base change none."""
        return tuple(s for s in (self.prepare, self.warmup, self.adapt) if s) + self.evaluations

    @property
    def adapter(self) -> Stage | None:
        """The stage whose adapter is evaluated; None for the base itself."""
        return self.adapt or self.warmup or self.prepare


def chain(config: Config) -> Chain:
    """The stages of a cell. UserError for a data set or model that is not where the config says."""
    prepare = _prepare(config) if _is_prepared(config) else None
    warmup = _warmup(config, prepare) if config.m != 0 else None
    adapt = _adapt(config, warmup or prepare) if config.n != 0 else None
    evaluations = tuple(_evaluations(config, adapt or warmup or prepare))
    checks = tuple(map(_contamination, pairs(config)))
    return Chain(warmup, adapt, evaluations, checks, prepare, tuple(_flips(config)))


def _is_prepared(config: Config) -> bool:
    """Whether the cell's adapter starts from a preparation.

    D2LoRA(0, 0) is the base, however it would have started; but with LoftQ it is a quantized base with its adapter.
    """
    return config.init.prepared and (config.m != 0 or config.n != 0 or config.init.name in QUANTIZING)


def sources(config: Config) -> dict[str, data.Data]:
    """The data sets that a cell reads, by their keys: it needs none of a phase that it has not."""
    read = {"task.data": config.task.data} if config.n != 0 else {}
    if config.m != 0 or (_is_prepared(config) and config.init.data == "general"):
        read["warmup.data"] = config.warmup.data
    return read | {f"benchmark {name}": b.data for name, b in config.task.benchmark.items()}


def _prepare(config: Config) -> Stage:
    """What an initialization computes: shared by all cells whose base, LoRA settings and data are these."""
    init = config.init
    looked_at = _prepare_data(config) if init.data else {}
    spec = looked_at | {
        "model": data.model_identity(config.model),
        "init": init.model_dump(exclude_none=True),
        "lora": config.recipe.lora.model_dump(),
        "libraries": _versions("peft"),
    }
    label = f"preparation of {init.name}"
    if init.random:
        spec["seed"] = config.seed
        label += _seed(config)
    return Stage("prepare", spec, label=label, samples=looked_at.get("samples", 0))


def _prepare_data(config: Config) -> dict:
    """The rows an initialization looks at: the first of the warm-up's order, or of the cell's own n rows."""
    init, task, w = config.init, config.task, config.warmup
    limits = {"data_seed": config.data_seed, "max_length": config.recipe.max_length}
    if init.data == "general":
        return limits | {
            "data": data.identity(w.data, config.split_seed),
            **_reading(w),
            "samples": init.samples,
        }
    samples = init.samples if config.n == "all" else min(init.samples or 0, int(config.n))
    return limits | {"data": data.identity(task.data, config.split_seed), "task": _rendering(task), "samples": samples}


def _training(config: Config, phase: str, epochs: int) -> dict:
    """What of the recipe changes a training's result beyond rounding."""
    recipe = config.recipe.model_dump(
        include={"lora", "schedule", "lr_warmup_ratio", "weight_decay", "max_grad_norm", "batch", "max_length"}
    )
    shared = {
        "model": data.model_identity(config.model),
        "init": config.init.model_dump(exclude_none=True),
        "seed": config.seed,
        "data_seed": config.data_seed,
    }
    if config.recipe.lora.dropout:  # which units it drops depends on how the batch is laid out
        recipe |= config.recipe.model_dump(include={"packing", "micro_batch", "attention"})
    return shared | recipe | {"lr": getattr(config.recipe.lr, phase), "epochs": epochs, "libraries": _versions("trl")}


def _versions(*packages: str) -> dict:
    """Versions of packages whose releases have changed results (TRL's ORPO loss, lm-eval's tasks)."""
    return {p: version(p) for p in packages}


def _warmup(config: Config, parent: Stage | None) -> Stage:
    w = config.warmup
    spec = _training(config, "warmup", w.epochs) | {
        "data": data.identity(w.data, config.split_seed),
        **_reading(w),
        "m": config.m,
    }
    return Stage(
        "warmup",
        spec,
        parent,
        label=f"warm-up m={amount(config.m)} of {w.name}{_seed(config)}",
        samples=_samples(config, w.data, config.m, w.epochs),
    )


def _adapt(config: Config, parent: Stage | None) -> Stage:
    task, method = config.task, config.method
    spec = _training(config, method.name, method.epochs)
    spec |= {"data": data.identity(task.data, config.split_seed), "n": config.n, "task": _rendering(task)}
    spec |= {"method": method.model_dump(exclude_none=True)}
    label = f"{method.name} D2LoRA({amount(config.m)}, {amount(config.n)}) on {task.name}{_seed(config)}"
    return Stage("adapt", spec, parent, label, _samples(config, task.data, config.n, method.epochs))


def _rendering(task: Task) -> dict:
    """What of a task turns its rows into texts."""
    return task.model_dump(
        include={"prompt", "prefix", "chosen", "rejected", "full_chosen", "full_rejected", "continuation"}
    ) | task.model_dump(include={"rendered"}, exclude_defaults=True)


def _reading(warmup: Warmup) -> dict:
    """What of a warm-up turns its rows into conversations."""
    return {"messages": warmup.messages} | warmup.model_dump(include={"tools", "rendered"}, exclude_defaults=True)


def _evaluations(config: Config, parent: Stage | None) -> Iterable[Stage]:
    model = {} if parent else {"model": data.model_identity(config.model)}
    whose = parent.label if parent else f"base {config.model.name}"
    for name, benchmark in config.task.benchmark.items():
        scored = benchmark.model_dump(exclude={"data"}) | {"data": data.identity(benchmark.data, config.split_seed)}
        yield Stage("evaluate", {"benchmark": scored, **model}, parent, f"{name} of {whose}")
    for name in config.task.lm_eval:
        yield Stage(
            "evaluate", {"lm_eval": name, "libraries": _versions("lm-eval"), **model}, parent, f"{name} of {whose}"
        )


def _flips(config: Config) -> Iterable[Stage]:
    """Of a bfloat16 model, the base's evaluations alone and in batches: one each for all cells."""
    if config.model.dtype != "bfloat16":
        return
    batches = [1, max(2, config.recipe.eval_batch)]
    for stage in _evaluations(config, None):
        spec = stage.spec | {"batches": batches, "items": FLIP_ITEMS, "evaluation": VERSIONS["evaluate"]}
        yield Stage("flips", spec, label=f"{stage.label} at batch {batches[0]} and {batches[1]}")


@dataclass(frozen=True)
class Pair:
    """A test set and a training set of either phase, whole: the pair is the same for all n and m."""

    benchmark: Benchmark
    rows: data.Data
    columns: tuple[str, ...]  # of the training set
    templates: tuple[str, ...]  # what makes its texts of them
    split_seed: int
    name: str  # for people: "training set / benchmark"

    @property
    def question(self) -> list[str]:
        return sorted(fields(self.benchmark.prompt))

    @property
    def answer(self) -> list[str]:
        return sorted(fields(self.benchmark.gold))


def pairs(config: Config) -> list[Pair]:
    """What a cell trains on or is prepared with, against what judges it. lm-evaluation-harness's own tasks are not read, so not checked."""
    trained: list[tuple[str, data.Data, tuple[str, ...], tuple[str, ...]]] = []
    read = sources(config)
    if "warmup.data" in read:
        trained.append((config.warmup.name, config.warmup.data, (config.warmup.messages,), ()))
    if "task.data" in read:
        trained.append((config.task.name, config.task.data, tuple(data.columns(config.task)), _trained(config.task)))
    return [
        Pair(benchmark, rows, columns, templates, config.split_seed, f"{name} / {test}")
        for name, rows, columns, templates in trained
        for test, benchmark in config.task.benchmark.items()
    ]


def _trained(task: Task) -> tuple[str, ...]:
    """The templates of the texts that a task teaches: its prompt (each turn), and whole answers as they follow the prefix."""
    answers = (task.full_chosen or task.chosen, task.full_rejected or task.rejected)
    turns = [turn.content for turn in task.prompt] if isinstance(task.prompt, list) else [task.prompt or ""]
    return (*filter(None, turns), *(f"{task.prefix} {answer}".strip() for answer in answers if answer))


def _contamination(pair: Pair) -> Stage:
    test = {
        "data": data.identity(pair.benchmark.data, pair.split_seed),
        "question": pair.question,
        "answer": pair.answer,
        "prompt": pair.benchmark.prompt,
        "gold": pair.benchmark.gold,
    }
    train = {
        "data": data.identity(pair.rows, pair.split_seed),
        "columns": list(pair.columns),
        "templates": list(pair.templates),
    }
    spec = {"test": test, "train": train, "ngram": overlap.NGRAM}
    return Stage("contamination", spec, label=f"contamination of {pair.name}")


def benchmarks(config: Config) -> list[str]:
    """The names of a cell's benchmarks, in the order of its chain's evaluations."""
    return [*config.task.benchmark, *config.task.lm_eval]


def _samples(config: Config, source: data.Data, wanted: int | str, epochs: int) -> int | None:
    if wanted != "all":
        return int(wanted) * epochs
    return len(data.rows(source, config.split_seed)) * epochs if data.local(source.path) else None


def amount(value: int | str) -> str:
    """40000 -> 40k, as the paper writes its sizes."""
    return f"{value // 1000}k" if isinstance(value, int) and value >= 1000 and value % 1000 == 0 else str(value)


def _seed(config: Config) -> str:
    return f" s{config.seed}" if config.seed else ""


# --- a grid --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A point of the grid: its config, its stages and the overrides that compose it."""

    config: Config
    chain: Chain
    overrides: tuple[str, ...] = ()

    @functools.cached_property
    def id(self) -> str:
        """A readable name with a hash of what the cell computes: equal cells have equal ids."""
        c = self.config
        computed = digest([s.key for s in self.chain.results] + [c.method.name, c.task.name], 8)
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
        """Relative length: samples, a preference pair as two and DPO's reference as a half; an evaluation as 1,000 samples."""
        per = {"sft": 1.0, "dpo": 2.5, "orpo": 2.0}
        trained = sum(
            (10**6 if s.samples is None else s.samples) * (per[s.spec["method"]["name"]] if s.name == "adapt" else 1.0)
            for s in self.stages
            if s.name in ("prepare", "warmup", "adapt")
        )
        return trained + 1_000 * sum(s.name in ("evaluate", "flips") for s in self.stages)


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
    flips = [job for cell in cells if (job := _job(cell, cell.chain.flips, taken)).stages]
    prepares = _alone(cells, "prepare", taken)
    first = [*_alone(cells, "warmup", taken), *flips, *checks]
    second: list[Job] = []
    last: list[Job] = []
    for cell in cells:
        job = _job(cell, cell.chain.stages, taken)
        if job.stages:
            elsewhere = any(s.name == "adapt" and s.key not in done for s in job.waits_for)
            (last if elsewhere else second if cell.chain.warmup else first).append(job)
    return [sorted(jobs, key=lambda job: -job.cost) for jobs in (prepares, first, second, last)]


def _alone(cells: list[Cell], name: str, taken: set[str]) -> list[Job]:
    """Jobs of the preparations or warm-ups that are left, one each; without evaluations, for which others would wait."""
    jobs = []
    for cell in cells:
        stage: Stage | None = getattr(cell.chain, name)
        if stage and stage.key not in taken:
            jobs.append(_job(cell, (stage,), taken))
    return jobs


def _job(cell: Cell, wanted: Iterable[Stage], taken: set[str]) -> Job:
    left = tuple(s for s in wanted if s.key not in taken)
    taken.update(s.key for s in left)
    return Job(cell, left)
