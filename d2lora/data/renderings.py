"""Check that a chat template's rendering has all that a conversation says; find the form of tool calls that it renders."""

import itertools
import json
import re
from typing import TYPE_CHECKING, Any

from d2lora.data.conversations import Message, Tool
from d2lora.data.templates import THOUGHTS, render
from d2lora.errors import UserError

if TYPE_CHECKING:
    from d2lora.data.templates import Tokenizer


def renderable_calls(tokenizer: "Tokenizer", messages: list[Message], tools: list[Tool] | None) -> list[Message]:
    """Return the messages with their tool calls in the form that the template renders.

    UserError if it drops calls in every form. Templates differ in what they accept: an empty content or None, arguments
    as a mapping or as JSON.
    """
    if not any(m.get("tool_calls") for m in messages):
        return messages
    problem: str | None = None
    for empty, as_json in itertools.product(("", None), (False, True)):
        form = [_in_form(m, empty, as_json) for m in messages]
        try:
            missing = _lost_calls(tokenizer, form, tools)
        except UserError as error:
            missing = str(error)
        if not missing:
            return form
        problem = problem or missing
    raise UserError(str(problem))


def _lost_calls(tokenizer: "Tokenizer", messages: list[Message], tools: list[Tool] | None) -> str | None:
    """Return what is missing in the renderings up to each turn with tool calls; None if nothing is."""
    parts = (messages[: i + 1] for i, m in enumerate(messages) if m.get("tool_calls"))
    return next(filter(None, (lost(render(tokenizer, part, tools=tools), part, tools) for part in parts)), None)


def _in_form(message: Message, empty: str | None, as_json: bool) -> Message:
    """Return a message with its tool calls in one of the forms."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        written = json.dumps(arguments, ensure_ascii=False) if as_json else arguments
        calls.append(call | {"function": call["function"] | {"arguments": written}})
    return message | {"tool_calls": calls, "content": message["content"] or empty}


def lost(text: str, messages: list[Message], tools: list[Tool] | None = None) -> str | None:
    """Say what of a conversation is missing in its rendering; None if nothing is.

    Thoughts of earlier assistant turns may be missing: templates drop them on purpose.
    """
    position = 0
    for number, message in enumerate(messages, 1):
        moved = message["role"] in ("system", "developer")  # templates put it where they like
        for call_text in _said_in_calls(message):
            if not any(form in text[position:] for form in _forms(call_text)):
                return f"the model's chat template leaves out the tool call of turn {number}: {call_text[:40]!r}"
        for piece in _pieces(message, last=number == len(messages)):
            positions = [at for form in _forms(piece) if (at := text.find(form, 0 if moved else position)) >= 0]
            if not positions:
                return f"the model's chat template leaves out what turn {number} ({message['role']}) says: {piece[:40]}"
            position = position if moved else min(positions) + len(piece)
        if any(repr(call["function"]["arguments"]) in text for call in _mappings(message)):
            return f"the model's chat template writes the tool call of turn {number} as Python's text"
    for tool in tools or []:
        if (name := tool.get("function", tool).get("name", "")) not in text:
            return f"the model's chat template leaves out the tool {name!r}"
    return None


def _pieces(message: Message, last: bool) -> list[str]:
    """Return the texts of a message that a rendering must contain, in order."""
    content, name = message["content"] or "", message.get("name")
    names = [name] if name and message["role"] not in ("tool", name) else []
    if message["role"] != "assistant":
        return [*names, *([content.strip()] if content.strip() else [])]
    parts = [part.strip() for part in re.split("|".join(THOUGHTS), content)]
    answers = parts if last else parts[-1:]
    thoughts = [message["reasoning_content"].strip()] if last and message.get("reasoning_content") else []
    return names + [part for part in thoughts + answers if part]


def _forms(text: str) -> set[str]:
    """Return a text as it is, and as JSON spells it."""
    return {text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]}


def _said_in_calls(message: Message) -> list[str]:
    """Return the names and texts in a message's tool calls."""
    texts = []
    for call in message.get("tool_calls") or []:
        arguments = call["function"]["arguments"]
        texts += [
            call["function"]["name"],
            *_leaves(json.loads(arguments) if isinstance(arguments, str) else arguments),
        ]
    return [text for text in texts if text]


def _leaves(value: Any) -> list[str]:
    """Return the keys and values in a JSON value as texts, without nulls and booleans."""
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in [str(key), *_leaves(inner)]]
    if isinstance(value, list):
        return [text for inner in value for text in _leaves(inner)]
    if value is None or isinstance(value, bool):
        return []
    return [value if isinstance(value, str) else json.dumps(value)]


def _mappings(message: Message) -> list[dict]:
    """Return the tool calls whose arguments would look different in Python's spelling than in JSON."""
    calls = ((call, call["function"]["arguments"]) for call in message.get("tool_calls") or [])
    return [call for call, arguments in calls if isinstance(arguments, dict) and "'" in repr(arguments)]
