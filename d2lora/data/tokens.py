"""Rows -> texts -> token ids: the one place that renders and tokenizes. It imports neither torch nor transformers."""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from d2lora.data import templates
from d2lora.data.conversations import conversation, tools_of
from d2lora.data.files import Row
from d2lora.data.pairs import EMPTY, EQUAL, Messages, pair_texts
from d2lora.data.sources import number_of, shuffled
from d2lora.data.texts import LeftOut, NotText
from d2lora.errors import UserError
from d2lora.settings import Task, Warmup

# DPO's reference is computed in blocks of so many pairs of the seeded order, the same for every n: a pair's value doesn't
# depend on who asks for it, not even in its last bits. The paper's sizes are multiples.
REFERENCE_BLOCK = 10


@dataclass(frozen=True)
class Subset:
    """Tokenized examples and what became of the rows: `rows` are the indices used, `misfits` those too long.

    `ahead` are the next examples of the order, up to a full reference block; `left_out` are the rows by why they must not
    be used.
    """

    examples: list[dict]
    rows: list[int]
    misfits: list[int]
    ahead: list[dict] = field(default_factory=list)
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def counts(self) -> dict:
        """What the record says of the subset."""
        joined = ",".join(map(str, self.rows))
        counted = {
            "samples": len(self.rows),
            "misfits": len(self.misfits),
            "rows_sha256": hashlib.sha256(joined.encode()).hexdigest(),
        }
        left_out = {reason: len(rows) for reason, rows in sorted(self.left_out.items())}
        return counted | ({"left_out": left_out} if left_out else {})


def subset(
    found: list[Row],
    make: Callable[[Row], dict],
    amount: int | str,
    max_length: int,
    seed: str,
    at_most: bool = False,
) -> Subset:
    """The first `amount` rows, in a seeded order, that are not left out and whose example fits `max_length` tokens; fewer will
    do if it is `at_most`. UserError naming a row that can't be read.

    Subsets are nested: those of amount = 1000 are the first of amount = 2000, so a curve over n adds rows and swaps none.
    """
    wanted = len(found) if amount == "all" else int(amount)
    block_end = math.ceil(wanted / REFERENCE_BLOCK) * REFERENCE_BLOCK
    examples: list[dict] = []
    used: list[int] = []
    misfits: list[int] = []
    left_out: dict[str, list[int]] = {}
    for index in shuffled(len(found), seed):
        if len(examples) == block_end:
            break
        example, fate = made(make, found[index], max_length)
        if fate.startswith(BAD):
            if len(used) >= wanted:
                break  # only looked at to fill a block
            raise UserError(f"row {number_of(found[index], index)}: {fate.removeprefix(BAD)}")
        if fate == FITS and example:
            examples.append(example)
            used.append(index)
        elif len(used) < wanted:
            (misfits if fate == LONG else left_out.setdefault(fate, [])).append(index)
    if not used or (amount != "all" and not at_most and len(used) < wanted):
        raise UserError(too_few(len(used), len(found), max_length, {r: len(x) for r, x in left_out.items()}, amount))
    return Subset(examples[:wanted], used[:wanted], misfits, examples[wanted:], left_out)


# What becomes of a row: its example fits, is too long, or there is none, for a reason of its own or behind BAD.
FITS, LONG, BAD = "fits", "too long", "error: "


def made(make: Callable[[Row], dict], row: Row, max_length: int) -> tuple[dict | None, str]:
    """A row's example, if it can be used, and its fate: FITS, LONG, BAD and what is wrong, or why it is left out."""
    try:
        example = make(row)
    except LeftOut as reason:
        return None, reason.reason
    except (UserError, NotText) as error:
        return None, f"{BAD}{error}"
    except Exception as error:  # a chat template's own refusals (jinja2.TemplateError), and what it stumbles over
        line = (str(error).strip().splitlines() or [""])[0]
        return None, f"{BAD}the row can't be rendered ({type(error).__name__}: {line})"
    return (example, FITS) if longest(example) <= max_length else (None, LONG)


def too_few(usable: int, rows: int, max_length: int, left_out: dict[str, int], wanted: int | str) -> str:
    """What is said where fewer rows can be used than are wanted."""
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(left_out.items()))
    others = f" (left out: {reasons})" if reasons else ""
    return f"only {usable:,} of {rows:,} rows fit recipe.max_length={max_length}{others}, and {wanted} are asked for"


def longest(example: dict) -> int:
    """Tokens of an example's longest sequence."""
    if "turns" in example:
        return max(map(longest, example["turns"]))
    if "input_ids" in example:
        return len(example["input_ids"])
    return len(example["prompt_ids"]) + max(len(example[k]) for k in ("chosen_ids", "rejected_ids") if k in example)


def encode(tokenizer, text: str) -> list[int]:
    """Ids of a rendered text with exactly one BOS, if the tokenizer has one that it would add."""
    return _begun(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def _begun(tokenizer, ids: list[int]) -> list[int]:
    return [tokenizer.bos_token_id, *ids] if _adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id] else ids


