"""Rows of a task -> its texts: prompt, the given start of the answer, chosen and rejected answers. No tokenizer here.

Known layouts are read as what they are: a column of `chosen` or `rejected` may hold a conversation that ends with the answer,
with the prompt in front of it or in a column of its own (TRL's conversational layouts).
"""

import functools
from dataclasses import dataclass
from string import Formatter
from typing import Any

from d2lora.data.conversations import is_silent, message, written
from d2lora.data.files import Row
from d2lora.data.texts import LeftOut, NotText, field, fill, is_blank, shown, text_of
from d2lora.errors import UserError
from d2lora.settings import Task

Messages = list[dict]

EMPTY = "empty"  # nothing where a text should be
NOTHING = "nothing in"  # where such rows are refused
EQUAL = "chosen equals rejected"
PARTED = "chosen and rejected part before their last turn"


class BadRow(NotText):
    """What keeps a row from being read, and the `kind` that it shares with other rows."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind = kind


@dataclass(frozen=True)
class PairTexts:
    """What a row of a task says. `prompt` is a text, or the turns before the answer."""

    prompt: str | Messages
    prefix: str
    chosen: str
    rejected: str | None
    full_chosen: str
    full_rejected: str | None


def pair_texts(task: Task, row: Row) -> PairTexts:
    """The row's texts. BadRow for what is no text and no known layout; LeftOut for what must not be trained on."""
    read = functools.partial(_answer, task, row)
    histories, chosen = zip(*(read(t) for t in (task.chosen, task.full_chosen or task.chosen)), strict=True)
    rejected: tuple = (None, None)
    if task.rejected is not None:
        theirs, rejected = zip(*(read(t) for t in (task.rejected, task.full_rejected or task.rejected)), strict=True)
        histories += theirs
    turns = [h for h in histories if h]
    if any(h != turns[0] for h in turns):
        raise LeftOut(PARTED)
    prompt = _prompt(task, row, turns[0] if turns else [])
    if not isinstance(prompt, str) and all(turn["role"] in ("system", "developer") for turn in prompt):
        raise BadRow("nothing asks for the answer: before it stand system turns only")
    prefix = _text(task, row, task.prefix, blank=True)
    return PairTexts(prompt, prefix, chosen[0], rejected[0], chosen[1], rejected[1])


def _answer(task: Task, row: Row, template: str) -> tuple[Messages, str]:
    """The turns before an answer, none where the column holds a text, and the answer."""
    given = _given_turns(row, template)
    if given is None:
        return [], _text(task, row, template)
    if not _says(given[-1]):
        raise _nothing(task, f"the last turn in {template}")
    turns = _messages(task, given, template)
    last = turns[-1]
    if last["role"] != "assistant":
        raise BadRow(f"{template} does not end with an assistant turn")
    if carried := [k for k in _CARRIED if last.get(k)]:
        raise BadRow(f"the last turn in {template} has {', '.join(carried)}, which the answer of a pair can't carry")
    if given[-1].get("weight") == 0:
        raise BadRow(f"the last turn in {template} has weight 0: it is the answer")
    return turns[:-1], _checked(task, f"the last turn in {template}", last["content"])


_CARRIED = ("tool_calls", "reasoning_content")  # what else a turn can say


def _prompt(task: Task, row: Row, history: Messages) -> str | Messages:
    """The prompt: task.prompt, or the turns before the answers where task.prompt is one of them or there is none."""
    asked: str | Messages | None
    if task.prompt is None:
        asked = None
    elif isinstance(task.prompt, str):
        asked = _conversation(task, row, task.prompt) or _text(task, row, task.prompt)
    else:
        asked = [{"role": turn.role, "content": _text(task, row, turn.content)} for turn in task.prompt]
    if not history:
        if asked is None:
            raise BadRow("no prompt: task.prompt is null, and the answers have no turns before them")
        if isinstance(asked, list) and asked[-1]["role"] == "assistant":
            raise BadRow(f"{task.prompt} ends with an assistant turn")
        return asked
    if asked is None or _is_in(asked, history):
        return history
    raise BadRow(
        "the conversation before the answer is not task.prompt",
        "task.prompt=null takes the conversation, and nothing else, as the prompt",
    )


