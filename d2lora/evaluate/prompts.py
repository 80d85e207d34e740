"""Define how the harness's model classes write prompts and read answers: exactly as training taught, whichever engine
answers.
"""

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance

from d2lora import data
from d2lora.base import Base
from d2lora.errors import UserError
from d2lora.progress import Progress

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM
    from transformers import PreTrainedTokenizerBase
else:
    TemplateLM = object  # at run time the class is mixed into one of the harness's

Tokens = list[int]


@functools.lru_cache(
    4096
)  # prompts are the same for all adapters of a base; the harness sorts by their lengths as well
def _encoded(tokenizer: "PreTrainedTokenizerBase", string: str) -> tuple[int, ...]:
    return tuple(data.encode(tokenizer, string))


class Cuts:
    """Collects the prompts whose answers were cut at max_new_tokens.

    It stands in for the harness's cache, which is given each answer in the order of generation.
    """

    def __init__(self) -> None:
        self.next: list[
            bool
        ] = []  # of the answers that are generated but not yet passed to add_partial: whether they were cut
        self.prompts: set[str] = set()

    def add_partial(self, kind: str, request: tuple[Any, ...], answer: object) -> None:
        if kind == "generate_until" and self.next.pop(0):
            self.prompts.add(request[0])


class AsTrained(TemplateLM):
    """Mixes training's rendering, tokens and ends of answers into one of the harness's model classes.

    It reports progress, and refuses an item that does not fit: the harness would cut its beginning. `begin` must be
    called first.
    """

    def begin(self, base: Base, chat: bool, progress: Progress) -> None:
        """Set what prompts and answers of this base need; `chat` is whether prompts are rendered as conversations."""
        self.base, self.progress, self.requests, self.through = base, progress, 0, 0
        tokenizer = base.tokenizer
        ends = base.model.generation_config.eos_token_id
        self.end_ids: Tokens = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
        self.ends = {str(tokenizer.decode(end, skip_special_tokens=False)) for end in self.end_ids}
        self.cache_hook = Cuts()
        self.opening = data.shape(tokenizer).opening if chat else ""
        self.before = data.answer_starts(tokenizer) if chat else []
        self.solutions = False  # whether what is scored begins exactly where training's answers begin

    @property
    def cut(self) -> set[str]:
        """Return the prompts whose answers were cut at max_new_tokens."""
        return self.cache_hook.prompts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render the prompt as in training. (The harness would leave out a system turn that a template refuses.)"""
        if not add_generation_prompt:
            return super().apply_chat_template(chat_history, add_generation_prompt)
        return data.rendered_prompt(self.base.tokenizer, chat_history)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Tokens:
        """Encode with one BOS, as in training.

        (The harness leaves it to the tokenizer, and to the first prompt of a batch.)
        """
        if add_special_tokens is None and not any(kwargs.values()):
            return list(_encoded(self.base.tokenizer, string))
        return super().tok_encode(string, add_special_tokens, **kwargs)

    def tok_decode(self, tokens: int | Tokens, skip_special_tokens: bool = True) -> str:
        """Decode generated ids to the answer: without thoughts and the template's opening, up to its end token."""
        decode = self.base.tokenizer.decode
        if skip_special_tokens and isinstance(tokens, list):
            tokens = tokens[: next((i for i, token in enumerate(tokens) if token in self.end_ids), None)]
            start = max((i + 1 for i, token in enumerate(tokens) if token in self.before), default=0)
            text = str(decode(tokens[start:], skip_special_tokens=True))
            return text.lstrip() if start else text
        return str(decode(tokens, skip_special_tokens=skip_special_tokens))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Compute the log-likelihood of answers, behind what the chat template writes before an answer."""
        self.requests += len(requests)
        if self.opening:
            arguments = ((request, *request.arguments) for request in requests)
            requests = [
                replace(request, arguments=(prompt, self.opening + answer)) for request, prompt, answer in arguments
            ]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _encode_pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        """Encode a prompt and what is scored behind it.

        (The harness counts the prompt's last white space, which chat templates end with, to what is scored.)
        """
        if not self.solutions:
            return super()._encode_pair(context, continuation)
        ids, border = self.tok_encode(context + continuation), len(self.tok_encode(context))
        return ids[:border], ids[border:]

    def was_cut(self, answer: Tokens, room: int, stop: list[str]) -> bool:
        """Tell whether an answer fills the room of so many tokens without an end token or a stop text."""
        if len(answer) < room or any(token in self.end_ids for token in answer):
            return False
        text = str(self.base.tokenizer.decode(answer)) if any(stop) else ""
        return not any(s and s in text for s in stop)

    def fits(self, tokens: int, room: int, length: int) -> None:
        """Raise UserError for an item with more tokens than there is room for in a model that takes `length`."""
        if tokens > room:
            raise UserError(
                f"an item of {tokens} tokens, where {room} fit (the model takes {length}, max_new_tokens among them): its beginning would be cut"
            )

    def count(self, requests: int) -> None:
        """Report that so many more requests are done."""
        self.through += requests
        self.progress(min(self.through, self.requests), self.requests)
