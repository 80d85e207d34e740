"""Choose the rows of a data set that a stage uses, and make examples of them."""

import functools

from d2lora import data
from d2lora.errors import UserError
from d2lora.keys import Identity
from d2lora.settings import Benchmark, Config, Data, Task, Warmup
from d2lora.stages.run import Run
from d2lora.stages.stage import Spec


def rendering(task: Task) -> Identity:
    """Return the settings of a task by which its rows become texts, as JSON for keys."""
    return task.model_dump(
        include={"prompt", "prefix", "chosen", "rejected", "full_chosen", "full_rejected", "continuation"}
    ) | task.model_dump(include={"rendered"}, exclude_defaults=True)


def reading(warmup: Warmup) -> Identity:
    """Return the settings of a warm-up by which its rows become conversations, as JSON for keys."""
    return {"messages": warmup.messages} | warmup.model_dump(include={"tools", "rendered"}, exclude_defaults=True)


def samples(config: Config, source: Data, amount: int | str, epochs: int) -> int | None:
    """Return rows x epochs; None for all rows of a data set that is not on this machine."""
    if amount != "all":
        return int(amount) * epochs
    return len(data.rows(source, config.split_seed)) * epochs if data.local(source.path) else None


def seed_text(config: Config) -> str:
    """Return a seed for labels; empty for seed 0."""
    return f" s{config.seed}" if config.seed else ""


def general(run: Run[Spec], amount: int | str, max_length: int) -> data.Subset:
    """Return the first `amount` conversations in the warm-up's order, as examples."""
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
        example, fate = data.example_and_fate(make, row, max_length)
        if example is not None:
            examples.append(example)
            used.append(index)
        else:
            left_out.setdefault(f"with another's answer: {fate}", []).append(index)
    return data.Subset(examples, used, subset.misfits, left_out=left_out)


def task(run: Run[Spec], amount: int | str, max_length: int, preference: bool, at_most: bool = False) -> data.Subset:
    """Return the first `amount` rows in the task's order, as examples.

    With `preference`, without pairs of equal answers.
    """
    config = run.config
    make = functools.partial(data.pair_example, run.base.tokenizer, config.task, preference=preference)
    return data.subset(run.rows(config.task.data), make, amount, max_length, f"task/{config.data_seed}", at_most)


def items(run: Run[Spec], benchmark: Benchmark) -> data.ItemRows:
    """Choose the rows of a benchmark that the cell's base is asked. UserError if none is left."""

    def is_too_long(row: data.Row) -> bool:
        context = data.context_of(run.base.model.config.to_dict())
        return data.is_too_long(run.base.tokenizer, benchmark, row, context)

    chosen = data.item_rows(benchmark, run.rows(benchmark.data), is_too_long)
    if not chosen.rows:
        raise UserError(f"benchmark {run.stage.subject}: all its items are left out ({', '.join(chosen.left_out)})")
    return chosen
