"""Checks of what a cell reads, before anything is loaded: one line names key, value and what is allowed."""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from d2lora.data.files import Row, listed
from d2lora.data.hub import hub, hub_problem
from d2lora.data.pairs import EMPTY, EQUAL, NOTHING, BadRow, pair_texts, paths
from d2lora.data.sources import identity, model_files, need, need_braces, number_of, rows
from d2lora.data.texts import LeftOut, is_blank, is_whole, shown
from d2lora.errors import UserError
from d2lora.settings import Model, Task, Warmup, fields


def columns(task: Task) -> list[str]:
    """The columns that a task's templates name."""
    return sorted(set().union(*map(fields, task.templates)))


def check_task(task: Task, n: int | str, split_seed: int, preference: bool = False) -> None:
    """UserError unless the task's rows have its columns with texts in them, and at least n can be used."""
    dumped, content = task.model_dump_json(exclude={"benchmark"}), str(identity(task.data, split_seed))
    total, left_out, equal = _read_task(dumped, content, split_seed)
    if preference and equal:
        left_out = left_out + Counter({EQUAL: equal})
    _enough("n", n, total, f"task={task.name}", left_out)


@functools.lru_cache(16)
def _read_task(dumped: str, _identity: str, split_seed: int) -> tuple[int, Counter[str], int]:
    """How many rows a task has, how many of them are left out, and how many have equal answers: once for all n of a grid.

    UserError for rows that can't be read.
    """
    task = Task.model_validate_json(dumped)
    found = rows(task.data, split_seed)
    need(found, task.data, *columns(task), empty=True)
    for template in task.templates:
        need_braces(template, found, task.data.path)
    bad: dict[str, list[tuple[int, str]]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    equal = 0
    usual = _usual(task)
    for index, row in enumerate(found):
        if usual and usual(row):
            continue
        try:
            texts = pair_texts(task, row)
            equal += texts.chosen == texts.rejected and texts.full_chosen == texts.full_rejected
        except LeftOut as reason:
            left_out[reason.reason] += 1
        except BadRow as error:
            bad[error.kind].append((number_of(row, index), str(error)))
    if bad:
        lines = "; ".join(kind_line(of_a_kind, len(found)) for of_a_kind in bad.values())
        advice = "; +task.data.empty=leave_out leaves such rows out" if any(map(_is_empty, bad)) else ""
        raise UserError(f"data.path={task.data.path}: {lines}{advice}")
    return len(found), left_out, equal


def _is_empty(kind: str) -> bool:
    return kind.startswith(NOTHING)


def _usual(task: Task) -> Callable[[Row], bool] | None:
    """A quick look at a row: whether its columns hold texts and its answers differ; None where templates name parts of columns.

    A data set has tens of thousands of rows, and nearly all are so.
    """
    if task.prompt is None or any(set(paths(t)) != fields(t) for t in task.templates):
        return None
    names = [*{name for t in task.templates for name in fields(t)}]
    if any("{" + name + "}" not in t for t in task.templates for name in fields(t)):  # "{price:d}"
        return None
    answers = [sorted(fields(t)) for t in (task.chosen, task.rejected) if t]

    def usual(row: Row) -> bool:
        texts = all(_is_plain(row[name]) for name in names)
        return texts and len({tuple(row[name] for name in a) for a in answers}) == len(answers)

    return usual


def _is_plain(value: Any) -> bool:
    """Whether a value is a text in which something can be seen, and surely no list that is written out."""
    return type(value) is str and not is_blank(value) and is_whole(value) and value.lstrip()[0] != "["


def kind_line(found: list[tuple[int, str]], total: int) -> str:
    """Rows with one problem, given as (number, what is said of it): the first three and how many."""
    found = sorted(found)
    return f"{listed([number for number, _ in found])} ({len(found):,} of {total:,}): {found[0][1]}"


def check_warmup(warmup: Warmup, m: int | str, split_seed: int, key: str = "m") -> None:
    """UserError unless the warm-up's rows have conversations in its column and are at least m (the value of `key`)."""
    found = rows(warmup.data, split_seed)
    need(found, warmup.data, warmup.messages, empty=True)
    nothing = [number_of(row, i) for i, row in enumerate(found) if row[warmup.messages] in (None, [], "")]
    if nothing and warmup.data.empty == "refuse":
        raise UserError(
            f"data.path={warmup.data.path}: {listed(nothing)} ({len(nothing):,} of {len(found):,}): nothing in column "
            f"{warmup.messages}; +warmup.data.empty=leave_out leaves such rows out"
        )
    wanted = (str,) if warmup.rendered else (list, str)  # a conversation may be written as JSON
    others = [
        (number_of(row, i), shown(value))
        for i, row in enumerate(found)
        if (value := row[warmup.messages]) not in (None, []) and not isinstance(value, wanted)
    ]
    if others:
        held = "rendered texts" if warmup.rendered else "conversations: lists of {role, content} or {from, value}"
        raise UserError(
            f"data.path={warmup.data.path}: {kind_line(others, len(found))}: warmup.messages={warmup.messages}: the column must "
            f"hold {held}"
        )
    _enough(key, m, len(found), f"warmup={warmup.name}", Counter({EMPTY: len(nothing)} if nothing else {}))


def _enough(key: str, wanted: int | str, there: int, name: str, left_out: Counter[str]) -> None:
    usable = there - left_out.total()
    if usable > 0 and (wanted == "all" or int(wanted) <= usable):
        return
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(left_out.items()))
    rows_ = f"{there:,} rows" + (f", of which {usable:,} can be used (left out: {reasons})" if reasons else "")
    advice = f"choose {key} of at most {usable} or {key}=all" if usable > 0 else "none is left"
    raise UserError(f"{key}={wanted}: {name} has {rows_}: {advice}")


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
