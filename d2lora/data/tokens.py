"""Rows -> texts -> token ids: the one place that renders and tokenizes. It imports neither torch nor transformers."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from d2lora.config import Task, Warmup
from d2lora.data.files import Row
from d2lora.data.pairs import EMPTY, EQUAL, pair_texts
from d2lora.data.sources import number_of, shuffled
from d2lora.data.texts import LeftOut, NotText
from d2lora.errors import UserError

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
    if "input_ids" in example:
        return len(example["input_ids"])
    return len(example["prompt_ids"]) + max(len(example[k]) for k in ("chosen_ids", "rejected_ids") if k in example)


def encode(tokenizer, text: str) -> list[int]:
    """Ids of a rendered text with exactly one BOS, if the tokenizer has one that it would add."""
    return _begun(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def _begun(tokenizer, ids: list[int]) -> list[int]:
    return [tokenizer.bos_token_id, *ids] if _adds_bos(tokenizer) and ids[0] != tokenizer.bos_token_id else ids


@functools.lru_cache(8)
def _adds_bos(tokenizer) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def undated(template: str | None) -> str | None:
    """A chat template that does not write today's date into its prompts, as Llama 3.2's does: results would change daily.

    The date is the one that Llama 3.1's template has, and 3.2's where it can't ask for today's.
    """
    if template and "strftime_now" in template:
        return '{%- set date_string = "26 Jul 2024" -%}' + template
    return template


def rendered_prompt(tokenizer, prompt: str | list[dict], prefix: str = "") -> str:
    """The prompt, a text or the turns before the answer, as the chat template has it, up to where the answer starts."""
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise UserError("the model has no chat template, which a prompt of several turns needs")
        return f"{prompt}\n{prefix}"
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + prefix


def pair_example(tokenizer, task: Task, row: Row, preference: bool = False) -> dict:
    """{prompt_ids, chosen_ids[, rejected_ids]}: the same ids for SFT, DPO and ORPO.

    The answers end with EOS only where the solution does: a step in its middle is followed by another step. LeftOut for a pair
    of equal answers where a `preference` is to be learned.
    """
    texts = pair_texts(task, row)
    prompt = rendered_prompt(tokenizer, texts.prompt, texts.prefix)
    answers = [("chosen", texts.chosen, texts.full_chosen), ("rejected", texts.rejected, texts.full_rejected)]
    whole = {"prompt": encode(tokenizer, prompt)}
    for name, step, full in answers:
        if step is None or full is None:
            continue
        answer = step
        if task.continuation == "rest":
            answer = full
        ends = [tokenizer.eos_token_id] if answer.strip() == full.strip() else []
        whole[name] = encode(tokenizer, prompt + answer) + ends
    if preference and whole["chosen"] == whole["rejected"]:
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
    if value is None or value == []:
        if warmup.data.empty == "leave_out":
            raise LeftOut(EMPTY)
        raise UserError(f"nothing in column {warmup.messages}")
    if not isinstance(value, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        raise UserError(
            f"warmup.messages={warmup.messages}: the column must hold conversations: lists of {{role, content}}"
        )
    return conversation_example(tokenizer, [{"role": m["role"], "content": m["content"]} for m in value])


def conversation_example(tokenizer, messages: list[dict]) -> dict:
    """{input_ids, labels}: a conversation with the loss on every assistant turn, its end included."""
    text, spans = _render(tokenizer, messages), []
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UserError("a conversation without an assistant turn")
    for index in turns:
        before = _render(tokenizer, messages[:index], generate=True)
        upto = text if index == len(messages) - 1 else _render(tokenizer, messages[: index + 1])
        end = _turn_end(tokenizer, upto, len(before))
        if not (upto.startswith(before) and text.startswith(upto[:end])):
            raise UserError(
                "the model's chat template rewrites earlier turns: the loss can't be placed on the assistant's"
            )
        spans.append((len(before), end))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [
        i if any(start <= begin < end for start, end in spans) else -100
        for i, (begin, _) in zip(ids, offsets, strict=True)
    ]
    whole = _begun(tokenizer, ids)
    return {"input_ids": whole, "labels": [-100] * (len(whole) - len(ids)) + labels}


def _render(tokenizer, messages: list[dict], generate: bool = False) -> str:
    if tokenizer.chat_template is None:
        raise UserError("the model has no chat template, which conversations need: use m=0, or an instruct model")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)


def _turn_end(tokenizer, text: str, start: int) -> int:
    """Where an assistant turn that begins at `start` ends: after its EOS, before what the template puts behind."""
    eos = text.rfind(tokenizer.eos_token, start)
    return len(text) if eos < 0 else eos + len(tokenizer.eos_token)


def sft_examples(examples: Iterator[dict] | list[dict]) -> list[dict]:
    """{input_ids, labels} of pair examples: the loss is on the chosen answer."""
    return [
        e
        if "input_ids" in e
        else {"input_ids": e["prompt_ids"] + e["chosen_ids"], "labels": [-100] * len(e["prompt_ids"]) + e["chosen_ids"]}
        for e in examples
    ]
