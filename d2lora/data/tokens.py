"""Render rows as texts and tokenize them. It is done here and nowhere else, so that all methods train on the same ids."""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from d2lora.data import renderings, templates
from d2lora.data.conversations import Message, Tool, conversation, tools_of
from d2lora.data.files import Row
from d2lora.data.pairs import EMPTY, EQUAL, Messages, pair_texts
from d2lora.data.sources import number_of, shuffled
from d2lora.data.texts import LeftOut, NotText
from d2lora.errors import UserError
from d2lora.records import RowCounts
from d2lora.settings import Task, Warmup

if TYPE_CHECKING:
    from d2lora.data.templates import Tokenizer

# A tokenized row: {input_ids, labels}, {prompt_ids, chosen_ids[, rejected_ids]}, or {turns: [{input_ids, labels}, ...]}; labels
# are ids, or -100 where no loss is.
Example = dict[str, Any]

# Pairs a batch when DPO's reference log-probabilities are computed. The batches are consecutive blocks of the seeded order, the
# same for every n, so that a pair's value is the same for every n, to the last bit. The paper's sizes are multiples of it.
REFERENCE_BLOCK = 10


@dataclass(frozen=True)
class Subset:
    """The tokenized examples of a subset, and what became of the other rows.

    `rows` are the indices of the rows used, `misfits` of those that are too long, `left_out` of those that must not be
    used, by reason. `ahead` are the next examples of the order, up to a full block of `REFERENCE_BLOCK`.
    """

    examples: list[Example]
    rows: list[int]
    misfits: list[int]
    ahead: list[Example] = field(default_factory=list)
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def counts(self) -> RowCounts:
        """Return what a record says of the subset: how many rows were used or left out, and a hash of which."""
        joined = ",".join(map(str, self.rows))
        which = hashlib.sha256(joined.encode()).hexdigest()
        counts = RowCounts(samples=len(self.rows), misfits=len(self.misfits), rows_sha256=which)
        left_out = {reason: len(rows) for reason, rows in sorted(self.left_out.items())}
        return counts.model_copy(update={"left_out": left_out}) if left_out else counts


def subset(
    rows: list[Row],
    tokenize: Callable[[Row], Example],
    amount: int | str,
    max_length: int,
    seed: str,
    at_most: bool = False,
) -> Subset:
    """Tokenize the first `amount` rows, in a seeded order, that may be used and fit `max_length` tokens.

    UserError naming a row that can't be read, and where there are fewer than `amount` unless `at_most` allows it.
    Subsets are nested: those of amount = 1000 are the first of amount = 2000, so a curve over n only ever adds rows.
    """
    limit = len(rows) if amount == "all" else int(amount)
    block_end = math.ceil(limit / REFERENCE_BLOCK) * REFERENCE_BLOCK
    examples: list[Example] = []
    used: list[int] = []
    misfits: list[int] = []
    left_out: dict[str, list[int]] = {}
    for index in shuffled(len(rows), seed):
        if len(examples) == block_end:
            break
        example, fate = example_and_fate(tokenize, rows[index], max_length)
        if fate.startswith(BAD):
            if len(used) >= limit:
                break  # the row would only fill the last block, and is not part of the subset
            raise UserError(f"row {number_of(rows[index], index)}: {fate.removeprefix(BAD)}")
        if fate == FITS and example:
            examples.append(example)
            used.append(index)
        elif len(used) < limit:
            (misfits if fate == LONG else left_out.setdefault(fate, [])).append(index)
    if not used or (amount != "all" and not at_most and len(used) < limit):
        raise UserError(too_few(len(used), len(rows), max_length, {r: len(x) for r, x in left_out.items()}, amount))
    return Subset(examples[:limit], used[:limit], misfits, examples[limit:], left_out)


# The fates of a row: its example fits, is too long, or could not be made (BAD and the error); else the reason why it is left out.
FITS, LONG, BAD = "fits", "too long", "error: "


def example_and_fate(tokenize: Callable[[Row], Example], row: Row, max_length: int) -> tuple[Example | None, str]:
    """Make a row's example, and return it with the row's fate: FITS, LONG, BAD and the error, or the reason to leave it
    out.

    The example is None unless it fits.
    """
    try:
        example = tokenize(row)
    except LeftOut as reason:
        return None, reason.reason
    except (UserError, NotText) as error:
        return None, f"{BAD}{error}"
    except Exception as error:  # a chat template may raise anything: its own refusals, or an error of its code
        line = (str(error).strip().splitlines() or [""])[0]
        return None, f"{BAD}the row can't be rendered ({type(error).__name__}: {line})"
    return (example, FITS) if longest(example) <= max_length else (None, LONG)


