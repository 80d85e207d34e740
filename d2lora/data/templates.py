"""Read from a model's chat template what it writes around a conversation, before an answer, and at its end.

No torch here, and no transformers.
"""

import contextlib
import functools
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from d2lora.data.conversations import Message, Tool
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
THOUGHTS = ("<think>", "</think>")


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


def _own(tokenizer: "Tokenizer", tools: list[Tool] | None = None) -> str:
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
    tools: list[Tool] | None = None,
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
    thoughts = tokenizer.get_vocab().get(THOUGHTS[1])
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
    """Return a pattern that matches any of the texts, the longest first; it matches nothing without any."""
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
        special += [t for t in _added(tokenizer) if t in written and t not in THOUGHTS]
    return re.compile(_any_of(special))


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
