"""A model's chat template: what it writes around a conversation, an answer and its end. Neither torch nor transformers here."""

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
from typing import Any

from d2lora.errors import UserError

Message = dict[str, Any]

# A template that writes today's date gives another prompt every day. This one is Llama 3.1's own, a Friday.
_DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri",
         "%H": "12", "%M": "00", "%S": "00"}  # fmt: skip
_DATED = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f"|replace('{code}','{text}')" for code, text in _DATE.items())
    + " }}{%- endmacro %}"
)
_SWITCHES = ("enable_thinking", "thinking")  # what templates call the choice whether a model thinks before it answers
_QUESTION, _ANSWER = "QUESTION-2718", "ANSWER-3141"
_PROBE: list[Message] = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
_CALL_ENDS = ("<|call|>", "<|eom_id|>")  # gpt-oss and Llama 3 end a turn with a tool call by a token of its own
_THOUGHTS = ("<think>", "</think>")


def undated(template: str | None) -> str | None:
    """A chat template that does not write today's date into its prompts, as Llama 3.2's and gpt-oss' do."""
    return _DATED + template if template and "strftime_now" in template else template


def set_up(tokenizer, thinking: bool = False) -> None:
    """Fix what a chat template would leave open: the date, and whether the model thinks before it answers.

    Both stand at the head of the template, so that whoever applies it gets the same prompt. UserError for `thinking`
    where the template knows no such choice.
    """
    if tokenizer.chat_template is None:
        if thinking:
            raise UserError("model.thinking=true: the model has no chat template")
        return
    _edit(tokenizer, lambda text: undated(_without_head(text)))
    known = [name for name in _SWITCHES if _switches(tokenizer, name)]
    if thinking and not known:
        raise UserError("model.thinking=true: the model's chat template knows no such choice (enable_thinking)")
    head = "".join(f"{{%- set {name} = {str(thinking).lower()} %}}" for name in known)
    _edit(tokenizer, lambda text: head + text)


def _edit(tokenizer, change: Callable[[str], str | None]) -> None:
    """Change the template, or each of several named ones."""
    own = tokenizer.chat_template
    tokenizer.chat_template = {k: change(v) for k, v in own.items()} if isinstance(own, dict) else change(own)


_HEAD = re.compile(rf"(\{{%- set ({'|'.join(_SWITCHES)}) = (true|false) %\}})*({re.escape(_DATED)})?")


def _without_head(template: str) -> str:
    """A template as the model has it."""
    return _HEAD.sub("", template, count=1)


def _switches(tokenizer, name: str) -> bool:
    """Whether the template's prompt depends on the variable."""
    if name not in str(tokenizer.chat_template):
        return False
    try:
        with_it, without = (render(tokenizer, _PROBE[:1], True, variables={name: value}) for value in (True, False))
    except UserError:
        return False
    return with_it != without


def _own(tokenizer, tools: list | None = None) -> str:
    """The template that is applied: of several named ones the default, or the one for tools."""
    return tokenizer.get_chat_template(None, tools)


def training_template(tokenizer) -> str | None:
    """TRL's variant of the model's template that keeps earlier turns as they were; None for one that TRL doesn't know."""
    own = _own(tokenizer)
    original = _without_head(own)
    training = _trl_templates().get(original)
    return training and own.removesuffix(original) + training


@functools.cache
def _trl_templates() -> dict[str, str]:
    """TRL's templates for training by the templates they stand for, read without importing TRL (which takes seconds)."""
    package = importlib.util.find_spec("trl")
    places = (package and package.submodule_search_locations) or []
    pairs = {}
    for file in (f for place in places for f in sorted((Path(place) / "chat_templates").glob("*_training.jinja"))):
        original = file.with_name(file.name.replace("_training", ""))
        if original.is_file():
            pairs[original.read_text(encoding="utf-8")] = file.read_text(encoding="utf-8")
    return pairs


def need(tokenizer) -> None:
    """UserError for a model without a chat template."""
    if tokenizer.chat_template is None:
        raise UserError("the model has no chat template, which conversations need: use m=0, or an instruct model")


def render(
    tokenizer,
    messages: list[Message],
    generate: bool = False,
    template: str | None = None,
    tools: list | None = None,
    variables: dict[str, bool] | None = None,
) -> str:
    """A conversation as the chat template has it; with `generate` up to where the next answer starts. UserError if it refuses."""
    need(tokenizer)
    template = template or _own(tokenizer, tools)
    if _wants_parts(tokenizer, template):
        messages = _in_parts(messages)
    return _apply(tokenizer, messages, generate, template, tools=tools, **(variables or {}))