@functools.lru_cache(8)
def _adds_bos(tokenizer) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def rendered_prompt(tokenizer, prompt: str | list[dict], prefix: str = "") -> str:
    """The prompt as the chat template has it, up to where the answer starts, and the `prefix` that is given of the answer.

    A list is a conversation that the answer goes on. Without a template a prompt is a text of its own.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for said in (said for message in messages for said in _said(message)):
        templates.refuse_tokens(tokenizer, said, "the prompt")
    if tokenizer.chat_template is None and isinstance(prompt, str):
        return f"{prompt}\n{prefix}"
    text = templates.render(tokenizer, messages, generate=True)
    if problem := templates.lost(text, messages):
        raise UserError(problem)
    return text + templates.shape(tokenizer).opening + prefix if prefix else text


def pair_example(tokenizer, task: Task, row: Row, preference: bool = False) -> dict:
    """{prompt_ids, chosen_ids[, rejected_ids]}: the same ids for SFT, DPO and ORPO.

    The answers end with EOS only where the solution does: a step in its middle is followed by another step. LeftOut for a pair
    of equal answers where a `preference` is to be learned.
    """
    texts = pair_texts(task, row)
    prompt = _prompt(tokenizer, task, texts.prompt, texts.prefix)
    answers = [("chosen", texts.chosen, texts.full_chosen), ("rejected", texts.rejected, texts.full_rejected)]
    whole = {"prompt": encode(tokenizer, prompt)}
    for name, step, full in answers:
        if step is None or full is None:
            continue
        answer = full if task.continuation == "rest" else step
        written, ends = _answer(tokenizer, task, texts.prefix, answer, answer.strip() == full.strip())
        whole[name] = encode(tokenizer, prompt + written) + ends
    if preference and whole["chosen"] == whole.get("rejected"):
        raise LeftOut(EQUAL)
    # A tokenizer may merge across the border: the prompt is what all sequences share of it.
    border = next(
        (i for i, ids in enumerate(zip(*whole.values(), strict=False)) if len(set(ids)) > 1), len(whole["prompt"])
    )
    border = min(border, len(whole["prompt"]))
    example = {f"{name}_ids": ids[border:] for name, ids in whole.items()}
    return example | {"prompt_ids": whole["prompt"][:border]}


def general_example(tokenizer, warmup: Warmup, row: Row) -> dict:
    """{input_ids, labels} of a row's conversation. LeftOut or UserError where it has none, as its data set says."""
    value = row.get(warmup.messages)
    if value in (None, [], ""):
        if warmup.data.empty == "leave_out":
            raise LeftOut(EMPTY)
        raise UserError(f"nothing in column {warmup.messages}")
    if warmup.rendered:
        return rendered_conversation(tokenizer, value)
    return conversation_example(tokenizer, value, row.get(warmup.tools))


def _prompt(tokenizer, task: Task, prompt: str | Messages, prefix: str) -> str:
    if not task.rendered:
        return rendered_prompt(tokenizer, prompt, prefix)
    if not isinstance(prompt, str):
        raise UserError("task.rendered=true: the prompt is a conversation, which is not rendered")
    return prompt + prefix


def _answer(tokenizer, task: Task, prefix: str, answer: str, ends: bool) -> tuple[str, list[int]]:
    """An answer as it is written behind its prompt, and the id of its end if it `ends` and does not carry it itself."""
    shape = templates.shape(tokenizer)
    if task.rendered:
        ended = answer.rstrip().endswith(shape.end)
        return (answer.rstrip(), []) if ended else (answer, [shape.end_id] if ends else [])
    templates.refuse_tokens(tokenizer, prefix + answer, "the answer")
    written = answer if prefix else shape.opening + answer
    return (written + shape.gap, [shape.end_id]) if ends else (written, [])


def conversation_example(tokenizer, messages: Any, tools: Any = None) -> dict:
    """{input_ids, labels}: a conversation with the loss on every assistant turn, its end included.

    Each turn is learned where it is asked for: behind the prompt that the template gives for it. Where the template writes
    earlier turns otherwise than it wrote them when they were the last (reasoning models drop thoughts), one sequence can't
    hold them all. Then TRL's training template is taken, where it has one; else each turn is a sequence in its own rendering, and
    the example is {turns: [{input_ids, labels}, ...]}, still one sample.
    """
    templates.need(tokenizer)
    read, offered = conversation(messages), tools_of(tools)
    for message in read.messages:
        for said in _said(message):
            templates.refuse_tokens(tokenizer, said, f"a turn ({message['role']})")
    known = templates.known_calls(tokenizer, read.messages, offered)
    own = functools.partial(_asked, tokenizer, known, offered, None)
    training = templates.training_template(tokenizer)
    try:
        asked = [own(index) for index in read.learned]
        whole = templates.render(tokenizer, known, tools=offered)
        if all(whole.startswith(before + turn) for before, turn in asked):
            return _sequence(tokenizer, whole, asked)
    except UserError:
        if training is None or (kept := _kept(tokenizer, known, offered, training, read.learned)) is None:
            raise
        return kept
    if training and (kept := _kept(tokenizer, known, offered, training, read.learned)):
        return kept
    turns = [_sequence(tokenizer, before + turn, [(before, turn)]) for before, turn in asked]
    return turns[0] if len(turns) == 1 else {"turns": turns}


