"""Read a row's conversation, in any layout that data sets use, as messages for chat templates."""

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

from d2lora.data.texts import LeftOut, NotText, is_blank, quoted, text_of
from d2lora.errors import UserError

Message = dict[str, Any]  # a turn as chat templates take it
# A tool that a model may call, as chat templates take it: {type, function: {name, ...}} or {name, ...}.
Tool = dict[str, Any]
Turn = dict[str, Any]  # a turn, or a typed part of one, as a row has it

_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
_ROLES |= {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # ShareGPT's
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Keys that change what a turn says or how it is trained on, and that are not supported: a turn with one is refused.
_UNREAD = ("function_call", "refusal", "audio", "image", "images", "video", "videos", "audios", "loss", "train", "mask")


@dataclass(frozen=True)
class Conversation:
    """Messages {role, content, ...}, and the indices of the assistant turns that the loss is on."""

    messages: list[Message]
    learned: list[int]


def conversation(value: Any) -> Conversation:
    """Read the conversation in a row's value: a list of {role, content} or of ShareGPT's {from, value}.

    It may be a string in JSON or in Python's spelling. UserError for what can't be read, LeftOut for a conversation
    without a turn to learn.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value)
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise UserError("no conversation: a list of {role, content} or of {from, value} is expected")
    read = [message(m, f"turn {number}") for number, m in enumerate(value, 1)]
    messages = [parsed for parsed, _ in read]
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise UserError("a conversation without an assistant turn")
    if blank := [m["role"] for m in messages if is_silent(m)]:
        raise LeftOut(f"a blank turn ({blank[0]})")
    learned = [i for i in turns if read[i][1]]
    if not learned:
        raise LeftOut("no turn to learn (weight 0)")
    if all(m["role"] in ("system", "developer") for m in messages[: learned[0]]):
        raise UserError("a conversation that begins with the assistant: no turn before it to answer")
    return Conversation(messages, learned)


def is_silent(message: Message) -> bool:
    """Tell whether a user's or assistant's turn is empty.

    Training on it would teach to answer nothing, or to end at once.
    """
    silent = is_blank(message["content"] or "") and not message.get("tool_calls")
    return silent and message["role"] in ("user", "assistant")


def _json(text: str) -> Any:
    """Parse a text as JSON; None if it is not."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _parsed(text: str) -> Any:
    """Parse a text as JSON, or as Python (pandas writes lists into CSVs that way); None if it is neither."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


_TURN = re.compile(r"""['"](?:role|from)['"]\s*:\s*['"](?:system|user|assistant|tool|human|gpt)['"]""")
_LIST_OF_MAPPINGS = re.compile(r"\s*\[\s*\{")


def written(text: str) -> list[Turn] | None:
    """Parse a text that is a list of turns or typed parts in JSON or Python (a CSV can't hold lists).

    None for any other text. NotText for turns that can't be parsed: such a string must not be trained on as text.
    """
    if not _LIST_OF_MAPPINGS.match(text):
        return None
    parts = _parsed(text)
    if parts is None and _TURN.search(text) and text.rstrip().endswith("]"):
        raise NotText(f"{quoted(text)} is a conversation, in neither JSON nor Python")
    if isinstance(parts, list) and all(isinstance(part, dict) and _is_known(part) for part in parts):
        return parts
    return None


def _is_known(part: Turn) -> bool:
    """Tell whether a mapping is a turn or a typed text part.

    Anything else (tool calls as JSON) may be an ordinary answer.
    """
    turn = ("role" in part and ("content" in part or "tool_calls" in part)) or ("from" in part and "value" in part)
    return turn or (part.get("type") == "text" and isinstance(part.get("text"), str))


def message(turn: Turn, where: str) -> tuple[Message, bool]:
    """Read a turn as a message for templates, and whether the loss is on it. `where` names it in errors.

    Keys with nulls are ignored. UserError for an unknown role, and for keys that can't be read.
    """
    turn = {k: v for k, v in turn.items() if v not in (None, [], {}) and (v != "" or k in ("content", "value"))}
    role_name, content = (_one_of(turn, keys, where) for keys in (("role", "from"), ("content", "value")))
    role = _ROLES.get(role_name) if isinstance(role_name, str) else None
    if role is None:
        raise UserError(f"{where}: role {role_name!r} is none of {', '.join(_ROLES)}")
    if unread := [k for k in _UNREAD if k in turn]:
        raise UserError(f"{where}: {unread[0]} is not supported: a turn may have content, tool_calls and weight")
    message: Message = {k: v for k, v in turn.items() if k not in ("from", "value", "weight", *_THOUGHTS)}
    message |= {"role": role, "content": _content(content, where)}
    thoughts = {turn[k] for k in _THOUGHTS if isinstance(turn.get(k), str)}
    if len(thoughts) != len({str(turn[k]) for k in _THOUGHTS if k in turn}) or len(thoughts) > 1:
        raise UserError(f"{where}: {' and '.join(k for k in _THOUGHTS if k in turn)} must be one text")
    if any(thought.strip() for thought in thoughts):
        if role != "assistant":
            raise UserError(f"{where}: {next(k for k in _THOUGHTS if k in turn)} of a {role} turn")
        message["reasoning_content"] = thoughts.pop()  # which transformers gives a template under all three names
    if "tool_calls" in turn:
        if role != "assistant":
            raise UserError(f"{where}: tool_calls of a {role} turn")
        message["tool_calls"] = [_call(call, where) for call in _list(turn["tool_calls"], where)]
    if content is None and "tool_calls" not in turn:
        raise UserError(f"{where} ({role}): nothing in content")
    return message, _learned(turn.get("weight"), role, where)


def _one_of(turn: Turn, keys: tuple[str, str], where: str) -> Any:
    """Return the value under one of two keys, None if it is under neither. UserError if they differ."""
    values = [turn[k] for k in keys if k in turn]
    if len(values) > 1 and values[0] != values[1]:
        raise UserError(f"{where}: {keys[0]} and {keys[1]} differ")
    return values[0] if values else None


def _content(value: Any, where: str) -> str | None:
    """Return a turn's content as text; None for none. UserError if it is no text."""
    if value is None:
        return None
    try:
        return text_of(value)
    except NotText as error:
        raise UserError(f"{where}: content {error}") from None


def _learned(weight: Any, role: str, where: str) -> bool:
    """Tell whether the loss is on a turn: on an assistant's, unless its weight is 0. UserError for other weights."""
    if weight is None:
        return role == "assistant"
    if isinstance(weight, bool | int | float) and weight in (0, 1):
        if weight and role != "assistant":
            raise UserError(f"{where}: weight {weight} of a {role} turn: only the assistant's are learned")
        return bool(weight)
    raise UserError(f"{where}: weight {weight!r} is neither 0 nor 1")


def _list(value: Any, where: str) -> list[Any]:
    """Return a turn's tool calls. UserError if they are no list."""
    if not isinstance(value, list):
        raise UserError(f"{where}: tool_calls is no list")
    return value


def _call(call: Any, where: str) -> dict[str, Any]:
    """Read a tool call as {type, function: {name, arguments}}, the arguments a mapping."""
    function = call.get("function", call) if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    arguments = _json(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
        raise UserError(f"{where}: a tool call is {{function: {{name, arguments}}}}, its arguments a mapping or JSON")
    outer = {k: v for k, v in call.items() if k in ("id", "type") and v is not None}
    inner = {"name": function["name"], "arguments": _without_nulls(arguments)}
    return {"type": "function"} | outer | {"function": inner}


def _without_nulls(value: Any) -> Any:
    """Remove the keys whose value is null: a table gives each row the keys of all others."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def tools_of(value: Any) -> list[Tool] | None:
    """Read the tools that a row offers the model: a list of {name, ...} or {function: {name, ...}}, or its JSON.

    None if empty. UserError if it can't be read.
    """
    if value is None or value == [] or value == "":
        return None
    parsed = _json(value) if isinstance(value, str) else value
    if not isinstance(parsed, list) or not all(isinstance(t, dict) for t in parsed):
        raise UserError("tools are no list of {function: {name, parameters}}")
    tools = _without_nulls(parsed)
    if not all(isinstance(tool.get("function", tool).get("name"), str) for tool in tools):
        raise UserError("a tool without a name")
    return tools