def _apply(tokenizer, messages: list[Message], generate: bool, template: str, **variables: Any) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=generate, **variables
        )
    except Exception as error:  # a template raises what it likes, and fails as any program does
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the model's chat template refuses the conversation: {reason}") from None


def _in_parts(messages: list[Message]) -> list[Message]:
    return [
        m | {"content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
        for m in messages
    ]


@functools.lru_cache(16)
def _wants_parts(tokenizer, template: str) -> bool:
    """Whether a template reads contents as typed parts only, as those for images do; it would leave texts out without a word.

    One that cuts or changes texts would write parts as Python's source.
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

    `opening` is what the template writes between its own prompt and an answer (gpt-oss' channel; nothing for most).
    Where it ends no turn by a token, the end is the tokenizer's, and not `ended`; `follows` tells whether its turns begin
    with its prompt.
    """

    opening: str
    gap: str
    end: str
    end_id: int
    ended: bool
    follows: bool


def shape(tokenizer) -> Shape:
    """How answers are written: as the chat template does, or as plain text where there is none."""
    return _shape(tokenizer, None if tokenizer.chat_template is None else _own(tokenizer))


@functools.lru_cache(16)
def _shape(tokenizer, template: str | None) -> Shape:
    if template is None:
        return Shape("", "", *_named_end(tokenizer), ended=False, follows=True)
    try:
        prompt, turn = (render(tokenizer, _PROBE[:n], n == 1, template) for n in (1, 2))
    except UserError:  # what it refuses so, it will refuse again, with the row
        prompt = turn = ""
    place = turn.rfind(_ANSWER)
    if place < 0:  # a template of prompts only
        return Shape("", "", *_named_end(tokenizer), ended=False, follows=True)
    if follows := turn.startswith(prompt):
        opening = turn[len(prompt) : place]
    else:  # R1's prompt opens a thought, which its turns do not have: an answer without one closes it
        opening = "\n</think>\n\n" if prompt.rstrip().endswith("<think>") else ""
    found = re.match(rf"(\s*)({_any_of(_added(tokenizer))})", turn[place + len(_ANSWER) :])
    if not found:
        return Shape(opening, "", *_named_end(tokenizer), ended=False, follows=follows)
    return Shape(opening, found[1], found[2], tokenizer.convert_tokens_to_ids(found[2]), ended=True, follows=follows)


def opens(tokenizer) -> list[int]:
    """Tokens behind which a generated answer begins: the end of thoughts, and the last that the template opens answers with."""
    ids = tokenizer(shape(tokenizer).opening, add_special_tokens=False)["input_ids"]
    added = [i for i in ids if i in tokenizer.added_tokens_decoder and tokenizer.decode([i]).strip()]
    thoughts = tokenizer.get_vocab().get(_THOUGHTS[1])
    return added[-1:] + ([] if thoughts is None else [thoughts])


def _named_end(tokenizer) -> tuple[str, int]:
    """The end that the tokenizer names."""
    if tokenizer.eos_token is None:
        raise UserError("the model's chat template ends no turn by a token, and its tokenizer names no end (eos_token)")
    return tokenizer.eos_token, tokenizer.eos_token_id


def _added(tokenizer) -> list[str]:
    """The tokens that were added to the vocabulary, blank ones apart."""
    return [t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()]


def _any_of(texts: list[str]) -> str:
    """A pattern of which one text must match, the longest first; nothing matches if there are none."""
    return "|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)) or r"(?!)"


def ends(tokenizer, asked: int | list[int] | None) -> int | list[int]:
    """Where generation stops: at what the model's checkpoint asks for, and at the end that training teaches."""
    before = [] if asked is None else asked if isinstance(asked, list) else [asked]
    end = shape(tokenizer).end_id
    return [*before, end] if asked is None or end not in before else asked


def say_end(tokenizer, name: str) -> None:
    """Say it in one line where the chat template ends turns by another token than the tokenizer names."""
    end = shape(tokenizer).end
    if end != tokenizer.eos_token:
        print(
            f"model {name}: its chat template ends turns with {end}, its tokenizer names {tokenizer.eos_token or 'none'}: "
            f"training and generation end with {end}",
            file=sys.stderr,
        )


def refuse_tokens(tokenizer, text: str, what: str) -> None:
    """UserError for a text that carries the template's own tokens: rendered again it would begin or end twice."""
    found = _guarded(tokenizer, str(tokenizer.chat_template)).search(text)
    if found and not getattr(tokenizer, "split_special_tokens", False):
        raise UserError(
            f"{what} carries the model's own token {found[0]}: if rows are rendered already, say so "
            "(task.rendered=true, warmup.rendered=true)"
        )


@functools.lru_cache(16)
def _guarded(tokenizer, template: str) -> re.Pattern:
    """What no text of a row may carry: the tokenizer's special tokens, and what else its template writes around turns."""
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content.strip()]
    with contextlib.suppress(UserError):
        written = render(tokenizer, _PROBE) + render(tokenizer, _PROBE[:1], generate=True)
        special += [t for t in _added(tokenizer) if t in written and t not in _THOUGHTS]
    return re.compile(_any_of(special))