def _kept(tokenizer, messages: list[dict], tools: list | None, training: str, learned: list[int]) -> dict | None:
    """A conversation in TRL's training template, if that keeps its turns and first prompt; None otherwise."""
    with contextlib.suppress(UserError):
        asked = [_asked(tokenizer, messages, tools, training, index) for index in learned]
        text = templates.render(tokenizer, messages, template=training, tools=tools)
        prompt = templates.render(tokenizer, messages[: learned[0]], generate=True, tools=tools)
        if asked[0][0] == prompt and all(text.startswith(before + turn) for before, turn in asked):
            return _sequence(tokenizer, text, asked)
    return None


def _said(message: dict) -> list[str]:
    """All texts of a message."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    name = message.get("name")
    return [
        message["content"] or "",
        message.get("reasoning_content", ""),
        *calls,
        *([name] if isinstance(name, str) else []),
    ]


def _asked(tokenizer, messages: list[dict], tools: list | None, template: str | None, index: int) -> tuple[str, str]:
    """What stands before an assistant turn when it is asked for, and the turn with its end, as if it were the last."""
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
    if problem := templates.lost(before + turn, messages[: index + 1], tools):
        raise UserError(problem)
    end = templates.turn_end(tokenizer, turn, message)
    if end is None and shape.ended:
        raise UserError(f"the model's chat template does not end turn {index + 1} by {shape.end}")
    if end is None:  # a template without ends: the tokenizer's
        said = turn.rstrip() if message.get("tool_calls") else turn[: turn.rfind(content) + len(content)]
        return before, said + shape.end
    return before, turn[:end]


def _sequence(tokenizer, text: str, asked: list[tuple[str, str]]) -> dict:
    """{input_ids, labels} of a rendered text with the loss on the turns in it: (what stands before, the turn)."""
    spans = [(len(before), len(before) + len(turn)) for before, turn in asked]
    if not tokenizer.is_fast:
        raise UserError("the model's tokenizer is a slow one, which does not tell where a token begins: use m=0")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [
        i if any(start <= begin < end for start, end in spans) else -100
        for i, (begin, _) in zip(ids, offsets, strict=True)
    ]
    whole = _begun(tokenizer, ids)
    return {"input_ids": whole, "labels": [-100] * (len(whole) - len(ids)) + labels}


def rendered_conversation(tokenizer, text: Any) -> dict:
    """{input_ids, labels} of a conversation that is rendered already: the loss is on what follows the template's own heads of
    assistant turns, up to their ends."""
    if not isinstance(text, str) or not text.strip():
        raise UserError("warmup.rendered=true: a rendered conversation is a text")
    shape = templates.shape(tokenizer)
    head, full = _assistant_head(tokenizer)
    asked, place = [], text.find(head)
    while place >= 0:
        start = place + len(full if text.startswith(full, place) else head)
        after = text.find(head, start)
        end = text.find(shape.end, start, after if after >= 0 else len(text))
        if end < 0 and after < 0:  # the last turn has no end yet
            text = text.rstrip() + shape.end
            end = len(text) - len(shape.end)
        if end >= 0:
            asked.append((text[:start], text[start : end + len(shape.end)]))
        place = after
    if not any(turn.removesuffix(shape.end).strip() for _, turn in asked):
        raise UserError(f"warmup.rendered=true: no assistant turn in a text (each begins with {head!r})")
    return _sequence(tokenizer, text, asked)


def _assistant_head(tokenizer) -> tuple[str, str]:
    """What a template writes before an answer, without and with the empty thought that some put there."""
    question = [{"role": "user", "content": "Question?"}]
    asked, told = (templates.render(tokenizer, question, generate=g) for g in (True, False))
    full = asked.removeprefix(told)
    if full == asked or not full.strip():
        raise UserError("warmup.rendered=true: the model's chat template does not tell where an assistant turn begins")
    return full.split("<think>")[0], full


def sequences(example: dict) -> list[dict]:
    """The sequences of an example that is trained on as such: one, or one a turn."""
    return example.get("turns", [example])


def sft_examples(examples: Iterator[dict] | list[dict]) -> list[dict]:
    """{input_ids, labels} of pair examples: the loss is on the chosen answer.

    Of conversations in several sequences all are {turns}: a training set has one layout, and a sample stays one.
    """
    made = [
        e
        if "prompt_ids" not in e
        else {"input_ids": e["prompt_ids"] + e["chosen_ids"], "labels": [-100] * len(e["prompt_ids"]) + e["chosen_ids"]}
        for e in examples
    ]
    return [{"turns": sequences(e)} for e in made] if any("turns" in e for e in made) else made
