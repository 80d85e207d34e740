"""Which rows of a data set a stage takes, and how they become examples."""

import functools
from pathlib import Path

from d2lora import data
from d2lora.keys import digest
from d2lora.outputs import Outputs
from d2lora.settings import Config, Data, Task, Warmup
from d2lora.stages.run import Run
from d2lora.stages.stage import Identity, Spec


def rendering(task: Task) -> Identity:
    """Return what of a task turns its rows into texts."""
    return task.model_dump(
        include={"prompt", "prefix", "chosen", "rejected", "full_chosen", "full_rejected", "continuation"}
    ) | task.model_dump(include={"rendered"}, exclude_defaults=True)


def reading(warmup: Warmup) -> Identity:
    """Return what of a warm-up turns its rows into conversations."""
    return {"messages": warmup.messages} | warmup.model_dump(include={"tools", "rendered"}, exclude_defaults=True)


def samples(config: Config, source: Data, wanted: int | str, epochs: int) -> int | None:
    """Return rows x epochs; None for all rows of a data set that is not on this machine."""
    if wanted != "all":
        return int(wanted) * epochs
    return len(data.rows(source, config.split_seed)) * epochs if data.local(source.path) else None


def seed_text(config: Config) -> str:
    """Return what labels say of a seed that is not 0."""
    return f" s{config.seed}" if config.seed else ""


def coverage_file(config: Config) -> Path:
    """Return the file in which it is remembered what an adapter reaches of the cell's base (coverage.of)."""
    asked = {"model": data.model_identity(config.model), "target_modules": config.recipe.lora.target_modules}
    return Outputs.of(config).fingerprint(f"coverage-{digest(asked)}")


def general(run: Run[Spec], amount: int | str, max_length: int) -> data.Subset:
    """Return the first `amount` conversations of the warm-up's order, as examples."""
    config = run.config
    make = functools.partial(data.general_example, run.base.tokenizer, config.warmup)
    return data.subset(run.rows(config.warmup.data), make, amount, max_length, f"warmup/{config.data_seed}")


def exchanged(run: Run[Spec], subset: data.Subset, max_length: int) -> data.Subset:
    """Return the subset's conversations with answers exchanged; those that are too long now, or can't be rendered, are left out."""
    config = run.config
    rows = run.rows(config.warmup.data)
    seed = f"placebo/{config.data_seed}"
    others = data.exchanged([rows[index] for index in subset.rows], config.warmup.messages, seed)
    make = functools.partial(data.general_example, run.base.tokenizer, config.warmup)
    examples, used, left_out = [], [], dict(subset.left_out)
    for index, row in zip(subset.rows, others, strict=True):
        example, fate = data.made(make, row, max_length)
        if example is not None:
            examples.append(example)
            used.append(index)
        else:
            left_out.setdefault(f"with another's answer: {fate}", []).append(index)
    return data.Subset(examples, used, subset.misfits, left_out=left_out)


def task(run: Run[Spec], amount: int | str, max_length: int, preference: bool, at_most: bool = False) -> data.Subset:
    """Return the first `amount` rows of the task's order, as examples; with `preference`, without pairs of equal answers."""
    config = run.config
    make = functools.partial(data.pair_example, run.base.tokenizer, config.task, preference=preference)
    return data.subset(run.rows(config.task.data), make, amount, max_length, f"task/{config.data_seed}", at_most)