def _is_in(asked: str | Messages, history: Messages) -> bool:
    """Whether turns begin with a prompt, or a user's turn of them is the prompt."""
    if isinstance(asked, list):
        return history[: len(asked)] == asked
    return any(turn["role"] == "user" and turn["content"].strip() == asked.strip() for turn in history)


def _conversation(task: Task, row: Row, template: str) -> Messages | None:
    """The turns that a column holds, as chat templates take them; None where it holds something else."""
    given = _given_turns(row, template)
    return None if given is None else _messages(task, given, template)


def _given_turns(row: Row, template: str) -> list[dict] | None:
    """The turns that a column holds, as they stand there."""
    name = _only_field(template)
    value = _value(row, name) if name else None
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return None
    return value if all("role" in turn or "from" in turn for turn in value) else None


def _messages(task: Task, given: list[dict], template: str) -> Messages:
    turns = []
    for number, turn in enumerate(given, 1):
        name = f"turn {number} in {template}"
        try:
            read = message(turn, name)[0] if _says(turn) else None
        except UserError as error:
            raise BadRow(str(error)) from None
        if read is None or is_silent(read):
            raise _nothing(task, name)
        turns.append(read)
    return turns


def _says(turn: dict) -> bool:
    """Whether a turn, as it stands in a row, has a content or calls."""
    return any(turn.get(key) not in (None, [], {}) for key in ("content", "value", "tool_calls"))


def _text(task: Task, row: Row, template: str, blank: bool = False) -> str:
    """The template filled in; it is empty where every column in it is, unless it may be `blank`."""
    values = [(name, _value(row, name)) for name in paths(template)]
    texts = [_checked(task, f"column {name}", value, blank=True) for name, value in values]
    if texts and not blank and all(map(is_blank, texts)):
        raise _nothing(task, f"column {', '.join(paths(template))}")
    if texts and texts != [value for _, value in values] and template == f"{{{values[0][0]}}}":
        return texts[0]  # of typed parts, in a list or written out
    try:
        text = fill(template, row)
    except (LookupError, AttributeError, TypeError, ValueError) as error:  # "{price:d}" of a text
        raise BadRow(f"{template!r} can't be filled in", f"{type(error).__name__}: {error}") from None
    if not blank and is_blank(text):
        raise _nothing(task, template)
    return text


def _checked(task: Task, name: str, value: Any, blank: bool = False) -> str:
    """The text of a value; one of whitespace alone is nothing, unless it may be `blank`."""
    if value is None:
        raise _nothing(task, name)
    try:
        text = text_of(value)
    except NotText:
        raise BadRow(f"{name} holds no text", shown(value)) from None
    if not blank and is_blank(text):
        raise _nothing(task, name)
    return text


def _nothing(task: Task, name: str) -> Exception:
    return LeftOut(EMPTY) if task.data.empty == "leave_out" else BadRow(f"{NOTHING} {name}")


def _value(row: Row, name: str) -> Any:
    try:
        value = field(name, row)
        turns = written(value) if isinstance(value, str) else None
        return value if turns is None else turns
    except NotText as error:
        raise BadRow(f"there is no text {{{name}}}", str(error)) from None
    except (LookupError, AttributeError, TypeError, ValueError) as error:  # "{answers.text}" of a list
        raise BadRow(f"there is no {{{name}}}", f"{type(error).__name__}: {error}") from None


@functools.cache
def paths(template: str) -> tuple[str, ...]:
    """The fields of a template, paths in a column included."""
    return tuple(dict.fromkeys(name for _, name, _, _ in Formatter().parse(template) if name is not None))


@functools.cache
def _only_field(template: str) -> str | None:
    """The field of a template that is nothing else."""
    names = paths(template)
    return names[0] if len(names) == 1 and template == f"{{{names[0]}}}" else None
