"""Compute an initialization from the base's weights or from rows: shared by all cells with the same base, LoRA settings
and rows.
"""

from dataclasses import dataclass
from typing import ClassVar

from d2lora import data
from d2lora.keys import Identity
from d2lora.records import Result
from d2lora.settings import Config, Data, Init, Lora
from d2lora.settings.inits import FromRowsInit
from d2lora.stages import base_facts, rows
from d2lora.stages.run import Run
from d2lora.stages.stage import Spec, Stage, versions


@dataclass(frozen=True)
class PrepareSpec(Spec):
    """The base, the initialization, and the rows that it is computed from (`rows` is empty if it uses none)."""

    model: Identity
    init: Init
    lora: Lora
    libraries: Identity
    rows: Identity
    seed: int | None  # None where nothing random is drawn

    KIND: ClassVar[str] = "prepare"
    VERSION: ClassVar[int] = 2

    def content(self) -> Identity:
        own = {"model": self.model, "init": self.init.model_dump(exclude_none=True), "lora": self.lora.model_dump()}
        seed = {} if self.seed is None else {"seed": self.seed}
        return self.rows | own | {"libraries": self.libraries} | seed


def is_prepared(config: Config) -> bool:
    """Tell whether the cell's adapter starts from a preparation.

    D2LoRA(0, 0) is the base whatever the initialization, except for LoftQ, where it is a quantized base with its
    adapter.
    """
    return config.init.prepared and (config.m != 0 or config.n != 0 or config.init.quantizes)


def sources(config: Config) -> dict[str, Data]:
    """Return the data sets that a cell reads, by their keys: none for a phase that it does not have."""
    read = {"task.data": config.task.data} if config.n != 0 else {}
    if config.m != 0 or general_samples(config):
        read["warmup.data"] = config.warmup.data
    return read | {f"benchmark {name}": b.data for name, b in config.benchmarks.items()}


def general_samples(config: Config) -> int:
    """Return how many rows of the warm-up's data the cell's preparation uses."""
    init = config.init
    if isinstance(init, FromRowsInit) and init.data == "general" and is_prepared(config):
        return init.samples
    return 0


def stage(config: Config) -> Stage[PrepareSpec] | None:
    """Return a cell's preparation, if it has one."""
    if not is_prepared(config):
        return None
    init = config.init
    spec = PrepareSpec(
        model=data.model_identity(config.model),
        init=init,
        lora=config.recipe.lora,
        libraries=versions("peft"),
        rows=_rows(config, init) if isinstance(init, FromRowsInit) else {},
        seed=config.seed if init.random else None,
    )
    label = f"preparation of {init.name}" + (rows.seed_text(config) if init.random else "")
    return Stage(spec, label=label, samples=spec.rows.get("samples", 0))


def _rows(config: Config, init: FromRowsInit) -> Identity:
    """Return the rows that an initialization is computed from: the first of the warm-up's order, or of the cell's own n
    rows.
    """
    limits = {"data_seed": config.data_seed, "max_length": config.recipe.max_length}
    if init.data == "general":
        identity = {"data": data.identity(config.warmup.data, config.split_seed), **rows.reading(config.warmup)}
        return limits | identity | {"samples": init.samples}
    samples = init.samples if config.n == "all" else min(init.samples, int(config.n))
    identity = {"data": data.identity(config.task.data, config.split_seed), "task": rows.rendering(config.task)}
    return limits | identity | {"samples": samples}


def work(run: Run[PrepareSpec]) -> Result:
    """Start an adapter as the initialization does, and save it."""
    base = run.base  # before what imports torch: loading a process's libraries is not its first stage's time
    from d2lora.adapters import attach
    from d2lora.adapters.passes import Sequence
    from d2lora.adapters.preparations import prepare
    from d2lora.adapters.start import Start

    spec = run.stage.spec
    start = Start(spec.lora, spec.init, spec.seed or 0)
    subset = _drawn(run)
    attach.check_round_trip(base, start, spec.model, run.outputs.proofs)
    with attach.adapter(base, start, None) as wrapped:
        reached = base_facts.coverage(run.config, wrapped)
        sequences = [s for e in data.sft_examples(subset.examples) for s in data.sequences(e)]
        looked_at = [Sequence(input_ids=s["input_ids"], labels=s["labels"]) for s in sequences]
        prepare(wrapped, start, looked_at, run.progress)
        saved = attach.save(base, wrapped, run.folder, spec.init.quantizes)
    # LoftQ's too was prepared on the base itself; what is trained from it starts on the quantized one.
    attach.check_saved(base, saved, run.folder)
    return Result(metrics={"samples_seen": len(subset.rows)}, data=subset.counts(), coverage=reached)


def _drawn(run: Run[PrepareSpec]) -> data.Subset:
    config, spec = run.config, run.stage.spec
    if spec.init.looks_at is None:
        return data.Subset([], [], [])
    amount, max_length = spec.rows["samples"], spec.rows["max_length"]
    if spec.init.looks_at == "general":
        return rows.general(run, amount, max_length)
    # With n=all there may be fewer rows than init.samples. A preparation is the same for all methods.
    return rows.task(run, amount, max_length, preference=False, at_most=config.n == "all")
