"""A row's conversation, in the layouts that data sets have -> messages as chat templates take them."""

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

from d2lora.data.texts import LeftOut, NotText, is_blank, shown, text_of
from d2lora.errors import UserError

Message = dict[str, Any]

_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
_ROLES |= {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # ShareGPT's
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# They say something, or forbid it, in a way of their own: without them a turn would mean another thing.
_UNREAD = ("function_call", "refusal", "audio", "image", "images", "video", "videos", "audios", "loss", "train", "mask")


@dataclass(frozen=True)
class Conversation:
    """Messages {role, content, ...}, and the places of the assistant turns that are to be learned."""

    messages: list[Message]
    learned: list[int]


def conversation(value: Any) -> Conversation:
    """The conversation in a row's value: a list of {role, content} or of ShareGPT's {from, value}, or such a list as JSON or Python write it.

    UserError for what can't be read, LeftOut for what can be read and has nothing to learn.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value)
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise UserError("no conversation: a list of {role, content} or of {from, value} is wanted")
    read = [message(m, f"turn {number}") for number, m in enumerate(value, 1)]
    messages = [said for said, _ in read]
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise UserError("a conversation without an assistant turn")
    if blank := [m["role"] for m in messages if is_silent(m)]:
        raise LeftOut(f"a blank turn ({blank[0]})")
    learned = [i for i in turns if read[i][1]]
    if not learned:
        raise LeftOut("no turn to learn (weight 0)")
    if all(m["role"] in ("system", "developer") for m in messages[: learned[0]]):
        raise UserError("a conversation that opens with the assistant: nothing asks for what it says")
    return Conversation(messages, learned)


def is_silent(message: Message) -> bool:
    """Whether a user or an assistant says nothing: an answer to nothing, or an end alone, would be learned."""
    silent = is_blank(message["content"] or "") and not message.get("tool_calls")
    return silent and message["role"] in ("user", "assistant")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _parsed(text: str) -> Any:
    """The value that a text is as JSON, or as Python writes it (pandas' CSVs); None for another text."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


_TURN = re.compile(r"""['"](?:role|from)['"]\s*:\s*['"](?:system|user|assistant|tool|human|gpt)['"]""")


def written(text: str) -> list[dict] | None:
    """The turns or typed parts that a text is, as JSON or Python write them (a CSV has no lists); None for any other text.

    NotText for turns that can't be read: they are no text either.
    """
    if not re.match(r"\s*\[\s*\{", text):
        return None
    found = _parsed(text)
    if found is None and _TURN.search(text) and text.rstrip().endswith("]"):
        raise NotText(f"{shown(text)} is a conversation, in neither JSON nor Python")
    if isinstance(found, list) and all(isinstance(part, dict) and _is_known(part) for part in found):
        return found
    return None


def _is_known(part: dict) -> bool:
    """Whether it is a turn or a typed text part, not something else that an answer may well be (calls as JSON)."""
    turn = ("role" in part and ("content" in part or "tool_calls" in part)) or ("from" in part and "value" in part)
    return turn or (part.get("type") == "text" and isinstance(part.get("text"), str))


def message(given: dict, where: str) -> tuple[Message, bool]:
    """A message as templates take it, and whether it is learned. Keys without a value are as if they were not there."""
    given = {k: v for k, v in given.items() if v not in (None, [], {}) and (v != "" or k in ("content", "value"))}
    role, content = (_one_of(given, keys, where) for keys in (("role", "from"), ("content", "value")))
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise UserError(f"{where}: role {role!r} is none of {', '.join(_ROLES)}")
    if unread := [k for k in _UNREAD if k in given]:
        raise UserError(f"{where}: {unread[0]} is not read: a turn's own are content, tool_calls and weight")
    message: Message = {k: v for k, v in given.items() if k not in ("from", "value", "weight", *_THOUGHTS)}
    message |= {"role": known, "content": _content(content, where)}
    thoughts = {given[k] for k in _THOUGHTS if isinstance(given.get(k), str)}
    if len(thoughts) != len({str(given[k]) for k in _THOUGHTS if k in given}) or len(thoughts) > 1:
        raise UserError(f"{where}: {' and '.join(k for k in _THOUGHTS if k in given)} must be one text")
    if any(thought.strip() for thought in thoughts):
        if known != "assistant":
            raise UserError(f"{where}: {next(k for k in _THOUGHTS if k in given)} of a {known} turn")
        message["reasoning_content"] = thoughts.pop()  # which transformers gives a template under all three names
    if "tool_calls" in given:
        if known != "assistant":
            raise UserError(f"{where}: tool_calls of a {known} turn")
        message["tool_calls"] = [_call(call, where) for call in _list(given["tool_calls"], where)]
    if content is None and "tool_calls" not in given:
        raise UserError(f"{where} ({known}): nothing in content")
    return message, _learned(given.get("weight"), known, where)


def _one_of(given: dict, keys: tuple[str, str], where: str) -> Any:
    """The value that stands under one of two keys; None under neither."""
    values = [given[k] for k in keys if k in given]
    if len(values) > 1 and values[0] != values[1]:
        raise UserError(f"{where}: {keys[0]} and {keys[1]} differ")
    return values[0] if values else None


def _content(value: Any, where: str) -> str | None:
    if value is None:
        return None
    try:
        return text_of(value)
    except NotText as error:
        raise UserError(f"{where}: content {error}") from None


def _learned(weight: Any, role: str, where: str) -> bool:
    """Whether a turn is learned: an assistant's of weight 1, which is that of turns without one."""
    if weight is None:
        return role == "assistant"
    if isinstance(weight, bool | int | float) and weight in (0, 1):
        if weight and role != "assistant":
            raise UserError(f"{where}: weight {weight} of a {role} turn: only the assistant's are learned")
        return bool(weight)
    raise UserError(f"{where}: weight {weight!r} is neither 0 nor 1")


def _list(value: Any, where: str) -> list:
    if not isinstance(value, list):
        raise UserError(f"{where}: tool_calls is no list")
    return value


def _call(call: Any, where: str) -> dict:
    """A tool call {type, function: {name, arguments}} whose arguments are a mapping."""
    function = call.get("function", call) if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    arguments = _json(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
        raise UserError(f"{where}: a tool call is {{function: {{name, arguments}}}}, its arguments a mapping or JSON")
    outer = {k: v for k, v in call.items() if k in ("id", "type") and v is not None}
    inner = {"name": function["name"], "arguments": _without_nulls(arguments)}
    return {"type": "function"} | outer | {"function": inner}


def _without_nulls(value: Any) -> Any:
    """A value without the keys that have none: tables give each row the keys of all others."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def tools_of(value: Any) -> list[dict] | None:
    """The tools that a row offers the model: a list of {name, ...} or {function: {name, ...}}, or its JSON; None for none."""
    if value is None or value == [] or value == "":
        return None
    found = _json(value) if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(t, dict) for t in found):
        raise UserError("tools are no list of {function: {name, parameters}}")
    tools = _without_nulls(found)
    if not all(isinstance(tool.get("function", tool).get("name"), str) for tool in tools):
        raise UserError("a tool without a name")
    return tools
