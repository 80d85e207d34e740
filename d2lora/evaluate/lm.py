"""Adapt lm-evaluation-harness's model class, so that prompts have exactly the form that training taught."""

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from d2lora import data
from d2lora.base import Base, device
from d2lora.errors import UserError
from d2lora.layouts import decoding, proof
from d2lora.progress import Progress

Tokens = list[int]
_GREEDY = {"attention_mask", "do_sample", "temperature"}  # of generate's settings: those of a greedy answer


class _Cuts:
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


class WatchedLM(HFLM):
    """A Hugging Face model for the harness that reports progress and never changes an item to make it fit.

    The harness would cut a prompt that is too long: this raises. Where padding is not exact, items are evaluated one by
    one.
    """

    def __init__(
        self, base: Base, model: torch.nn.Module, chat: bool, batch: int, progress: Progress, proofs: proof.Memory
    ) -> None:
        self.progress, self.requests, self.through = progress, 0, 0
        self.base, self.proofs = base, proofs
        # A bfloat16 model's likelihoods in bfloat16 would tie where they should not.
        kind = {"batch_size": batch, "device": device(), "softmax_dtype": "float32"}
        super().__init__(pretrained=model, tokenizer=base.tokenizer, **kind)
        ends = self.model.generation_config.eos_token_id
        self.end_ids = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
        self.ends = {self.tok_decode(end, skip_special_tokens=False) for end in self.end_ids}
        self.cache_hook = _Cuts()
        self.leaving = False  # whether texts are decoded by `decoding`, not by `generate`
        self.opening = data.shape(self.tokenizer).opening if chat else ""
        self.before = data.answer_starts(self.tokenizer) if chat else []

    @property
    def cut(self) -> set[str]:
        """Return the prompts whose answers were cut at max_new_tokens."""
        return self.cache_hook.prompts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render the prompt as in training. (The harness would leave out a system turn that a template refuses.)"""
        if not add_generation_prompt:
            return super().apply_chat_template(chat_history, add_generation_prompt)
        return data.rendered_prompt(self.tokenizer, chat_history)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> Tokens:
        """Encode with one BOS, as in training.

        (The harness leaves it to the tokenizer, and to the first prompt of a batch.)
        """
        if add_special_tokens is None and not left_truncate_len and not kwargs:
            return data.encode(self.tokenizer, string)
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)

    def tok_decode(self, tokens: int | Iterable[int], skip_special_tokens: bool = True) -> str:
        """Decode generated ids to the answer: without thoughts and the template's opening, up to its end token."""
        if skip_special_tokens and isinstance(tokens, list):
            tokens = tokens[: next((i for i, token in enumerate(tokens) if token in self.end_ids), None)]
            start = max((i + 1 for i, token in enumerate(tokens) if token in self.before), default=0)
            text = super().tok_decode(tokens[start:])
            return text.lstrip() if start else text
        return super().tok_decode(tokens, skip_special_tokens=skip_special_tokens)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generate answers to prompts."""
        self.requests += len(requests)
        ordered = sorted((r.args[0] for r in requests), key=len)
        texts = [self.tok_encode(text) for text in {*ordered[:2], *ordered[-2:]}]
        self.leaving = self._leaves(texts)
        if not self.leaving:
            self._prove(texts, "left")
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Compute the log-likelihood of answers, behind what the chat template writes before an answer."""
        self.requests += len(requests)
        if self.opening:
            arguments = ((request, *request.arguments) for request in requests)
            requests = [
                replace(request, arguments=(prompt, self.opening + answer)) for request, prompt, answer in arguments
            ]
        return super().loglikelihood(requests, disable_tqdm=True)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode and pad texts to ids and mask, each (batch, length). UserError where the harness would cut a text."""
        encoded = [data.encode(self.tokenizer, string) for string in strings]
        padded = self.tokenizer.pad({"input_ids": encoded}, padding_side=padding_side, return_tensors="pt")
        ids, mask = padded["input_ids"], padded["attention_mask"]
        if left_truncate_len:
            self._fits(ids.shape[1], left_truncate_len)
        return ids, mask

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], Tokens, Tokens]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        longest = max((len(context) + len(answer) for _, context, answer in requests), default=0)
        self._fits(longest, self.max_length + 1)  # the last token is only predicted
        texts = sorted((context + answer for _, context, answer in requests), key=len)
        self._prove([*texts[:2], *texts[-2:]], "right")
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _leaves(self, texts: list[Tokens]) -> bool:
        """Tell whether `decoding` gives what `generate` gives, tested once for a model and length."""
        if not texts or not decoding.suits(self.base.model):
            return False
        return proof.batch(self.model, self.base.model, texts, "leaving", self.proofs).exact

    def _prove(self, texts: list[Tokens], side: Literal["left", "right"]) -> None:
        """Test padding on this side, once for a model and length.

        If it is not exact, set the batch size to 1 and say so.
        """
        if self.batch_size == 1 or not texts:
            return
        padded = proof.batch(self.model, self.base.model, texts, side, self.proofs)
        if not padded.exact:
            self.batch_size_per_gpu = 1
            print(f"{self.base.name}: evaluated one by one ({proof.miss(padded)} in a batch)", file=sys.stderr)

    def _fits(self, tokens: int, room: int) -> None:
        """Raise UserError for an item with more tokens than there is room for."""
        if tokens > room:
            raise UserError(
                f"an item of {tokens} tokens, where {room} fit (the model takes {self.max_length}, max_new_tokens among them): its beginning would be cut"
            )

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super()._model_call(inps, *args, **kwargs)
        self._count(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        # Generation stops at these tokens anyway. The harness would decode every sequence after every token to look for their text.
        stop = [text for text in stop if text not in self.ends]
        if self.leaving and not any(stop) and kwargs.keys() <= _GREEDY and not kwargs.get("do_sample"):
            room, pad = max_length - context.shape[1], self.tokenizer.pad_token_id
            mask = kwargs["attention_mask"]
            sequences = decoding.greedy(self.model, self.base.model, context, mask, room, self.end_ids, pad)
        else:
            sequences = super()._model_generate(context, max_length, stop, **kwargs)
        self.cache_hook.next += self._cut(sequences[:, context.shape[1] :], max_length - context.shape[1], stop)
        self._count(len(context))
        return sequences

    def _cut(self, answers: torch.Tensor, room: int, stop: list[str]) -> list[bool]:
        """Tell for each answer whether it fills the room without an end token or a stop text."""
        if answers.shape[1] < room:
            return [False] * len(answers)
        ended = torch.isin(answers, torch.tensor(self.end_ids, device=answers.device)).any(dim=1).tolist()
        texts = self.tokenizer.batch_decode(answers) if any(stop) else [""] * len(answers)
        return [
            not has_end and not any(s and s in text for s in stop) for has_end, text in zip(ended, texts, strict=True)
        ]

    def _count(self, requests: int) -> None:
        """Report that so many more requests are done."""
        self.through += requests
        self.progress(min(self.through, self.requests), self.requests)
