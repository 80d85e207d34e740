"""Tell which test items a model can take."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from d2lora.data.choices import choices
from d2lora.data.files import Row
from d2lora.data.items import EMPTY, golds, is_left_out, item_prompt
from d2lora.data.templates import refuse_tokens
from d2lora.data.texts import LeftOut
from d2lora.data.tokens import Example, encode, rendered_prompt
from d2lora.scoring import Likelihood
from d2lora.settings import Benchmark

if TYPE_CHECKING:
    from d2lora.data.templates import Tokenizer


def context_of(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model takes, as lm-evaluation-harness reads it from its config.

    None if the config does not say.
    """
    for section in (config, config.get("text_config") or {}):
        for name in ("n_positions", "max_position_embeddings", "n_ctx"):
            if isinstance(section.get(name), int):
                return section[name]
    return None


def room_of(benchmark: Benchmark, context: int) -> int:
    """Return the tokens that an item may have, its answer not counted where the model generates it."""
    return context - (benchmark.max_new_tokens if benchmark.scoring.generates else 0)


def item_example(tokenizer: "Tokenizer", benchmark: Benchmark, row: Row, room: int) -> Example:
    """Tokenize an item's prompt, {input_ids}, with its longest choice or its scored solution; no ids if it certainly fits.

    LeftOut for an item that is left out as empty.
    """
    if is_left_out(benchmark, row):
        raise LeftOut(EMPTY)
    question = item_prompt(benchmark, row)
    prompt = rendered_prompt(tokenizer, question) if benchmark.chat or not isinstance(question, str) else question
    if benchmark.choices:
        offered = choices(benchmark, row)
        for option in offered if benchmark.chat else ():
            refuse_tokens(tokenizer, option, "a choice")
        prompt += " " + max(offered, key=len)
    if isinstance(benchmark.scoring, Likelihood):
        solution = benchmark.scoring.solution(golds(benchmark, row)[0])
        if benchmark.chat:
            refuse_tokens(tokenizer, solution, "the gold answer")
        prompt += " " + solution
    if len(prompt.encode()) < room:  # no token is shorter than a byte
        return {"input_ids": []}
    return {"input_ids": encode(tokenizer, prompt)}


def is_too_long(tokenizer: "Tokenizer", benchmark: Benchmark, row: Row, context: int | None) -> bool:
    """Tell whether an item, and the answer to it, is longer than the tokens that a model takes; None: it takes any."""
    if context is None:
        return False
    room = room_of(benchmark, context)
    return len(item_example(tokenizer, benchmark, row, room)["input_ids"]) > room
