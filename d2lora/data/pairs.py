"""Read the texts of a task's rows: prompt, start of the answer, chosen and rejected answers. No tokenizer here.

The columns `chosen` and `rejected` may hold texts, or conversations that end with the answer, with the prompt in front
of it or in a column of its own (TRL's conversational formats).
"""

import functools
from dataclasses import dataclass
from typing import Any

from d2lora.data.conversations import Message, Turn, is_silent, message, written
from d2lora.data.files import Row
from d2lora.data.texts import LeftOut, NotText, field, fill, is_blank, only_field, paths, quoted, text_of
from d2lora.errors import UserError
from d2lora.settings import Task

Messages = list[Message]

EMPTY = "empty"  # the reason of rows without a text that are left out
NOTHING = "nothing in"  # how the error begins where such rows are refused
EQUAL = "chosen equals rejected"
PARTED = "chosen and rejected part before their last turn"


class BadRow(NotText):
    """A row that can't be read. `kind` is the error without this row's details: rows of one kind are reported together."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind = kind


@dataclass(frozen=True)
class PairTexts:
    """The texts of a task's row.

    `prompt` is a text, or the turns before the answer; `full_` answers go on to the solution's end.
    """

    prompt: str | Messages
    prefix: str
    chosen: str
    rejected: str | None
    full_chosen: str
    full_rejected: str | None


def pair_texts(task: Task, row: Row) -> PairTexts:
    """Read a row's texts.

    BadRow for values that are neither text nor a conversation; LeftOut for a row that must not be trained on.
    """
    read = functools.partial(_answer, task, row)
    histories, chosen = zip(*(read(t) for t in (task.chosen, task.full_chosen or task.chosen)), strict=True)
    rejected: tuple = (None, None)
    if task.rejected is not None:
        rejected_histories, rejected = zip(
            *(read(t) for t in (task.rejected, task.full_rejected or task.rejected)), strict=True
        )
        histories += rejected_histories
    turns = [h for h in histories if h]
    if any(h != turns[0] for h in turns):
        raise LeftOut(PARTED)
    prompt = _prompt(task, row, turns[0] if turns else [])
    if not isinstance(prompt, str) and all(turn["role"] in ("system", "developer") for turn in prompt):
        raise BadRow("nothing to answer: only system turns before the answer")
    prefix = _text(task, row, task.prefix, blank=True)
    return PairTexts(prompt, prefix, chosen[0], rejected[0], chosen[1], rejected[1])


def _answer(task: Task, row: Row, template: str) -> tuple[Messages, str]:
    """Return the turns before an answer (none where the column holds a text), and the answer."""
    conversation = _raw_turns(row, template)
    if conversation is None:
        return [], _text(task, row, template)
    if not _says(conversation[-1]):
        raise _nothing(task, f"the last turn in {template}")
    turns = _messages(task, conversation, template)
    last = turns[-1]
    if last["role"] != "assistant":
        raise BadRow(f"{template} does not end with an assistant turn")
    if others := [k for k in _CARRIED if last.get(k)]:
        raise BadRow(f"the last turn in {template} has {', '.join(others)}, which the answer of a pair can't carry")
    if conversation[-1].get("weight") == 0:
        raise BadRow(f"the last turn in {template} has weight 0: it is the answer")
    return turns[:-1], _checked(task, f"the last turn in {template}", last["content"])


_CARRIED = ("tool_calls", "reasoning_content")  # what a turn may have beside its text


def _prompt(task: Task, row: Row, history: Messages) -> str | Messages:
    """Return the prompt: task.prompt, or the turns before the answers if task.prompt is one of them or null."""
    prompt: str | Messages | None
    if task.prompt is None:
        prompt = None
    elif isinstance(task.prompt, str):
        prompt = _conversation(task, row, task.prompt) or _text(task, row, task.prompt)
    else:
        prompt = [{"role": turn.role, "content": _text(task, row, turn.content)} for turn in task.prompt]
    if not history:
        if prompt is None:
            raise BadRow("no prompt: task.prompt is null, and the answers have no turns before them")
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            raise BadRow(f"{task.prompt} ends with an assistant turn")
        return prompt
    if prompt is None or _is_in(prompt, history):
        return history
    raise BadRow(
        "the conversation before the answer is not task.prompt",
        "task.prompt=null takes the conversation, and nothing else, as the prompt",
    )


def _is_in(prompt: str | Messages, history: Messages) -> bool:
    """Tell whether the turns begin with a prompt, or one of the user's turns is the prompt."""
    if isinstance(prompt, list):
        return history[: len(prompt)] == prompt
    return any(turn["role"] == "user" and turn["content"].strip() == prompt.strip() for turn in history)


def _conversation(task: Task, row: Row, template: str) -> Messages | None:
    """Return the conversation in a column, as chat templates take it; None if the column holds no conversation."""
    turns = _raw_turns(row, template)
    return None if turns is None else _messages(task, turns, template)


def _raw_turns(row: Row, template: str) -> list[Turn] | None:
    """Return the turns in a column as they are written there.

    None if the template is more than one column or holds no turns.
    """
    name = only_field(template)
    value = _value(row, name) if name else None
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return None
    return value if all("role" in turn or "from" in turn for turn in value) else None


def _messages(task: Task, turns: list[Turn], template: str) -> Messages:
    """Return turns as messages for chat templates. BadRow for a turn that can't be read or is empty."""
    messages = []
    for number, turn in enumerate(turns, 1):
        name = f"turn {number} in {template}"
        try:
            parsed = message(turn, name)[0] if _says(turn) else None
        except UserError as error:
            raise BadRow(str(error)) from None
        if parsed is None or is_silent(parsed):
            raise _nothing(task, name)
        messages.append(parsed)
    return messages


def _says(turn: Turn) -> bool:
    """Tell whether a turn, as it is written in a row, has a content or tool calls."""
    return any(turn.get(key) not in (None, [], {}) for key in ("content", "value", "tool_calls"))


def _text(task: Task, row: Row, template: str, blank: bool = False) -> str:
    """Fill in the template. An error unless at least one of its columns has a text, or it may be `blank`."""
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
        raise _nothing(task, f"the template {template!r}")
    return text


def _checked(task: Task, name: str, value: Any, blank: bool = False) -> str:
    """Return a value's text. An error if it is none, or only white space unless it may be `blank`."""
    if value is None:
        raise _nothing(task, name)
    try:
        text = text_of(value)
    except NotText:
        raise BadRow(f"{name} holds no text", quoted(value)) from None
    if not blank and is_blank(text):
        raise _nothing(task, name)
    return text


def _nothing(task: Task, name: str) -> Exception:
    """Return the error for a missing text: LeftOut or BadRow, as `data.empty` says."""
    return LeftOut(EMPTY) if task.data.empty == "leave_out" else BadRow(f"{NOTHING} {name}")


def _value(row: Row, name: str) -> Any:
    """Return the value of a template's field, with written-out conversations parsed. BadRow if there is none."""
    try:
        value = field(name, row)
        turns = written(value) if isinstance(value, str) else None
        return value if turns is None else turns
    except NotText as error:
        raise BadRow(f"there is no text {{{name}}}", str(error)) from None
    except (LookupError, AttributeError, TypeError, ValueError) as error:  # "{answers.text}" of a list
        raise BadRow(f"there is no {{{name}}}", f"{type(error).__name__}: {error}") from None
