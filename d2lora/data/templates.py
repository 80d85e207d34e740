"""Read from a model's chat template what it writes around a conversation, before an answer, and at its end.

No torch here, and no transformers.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from d2lora.data.conversations import Message
from d2lora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# Templates that write today's date would give another prompt every day. They get the date that Llama 3.1's writes by default.
_DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri",
         "%H": "12", "%M": "00", "%S": "00"}  # fmt: skip
_DATED = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f"|replace('{code}','{text}')" for code, text in _DATE.items())
    + " }}{%- endmacro %}"
)
_SWITCHES = ("enable_thinking", "thinking")  # variables by which templates let a model think before it answers
_QUESTION, _ANSWER = "QUESTION-2718", "ANSWER-3141"
_PROBE: list[Message] = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
_CALL_ENDS = ("<|call|>", "<|eom_id|>")  # gpt-oss and Llama 3 end a turn with a tool call by a token of its own
_THOUGHTS = ("<think>", "</think>")


def undated(template: str | None) -> str | None:
    """Return the chat template with a fixed date in place of today's, which Llama 3.2's and gpt-oss' write."""
    return _DATED + template if template and "strftime_now" in template else template


def set_up(tokenizer: "Tokenizer", thinking: bool = False) -> None:
    """Fix in the tokenizer's chat template what would vary: the date, and whether the model thinks before it answers.

    Both are set at the top of the template, so that everyone who applies it gets the same prompt. UserError for
    `thinking` if the template has no such switch.
    """
    if tokenizer.chat_template is None:
        if thinking:
            raise UserError("model.thinking=true: the model has no chat template")
        return
    _edit(tokenizer, lambda text: undated(_without_head(text)))
    switches = [name for name in _SWITCHES if _switches(tokenizer, name)]
    if thinking and not switches:
        raise UserError("model.thinking=true: the model's chat template has no switch for it (enable_thinking)")
    head = "".join(f"{{%- set {name} = {str(thinking).lower()} %}}" for name in switches)
    _edit(tokenizer, lambda text: head + text)


def _edit(tokenizer: "Tokenizer", change: Callable[[str], str | None]) -> None:
    """Change the template; if there are several, each of them."""
    own = tokenizer.chat_template
    tokenizer.chat_template = {k: change(v) for k, v in own.items()} if isinstance(own, dict) else change(own)


_HEAD = re.compile(rf"(\{{%- set ({'|'.join(_SWITCHES)}) = (true|false) %\}})*({re.escape(_DATED)})?")


def _without_head(template: str) -> str:
    """Return the template without the lines that `set_up` put at its top."""
    return _HEAD.sub("", template, count=1)


def _switches(tokenizer: "Tokenizer", name: str) -> bool:
    """Tell whether the value of a variable changes the template's prompt."""
    if name not in str(tokenizer.chat_template):
        return False
    try:
        with_it, without = (render(tokenizer, _PROBE[:1], True, variables={name: value}) for value in (True, False))
    except UserError:
        return False
    return with_it != without


def _own(tokenizer: "Tokenizer", tools: list | None = None) -> str:
    """Return the template that is applied: the tokenizer's only one, or of several the default or the one for tools."""
    return tokenizer.get_chat_template(None, tools)


def training_template(tokenizer: "Tokenizer") -> str | None:
    """Return TRL's variant of the model's template, which renders earlier turns unchanged; None if TRL has none for it."""
    own = _own(tokenizer)
    original = _without_head(own)
    training = _trl_templates().get(original)
    return training and own.removesuffix(original) + training


@functools.cache
def _trl_templates() -> dict[str, str]:
    """Map each template that TRL knows to its variant for training. TRL is not imported, which would take seconds."""
    package = importlib.util.find_spec("trl")
    folders = (package and package.submodule_search_locations) or []
    pairs = {}
    for file in (f for folder in folders for f in sorted((Path(folder) / "chat_templates").glob("*_training.jinja"))):
        original = file.with_name(file.name.replace("_training", ""))
        if original.is_file():
            pairs[original.read_text(encoding="utf-8")] = file.read_text(encoding="utf-8")
    return pairs