def too_few(usable: int, rows: int, max_length: int, left_out: dict[str, int], amount: int | str) -> str:
    """Say that fewer rows can be used than were asked for, and why the others can't."""
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(left_out.items()))
    others = f" (left out: {reasons})" if reasons else ""
    return f"only {usable:,} of {rows:,} rows fit recipe.max_length={max_length}{others}, and {amount} are asked for"


def longest(example: Example) -> int:
    """Return the tokens of an example's longest sequence; of a pair, with its prompt."""
    if "turns" in example:
        return max(map(longest, example["turns"]))
    if "input_ids" in example:
        return len(example["input_ids"])
    return len(example["prompt_ids"]) + max(len(example[k]) for k in ("chosen_ids", "rejected_ids") if k in example)


def encode(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Tokenize a rendered text, with exactly one BOS if the tokenizer adds one."""
    return _begun(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def _begun(tokenizer: "Tokenizer", ids: list[int]) -> list[int]:
    """Return the ids with the BOS in front, if the tokenizer adds one and they lack it."""
    return [tokenizer.bos_token_id, *ids] if _adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id] else ids


@functools.lru_cache(8)
def _adds_bos(tokenizer: "Tokenizer") -> bool:
    """Tell whether the tokenizer puts a BOS in front of a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def rendered_prompt(tokenizer: "Tokenizer", prompt: str | list[Message], prefix: str = "") -> str:
    """Render a prompt with the chat template, up to where the answer starts, followed by the answer's `prefix`.

    A list is a conversation whose next turn is the answer. Without a chat template the prompt is plain text. UserError
    if the template drops a part of it, or if it contains the template's own tokens.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for text in (text for message in messages for text in _texts_of(message)):
        templates.refuse_tokens(tokenizer, text, "the prompt")
    if tokenizer.chat_template is None and isinstance(prompt, str):
        return f"{prompt}\n{prefix}"
    text = templates.render(tokenizer, messages, generate=True)
    if problem := renderings.lost(text, messages):
        raise UserError(problem)
    return text + templates.shape(tokenizer).opening + prefix if prefix else text


def pair_example(tokenizer: "Tokenizer", task: Task, row: Row, preference: bool = False) -> Example:
    """Tokenize a row of a task: {prompt_ids, chosen_ids[, rejected_ids]}, the same ids for every method.

    An answer ends with EOS only where the solution ends: a step in its middle is followed by another step. LeftOut for
    a pair of equal answers if a `preference` is to be learned from it.
    """
    texts = pair_texts(task, row)
    prompt = _prompt(tokenizer, task, texts.prompt, texts.prefix)
    answers = [("chosen", texts.chosen, texts.full_chosen), ("rejected", texts.rejected, texts.full_rejected)]
    ids = {"prompt": encode(tokenizer, prompt)}
    for name, step, full in answers:
        if step is None or full is None:
            continue
        answer = full if task.continuation == "rest" else step
        written, ends = _answer(tokenizer, task, texts.prefix, answer, answer.strip() == full.strip())
        ids[name] = encode(tokenizer, prompt + written) + ends
    if preference and ids["chosen"] == ids.get("rejected"):
        raise LeftOut(EQUAL)
    # A tokenizer may merge the end of the prompt with the start of an answer: the prompt is what all sequences begin with.
    border = next(
        (i for i, tokens in enumerate(zip(*ids.values(), strict=False)) if len(set(tokens)) > 1), len(ids["prompt"])
    )
    border = min(border, len(ids["prompt"]))
    example = {f"{name}_ids": of_text[border:] for name, of_text in ids.items()}
    return example | {"prompt_ids": ids["prompt"][:border]}


def general_example(tokenizer: "Tokenizer", warmup: Warmup, row: Row) -> Example:
    """Tokenize the conversation of a warm-up row: {input_ids, labels}.

    LeftOut or UserError if it has none, as `data.empty` says.
    """
    value = row.get(warmup.messages)
    if value in (None, [], ""):
        if warmup.data.empty == "leave_out":
            raise LeftOut(EMPTY)
        raise UserError(f"nothing in column {warmup.messages}")
    if warmup.rendered:
        return rendered_conversation(tokenizer, value)
    return conversation_example(tokenizer, value, row.get(warmup.tools))


def _prompt(tokenizer: "Tokenizer", task: Task, prompt: str | Messages, prefix: str) -> str:
    """Render a task's prompt, or return it unchanged if the rows are rendered already."""
    if not task.rendered:
        return rendered_prompt(tokenizer, prompt, prefix)
    if not isinstance(prompt, str):
        raise UserError("task.rendered=true: the prompt is a conversation, which is not rendered")
    return prompt + prefix


def _answer(tokenizer: "Tokenizer", task: Task, prefix: str, answer: str, ends: bool) -> tuple[str, list[int]]:
    """Return an answer as it follows its prompt, and the id of its end: [] if none follows, or the text has it already."""
    shape = templates.shape(tokenizer)
    if task.rendered:
        ended = answer.rstrip().endswith(shape.end)
        return (answer.rstrip(), []) if ended else (answer, [shape.end_id] if ends else [])
    templates.refuse_tokens(tokenizer, prefix + answer, "the answer")
    written = answer if prefix else shape.opening + answer
    return (written + shape.gap, [shape.end_id]) if ends else (written, [])


def conversation_example(tokenizer: "Tokenizer", messages: Any, tools: Any = None) -> Example:
    """Tokenize a conversation, {input_ids, labels}, with the loss on every assistant turn and its end.

    Each turn is learned behind the prompt that the template writes when it asks for that turn. Some templates write
    earlier turns otherwise than the last (those of reasoning models drop thoughts), so one sequence can't hold all
    turns. Then TRL's training template is used, if TRL has one; if not, each turn becomes a sequence of its own, and
    the example is {turns: [{input_ids, labels}, ...]}, still one sample. UserError if a turn can't be rendered.
    """
    templates.require_template(tokenizer)
    read, offered = conversation(messages), tools_of(tools)
    for message in read.messages:
        for text in _texts_of(message):
            templates.refuse_tokens(tokenizer, text, f"a turn ({message['role']})")
    messages = renderings.renderable_calls(tokenizer, read.messages, offered)
    training = templates.training_template(tokenizer)
    try:
        turns = [_turn(tokenizer, messages, offered, None, index) for index in read.learned]
        text = templates.render(tokenizer, messages, tools=offered)
        if all(text.startswith(before + turn) for before, turn in turns):
            return _sequence(tokenizer, text, turns)
    except UserError:
        if training is None or (example := _for_training(tokenizer, messages, offered, training, read.learned)) is None:
            raise
        return example
    if training and (example := _for_training(tokenizer, messages, offered, training, read.learned)):
        return example
    examples = [_sequence(tokenizer, before + turn, [(before, turn)]) for before, turn in turns]
    return examples[0] if len(examples) == 1 else {"turns": examples}


def _for_training(
    tokenizer: "Tokenizer", messages: list[Message], tools: list[Tool] | None, training: str, learned: list[int]
) -> Example | None:
    """Tokenize a conversation with TRL's training template; None if that changes its turns or its first prompt."""
    with contextlib.suppress(UserError):
        turns = [_turn(tokenizer, messages, tools, training, index) for index in learned]
        text = templates.render(tokenizer, messages, template=training, tools=tools)
        prompt = templates.render(tokenizer, messages[: learned[0]], generate=True, tools=tools)
        if turns[0][0] == prompt and all(text.startswith(before + turn) for before, turn in turns):
            return _sequence(tokenizer, text, turns)
    return None


def _texts_of(message: Message) -> list[str]:
    """Return all texts of a message: its content, thoughts, tool calls as JSON, and name."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    name = message.get("name")
    return [
        message["content"] or "",
        message.get("reasoning_content", ""),
        *calls,
        *([name] if isinstance(name, str) else []),
    ]


def _turn(
    tokenizer: "Tokenizer", messages: list[Message], tools: list[Tool] | None, template: str | None, index: int
) -> tuple[str, str]:
    """Render the prompt of an assistant turn, and the turn with its end, as if it were the last. UserError if it can't be."""
    before = templates.render(tokenizer, messages[:index], generate=True, template=template, tools=tools)
    upto = templates.render(tokenizer, messages[: index + 1], template=template, tools=tools)
    message, shape = messages[index], templates.shape(tokenizer)
    content = (message["content"] or "").strip()
    plain = not message.get("tool_calls") and not message.get("reasoning_content") and "</think>" not in content
    if upto.startswith(before):
        turn = upto[len(before) :]
    elif plain and not shape.follows:
        turn = shape.opening + content + shape.gap + shape.end
    else:
        raise UserError(
            f"turn {index + 1} does not follow the prompt that the model's chat template gives for it"
            + ("" if plain else ": with thoughts it may need model.thinking=true")
        )
    if problem := renderings.lost(before + turn, messages[: index + 1], tools):
        raise UserError(problem)
    end = templates.turn_end(tokenizer, turn, message)
    if end is None and shape.ended:
        raise UserError(f"the model's chat template does not end turn {index + 1} with {shape.end}")
    if end is None:  # a template without ends: the tokenizer's
        unended = turn.rstrip() if message.get("tool_calls") else turn[: turn.rfind(content) + len(content)]
        return before, unended + shape.end
    return before, turn[:end]


def _sequence(tokenizer: "Tokenizer", text: str, turns: list[tuple[str, str]]) -> Example:
    """Tokenize a rendered text, {input_ids, labels}, with the loss on its `turns`, given as (the text before one, the turn)."""
    spans = [(len(before), len(before) + len(turn)) for before, turn in turns]
    if not tokenizer.is_fast:
        raise UserError("the model's tokenizer is a slow one, which gives no token offsets: use m=0")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [
        i if any(start <= begin < end for start, end in spans) else -100
        for i, (begin, _) in zip(ids, offsets, strict=True)
    ]
    begun = _begun(tokenizer, ids)
    return {"input_ids": begun, "labels": [-100] * (len(begun) - len(ids)) + labels}


def rendered_conversation(tokenizer: "Tokenizer", text: Any) -> Example:
    """Tokenize a conversation that is rendered already, {input_ids, labels}.

    The loss is on what follows the headers that the template writes before assistant turns, up to the end of each.
    UserError if there is no such turn.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError("warmup.rendered=true: a rendered conversation is a text")
    shape = templates.shape(tokenizer)
    head, full = _assistant_head(tokenizer)
    turns, header = [], text.find(head)
    while header >= 0:
        start = header + len(full if text.startswith(full, header) else head)
        after = text.find(head, start)
        end = text.find(shape.end, start, after if after >= 0 else len(text))
        if end < 0 and after < 0:  # the last turn has no end yet
            text = text.rstrip() + shape.end
            end = len(text) - len(shape.end)
        if end >= 0:
            turns.append((text[:start], text[start : end + len(shape.end)]))
        header = after
    if not any(turn.removesuffix(shape.end).strip() for _, turn in turns):
        raise UserError(f"warmup.rendered=true: no assistant turn in a text (each begins with {head!r})")
    return _sequence(tokenizer, text, turns)


def _assistant_head(tokenizer: "Tokenizer") -> tuple[str, str]:
    """Return the template's header of an assistant turn, without and with the empty thought that some templates add."""
    question = [{"role": "user", "content": "Question?"}]
    with_header, without = (templates.render(tokenizer, question, generate=g) for g in (True, False))
    full = with_header.removeprefix(without)
    if full == with_header or not full.strip():
        raise UserError("warmup.rendered=true: the model's chat template does not tell where an assistant turn begins")
    return full.split("<think>")[0], full


def mixed(first: tuple[Subset, int], second: tuple[Subset, int], seed: str) -> Subset:
    """Return the examples of two subsets, each as often as its number says, in one seeded order, for SFT in a single epoch."""
    parts = [
        (example, row)
        for subset, repeats in (first, second)
        for example, row in zip(subset.examples * repeats, subset.rows * repeats, strict=True)
    ]
    ordered = [parts[index] for index in shuffled(len(parts), seed)]
    return Subset([example for example, _ in ordered], [row for _, row in ordered], [])


def sequences(example: Example) -> list[Example]:
    """Return the sequences of an example: one, or one for each turn."""
    return example.get("turns", [example])


def sft_examples(examples: Iterator[Example] | list[Example]) -> list[Example]:
    """Return pair examples as {input_ids, labels}, with the loss on the chosen answer; other examples as they are.

    If one of them is {turns} all become so, because the columns of a training set are the same in all rows.
    """
    sft = [
        e
        if "prompt_ids" not in e
        else {"input_ids": e["prompt_ids"] + e["chosen_ids"], "labels": [-100] * len(e["prompt_ids"]) + e["chosen_ids"]}
        for e in examples
    ]
    return [{"turns": sequences(e)} for e in sft] if any("turns" in e for e in sft) else sft