# --- what a rendering must contain -----------------------------------------------------------------------------------


def known_calls(tokenizer, messages: list[Message], tools: list | None) -> list[Message]:
    """The messages with their tool calls in the form that the template renders. UserError where it leaves calls out.

    Templates differ in what they take: a content that is empty or none, arguments as a mapping or as JSON.
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


def _lost_calls(tokenizer, messages: list[Message], tools: list | None) -> str | None:
    """What the renderings up to the turns with calls do not contain."""
    parts = (messages[: i + 1] for i, m in enumerate(messages) if m.get("tool_calls"))
    return next(filter(None, (lost(render(tokenizer, part, tools=tools), part, tools) for part in parts)), None)


def _in_form(message: Message, empty: str | None, as_json: bool) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        given = json.dumps(arguments, ensure_ascii=False) if as_json else arguments
        calls.append(call | {"function": call["function"] | {"arguments": given}})
    return message | {"tool_calls": calls, "content": message["content"] or empty}


def lost(text: str, messages: list[Message], tools: list | None = None) -> str | None:
    """What of a conversation its rendering does not contain; None if all is there.

    Of an earlier assistant turn the thoughts may be gone: templates drop them by design.
    """
    place = 0
    for number, message in enumerate(messages, 1):
        moved = message["role"] in ("system", "developer")  # templates put it where they like
        for wanted in _said_in_calls(message):
            if not any(form in text[place:] for form in _forms(wanted)):
                return f"the model's chat template leaves out the tool call of turn {number}: {wanted[:40]!r}"
        for piece in _pieces(message, last=number == len(messages)):
            found = [at for form in _forms(piece) if (at := text.find(form, 0 if moved else place)) >= 0]
            if not found:
                return f"the model's chat template leaves out what turn {number} ({message['role']}) says: {piece[:40]}"
            place = place if moved else min(found) + len(piece)
        if any(repr(call["function"]["arguments"]) in text for call in _mappings(message)):
            return f"the model's chat template writes the tool call of turn {number} as Python's text"
    for tool in tools or []:
        if (name := tool.get("function", tool).get("name", "")) not in text:
            return f"the model's chat template leaves out the tool {name!r}"
    return None


def _pieces(message: Message, last: bool) -> list[str]:
    """The texts of a message that a rendering must contain, in order."""
    content, name = message["content"] or "", message.get("name")
    named = [name] if name and message["role"] not in ("tool", name) else []
    if message["role"] != "assistant":
        return [*named, *([content.strip()] if content.strip() else [])]
    parts = [part.strip() for part in re.split("|".join(_THOUGHTS), content)]
    said = parts if last else parts[-1:]
    thoughts = [message["reasoning_content"].strip()] if last and message.get("reasoning_content") else []
    return named + [part for part in thoughts + said if part]


def _forms(text: str) -> set[str]:
    """A text as it is, and as it stands in JSON."""
    return {text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]}


def _said_in_calls(message: Message) -> list[str]:
    """Names and texts of a message's tool calls."""
    said = []
    for call in message.get("tool_calls") or []:
        arguments = call["function"]["arguments"]
        said += [call["function"]["name"], *_leaves(json.loads(arguments) if isinstance(arguments, str) else arguments)]
    return [text for text in said if text]


def _leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in [str(key), *_leaves(inner)]]
    if isinstance(value, list):
        return [text for inner in value for text in _leaves(inner)]
    if value is None or isinstance(value, bool):
        return []
    return [value if isinstance(value, str) else json.dumps(value)]


def _mappings(message: Message) -> list[dict]:
    """Tool calls whose arguments Python would spell otherwise than JSON."""
    calls = ((call, call["function"]["arguments"]) for call in message.get("tool_calls") or [])
    return [call for call, arguments in calls if isinstance(arguments, dict) and "'" in repr(arguments)]


def turn_end(tokenizer, turn: str, message: Message) -> int | None:
    """Where an assistant turn that begins a text ends: behind its end, before what the template writes after it.

    None where the template does not end it.
    """
    known = shape(tokenizer)
    place = turn.find(known.end) if known.ended else -1
    if place >= 0:
        return place + len(known.end)
    if message.get("tool_calls") and turn.rstrip().endswith(_CALL_ENDS):
        return len(turn.rstrip())
    return None