def require_template(tokenizer: "Tokenizer") -> None:
    """Raise UserError for a model without a chat template."""
    if tokenizer.chat_template is None:
        raise UserError("the model has no chat template, which conversations need: use m=0, or an instruct model")


def render(
    tokenizer: "Tokenizer",
    messages: list[Message],
    generate: bool = False,
    template: str | None = None,
    tools: list | None = None,
    variables: dict[str, bool] | None = None,
) -> str:
    """Render a conversation with the chat template; with `generate` up to where the next answer starts.

    UserError if there is no template, or if it refuses the conversation.
    """
    require_template(tokenizer)
    template = template or _own(tokenizer, tools)
    if _wants_parts(tokenizer, template):
        messages = _in_parts(messages)
    return _apply(tokenizer, messages, generate, template, tools=tools, **(variables or {}))


def _apply(tokenizer: "Tokenizer", messages: list[Message], generate: bool, template: str, **variables: Any) -> str:
    """Apply a template. UserError if it raises anything."""
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=generate, **variables
        )
        return cast(str, text)  # not ids: tokenize=False
    except Exception as error:  # a template raises what it likes, and fails as any program does
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the model's chat template refuses the conversation: {reason}") from None


def _in_parts(messages: list[Message]) -> list[Message]:
    """Write contents as lists of typed parts."""
    return [
        m | {"content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
        for m in messages
    ]


@functools.lru_cache(16)
def _wants_parts(tokenizer: "Tokenizer", template: str) -> bool:
    """Tell whether a template reads typed parts only, as those of models for images do, and drops plain texts.

    A template that cuts or edits texts does not count: it would write the parts as Python's source.
    """
    try:
        if _QUESTION in _apply(tokenizer, _PROBE[:1], True, template):
            return False
    except UserError:
        return True
    try:
        written = _apply(tokenizer, _in_parts(_PROBE[:1]), True, template)
    except UserError:
        return False
    return _QUESTION in written and "'type'" not in written


# --- how an answer is written ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """How a model's answers are written: prompt, `opening`, the answer, `gap`, `end` (a token).

    `opening` is what the template writes between its prompt and an answer (gpt-oss' channel; nothing for most models).
    `ended` tells whether the template ends turns with a token; if not, `end` is the tokenizer's EOS. `follows` tells
    whether the template renders a conversation with the answer as a continuation of its prompt.
    """

    opening: str
    gap: str
    end: str
    end_id: int
    ended: bool
    follows: bool


def shape(tokenizer: "Tokenizer") -> Shape:
    """Return how answers are written: as the chat template writes them, or as plain text if there is none."""
    return _shape(tokenizer, None if tokenizer.chat_template is None else _own(tokenizer))


@functools.lru_cache(16)
def _shape(tokenizer: "Tokenizer", template: str | None) -> Shape:
    if template is None:
        return Shape("", "", *_eos(tokenizer), ended=False, follows=True)
    try:
        prompt, turn = (render(tokenizer, _PROBE[:n], n == 1, template) for n in (1, 2))
    except UserError:  # the same error will be raised for a row, and name it
        prompt = turn = ""
    start = turn.rfind(_ANSWER)
    if start < 0:  # a template that renders prompts only
        return Shape("", "", *_eos(tokenizer), ended=False, follows=True)
    if follows := turn.startswith(prompt):
        opening = turn[len(prompt) : start]
    else:  # DeepSeek R1's prompt opens a thought, its turns have none: an answer without a thought closes it first
        opening = "\n</think>\n\n" if prompt.rstrip().endswith("<think>") else ""
    match = re.match(rf"(\s*)({_any_of(_added(tokenizer))})", turn[start + len(_ANSWER) :])
    if not match:
        return Shape(opening, "", *_eos(tokenizer), ended=False, follows=follows)
    return Shape(
        opening, match[1], match[2], cast(int, tokenizer.convert_tokens_to_ids(match[2])), ended=True, follows=follows
    )


def answer_starts(tokenizer: "Tokenizer") -> list[int]:
    """Return the ids of tokens after which a generated answer begins: the end of a thought, the last of the `opening`."""
    ids = tokenizer(shape(tokenizer).opening, add_special_tokens=False)["input_ids"]
    added = [i for i in ids if i in tokenizer.added_tokens_decoder and cast(str, tokenizer.decode([i])).strip()]
    thoughts = tokenizer.get_vocab().get(_THOUGHTS[1])
    return added[-1:] + ([] if thoughts is None else [thoughts])


def _eos(tokenizer: "Tokenizer") -> tuple[str, int]:
    """Return the tokenizer's EOS as text and id. UserError if it has none."""
    if tokenizer.eos_token is None:
        raise UserError("the model's chat template ends no turn with a token, and its tokenizer has no eos_token")
    return tokenizer.eos_token, tokenizer.eos_token_id


def _added(tokenizer: "Tokenizer") -> list[str]:
    """Return the tokens that were added to the vocabulary, except blank ones."""
    return [t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()]


def _any_of(texts: list[str]) -> str:
    """Return a pattern that matches any of the texts, the longest first; it matches nothing if there are none."""
    return "|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)) or r"(?!)"


def ends(tokenizer: "Tokenizer", configured: int | list[int] | None) -> int | list[int]:
    """Return the ids at which generation stops: the checkpoint's, and the end that training teaches."""
    ids = [] if configured is None else configured if isinstance(configured, list) else [configured]
    end = shape(tokenizer).end_id
    return [*ids, end] if configured is None or end not in ids else configured


def say_end(tokenizer: "Tokenizer", name: str) -> None:
    """Print a line if the chat template ends turns with another token than the tokenizer's EOS."""
    end = shape(tokenizer).end
    if end != tokenizer.eos_token:
        print(
            f"model {name}: its chat template ends turns with {end}, its tokenizer names {tokenizer.eos_token or 'none'}: "
            f"training and generation end with {end}",
            file=sys.stderr,
        )


def refuse_tokens(tokenizer: "Tokenizer", text: str, what: str) -> None:
    """Raise UserError for a text with one of the template's own tokens: rendered again it would begin or end twice."""
    match = _guarded(tokenizer, str(tokenizer.chat_template)).search(text)
    if match and not getattr(tokenizer, "split_special_tokens", False):
        raise UserError(
            f"{what} carries the model's own token {match[0]}: if rows are rendered already, say so "
            "(task.rendered=true, warmup.rendered=true)"
        )


@functools.lru_cache(16)
def _guarded(tokenizer: "Tokenizer", template: str) -> re.Pattern:
    """Return a pattern of tokens that no row's text may contain: special ones, and those that the template writes."""
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content.strip()]
    with contextlib.suppress(UserError):
        written = render(tokenizer, _PROBE) + render(tokenizer, _PROBE[:1], generate=True)
        special += [t for t in _added(tokenizer) if t in written and t not in _THOUGHTS]
    return re.compile(_any_of(special))


# --- what a rendering must contain -----------------------------------------------------------------------------------


def renderable_calls(tokenizer: "Tokenizer", messages: list[Message], tools: list | None) -> list[Message]:
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


def _lost_calls(tokenizer: "Tokenizer", messages: list[Message], tools: list | None) -> str | None:
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


def lost(text: str, messages: list[Message], tools: list | None = None) -> str | None:
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
    parts = [part.strip() for part in re.split("|".join(_THOUGHTS), content)]
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


def turn_end(tokenizer: "Tokenizer", turn: str, message: Message) -> int | None:
    """Return the index where an assistant turn at the start of a text ends: after its end token.

    None if the template does not end it.
    """
    own = shape(tokenizer)
    start = turn.find(own.end) if own.ended else -1
    if start >= 0:
        return start + len(own.end)
    if message.get("tool_calls") and turn.rstrip().endswith(_CALL_ENDS):
        return len(turn.rstrip())
    return None
