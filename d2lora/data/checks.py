"""Check what a cell reads before anything is loaded. An error is one line with the key, the value and what is allowed."""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from d2lora.data.files import Row, listed
from d2lora.data.hub import hub, hub_problem
from d2lora.data.pairs import EMPTY, EQUAL, NOTHING, BadRow, pair_texts
from d2lora.data.sources import identity, model_files, number_of, require_braces, require_columns, rows
from d2lora.data.texts import LeftOut, is_blank, is_encodable, paths, quoted
from d2lora.errors import UserError
from d2lora.settings import Data, Model, Task, Warmup, fields


def columns(task: Task) -> list[str]:
    """Return the columns that a task's templates name, sorted."""
    return sorted(set().union(*map(fields, task.templates)))


def repeats(data: Data, names: Iterable[str], split_seed: int, limit: int | None = None) -> tuple[int, int]:
    """Return how many of a data set's rows (the first `limit`) have in these columns what an earlier row has, and how many rows there are."""
    read = rows(data, split_seed)[:limit]
    wanted = sorted(names)
    return len(read) - len({repr([row.get(name) for name in wanted]) for row in read}), len(read)


def check_task(task: Task, n: int | str, split_seed: int, preference: bool = False) -> None:
    """Check a task's rows. UserError if columns are missing, a row can't be read, or fewer than n can be used.

    `preference`: whether pairs of equal answers are left out.
    """
    dumped, content = task.model_dump_json(exclude={"benchmark"}), str(identity(task.data, split_seed))
    counts = _read_task(dumped, content, split_seed)
    equal = Counter({EQUAL: counts.equal} if preference and counts.equal else {})
    _enough("n", n, counts.total, f"task={task.name}", counts.left_out + equal)


class _TaskCounts(NamedTuple):
    """How many rows a task has, how many are left out by reason, and how many have equal answers."""

    total: int
    left_out: Counter[str]
    equal: int


@functools.lru_cache(16)
def _read_task(dumped: str, _identity: str, split_seed: int) -> _TaskCounts:
    """Read a task's rows, and count them.

    Cached, because all n of a grid need the same; `_identity` stands for the rows' content. UserError for rows that
    can't be read.
    """
    task = Task.model_validate_json(dumped)
    all_rows = rows(task.data, split_seed)
    require_columns(all_rows, task.data, *columns(task), empty=True)
    for template in task.templates:
        require_braces(template, all_rows, task.data.path)
    bad: dict[str, list[tuple[int, str]]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    equal = 0
    usual = _usual(task)
    for index, row in enumerate(all_rows):
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
        lines = "; ".join(kind_line(same_kind, len(all_rows)) for same_kind in bad.values())
        is_empty = any(kind.startswith(NOTHING) for kind in bad)
        advice = "; +task.data.empty=leave_out leaves such rows out" if is_empty else ""
        raise UserError(f"data.path={task.data.path}: {lines}{advice}")
    return _TaskCounts(len(all_rows), left_out, equal)


def _usual(task: Task) -> Callable[[Row], bool] | None:
    """Return a fast test for ordinary rows: all columns hold texts and the answers differ.

    None if templates use parts of columns. Data sets have tens of thousands of rows, and nearly all of them are
    ordinary.
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
    """Tell whether a value is a visible text, and certainly not a list that is written out."""
    return type(value) is str and not is_blank(value) and is_encodable(value) and value.lstrip()[0] != "["


def kind_line(errors: list[tuple[int, str]], total: int) -> str:
    """Report rows with one kind of error, given as (number, error): three numbers, how many rows, the first error."""
    errors = sorted(errors)
    return f"{listed([number for number, _ in errors])} ({len(errors):,} of {total:,}): {errors[0][1]}"


def check_warmup(warmup: Warmup, m: int | str, split_seed: int, key: str = "m") -> None:
    """Check a warm-up's rows.

    UserError unless its column holds conversations and at least m can be used; `key` is m's name.
    """
    all_rows = rows(warmup.data, split_seed)
    require_columns(all_rows, warmup.data, warmup.messages, empty=True)
    empty_rows = [number_of(row, i) for i, row in enumerate(all_rows) if row[warmup.messages] in (None, [], "")]
    if empty_rows and warmup.data.empty == "refuse":
        raise UserError(
            f"data.path={warmup.data.path}: {listed(empty_rows)} ({len(empty_rows):,} of {len(all_rows):,}): nothing in column "
            f"{warmup.messages}; +warmup.data.empty=leave_out leaves such rows out"
        )
    types = (str,) if warmup.rendered else (list, str)  # a conversation may be written as JSON
    others = [
        (number_of(row, i), quoted(value))
        for i, row in enumerate(all_rows)
        if (value := row[warmup.messages]) not in (None, []) and not isinstance(value, types)
    ]
    if others:
        content = "rendered texts" if warmup.rendered else "conversations: lists of {role, content} or {from, value}"
        raise UserError(
            f"data.path={warmup.data.path}: {kind_line(others, len(all_rows))}: warmup.messages={warmup.messages}: the column must "
            f"hold {content}"
        )
    _enough(key, m, len(all_rows), f"warmup={warmup.name}", Counter({EMPTY: len(empty_rows)} if empty_rows else {}))


def _enough(key: str, amount: int | str, total: int, name: str, left_out: Counter[str]) -> None:
    """Raise UserError unless the amount that is asked for, or any at all with "all", can be used."""
    usable = total - left_out.total()
    if usable > 0 and (amount == "all" or int(amount) <= usable):
        return
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(left_out.items()))
    rows_ = f"{total:,} rows" + (f", of which {usable:,} can be used (left out: {reasons})" if reasons else "")
    advice = f"choose {key} of at most {usable} or {key}=all" if usable > 0 else "none is left"
    raise UserError(f"{key}={amount}: {name} has {rows_}: {advice}")


def check_model(model: Model) -> None:
    """Check that a model's files exist, here or on the Hub, without loading weights. UserError if not."""
    if (path := model_files(model)) is not None:
        if model.gguf_package is None and (lacking := _lacking(path)):
            raise UserError(f"model.path={model.path}: {lacking}")
        return
    try:
        hub().hf_hub_download(model.path, "config.json", revision=model.revision)
    except Exception as error:
        raise UserError(hub_problem("model.path", model.path, error)) from None


def _lacking(path: Path) -> str | None:
    """Return what a local path lacks to be a model's folder, as save_pretrained writes it; None if nothing."""
    if not path.is_dir():
        return "a file: name the folder that it is in"
    if not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        return "an adapter, and a base is wanted: merge it into its base first" if adapter else "no config.json in it"
    if not any(path.glob("*.safetensors")):
        return "no *.safetensors in it: model.save_pretrained(folder) writes them"
    if not any(file.match(pattern) for file in path.iterdir() for pattern in _TOKENIZER):
        return "no tokenizer in it: tokenizer.save_pretrained(folder) writes it"
    return None


_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")  # what families of tokenizers are saved as
