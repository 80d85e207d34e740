"""Checks of what a cell reads, before anything is loaded: one line names key, value and what is allowed."""

import functools
from typing import Any

from d2lora.config import Model, Task, Warmup, fields
from d2lora.data.hub import hub, hub_problem
from d2lora.data.sources import model_files, need, rows
from d2lora.errors import UserError


def columns(task: Task) -> list[str]:
    """The columns that a task's templates name."""
    templates = (task.prompt, task.prefix, task.chosen, task.rejected, task.full_chosen, task.full_rejected)
    return sorted(set().union(*(fields(t) for t in templates if t)))


def check_task(task: Task, n: int | str, split_seed: int) -> None:
    """UserError unless the task's rows have its columns and are at least n."""
    found = rows(task.data, split_seed)
    need(found, task.data, *columns(task))
    _enough("n", n, len(found), f"task={task.name}")


def check_warmup(warmup: Warmup, m: int | str, split_seed: int, key: str = "m") -> None:
    """UserError unless the warm-up's rows have its column and are at least m (the value of `key`)."""
    found = rows(warmup.data, split_seed)
    need(found, warmup.data, warmup.messages)
    _enough(key, m, len(found), f"warmup={warmup.name}")


def _enough(key: str, wanted: int | str, there: int, name: str) -> None:
    if wanted != "all" and int(wanted) > there:
        raise UserError(f"{key}={wanted}: {name} has {there:,} rows: choose {key} of at most {there} or {key}=all")


@functools.cache
def harness() -> Any:
    """lm-evaluation-harness's tasks: it reads thousands of files to list them, many seconds where the machine is busy."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_lm_eval(names: list[str]) -> None:
    """UserError unless each is a single task that lm-evaluation-harness has; a group has no items of its own."""
    if not names:
        return
    single, known = set(harness().all_subtasks), set(harness().all_tasks)
    for name in names:
        if name not in known:
            raise UserError(
                f"task.lm_eval={name}: lm-evaluation-harness has no such task: `lm-eval ls tasks` lists them"
            )
        if name not in single:
            raise UserError(f"task.lm_eval={name}: a group of tasks: name its tasks one by one")


def check_model(model: Model) -> None:
    """UserError unless a model's files are there, or the Hub would give them; loads no weights."""
    if model_files(model) is not None:
        return
    try:
        hub().hf_hub_download(model.path, "config.json", revision=model.revision)
    except Exception as error:
        raise UserError(hub_problem("model.path", model.path, error)) from None
