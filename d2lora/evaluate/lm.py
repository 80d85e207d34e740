"""Adapt lm-evaluation-harness's model class, so that prompts have exactly the form that training taught."""

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from d2lora.base import Base, device
from d2lora.evaluate.prompts import AsTrained, Tokens
from d2lora.layouts import batches, decoding, proof
from d2lora.progress import Progress

_GREEDY = {"attention_mask", "do_sample", "temperature"}  # of generate's settings: those of a greedy answer
_LOOKED_BACK = 10  # tokens before a stop text in which it may begin: a GPU is asked every eighth step


class WatchedLM(AsTrained, HFLM):
    """A Hugging Face model for the harness, with prompts and answers as in training.

    Where padding is not exact, items are evaluated one by one.
    """

    batch_size_per_gpu: int  # texts at once; the harness gives it no type

    def __init__(
        self, base: Base, model: torch.nn.Module, chat: bool, batch: int, progress: Progress, proofs: proof.Memory
    ) -> None:
        self.proofs = proofs
        # A bfloat16 model's likelihoods in bfloat16 would tie where they should not.
        kind = {"batch_size": batch, "device": device(), "softmax_dtype": "float32"}
        super().__init__(pretrained=model, tokenizer=base.tokenizer, **kind)
        self.begin(base, chat, progress)
        self.passes: decoding.Passes | None = None  # of `decoding`, while texts are decoded by it and not by `generate`

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generate answers to prompts."""
        self.requests += len(requests)
        ordered = sorted((r.args[0] for r in requests), key=len)
        texts = [self.tok_encode(text) for text in {*ordered[:2], *ordered[-2:]}]
        if not self._leaves(texts):
            self._prove(texts, "left")
            return super().generate_until(requests, disable_tqdm=True)
        batch, room = self.batch_size_per_gpu, max(r.args[1].get("max_gen_toks", self.max_gen_toks) for r in requests)
        self.batch_size_per_gpu = decoding.at_once(self.base.model, batch, max(map(len, texts)) + room)
        try:
            with decoding.prepared(self.model, self.base.model) as self.passes:
                return super().generate_until(requests, disable_tqdm=True)
        finally:
            self.batch_size_per_gpu, self.passes = batch, None

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode and pad texts to ids and mask, each (batch, length). UserError where the harness would cut a text."""
        encoded = [self.tok_encode(string) for string in strings]
        padded = self.tokenizer.pad({"input_ids": encoded}, padding_side=padding_side, return_tensors="pt")
        ids, mask = padded["input_ids"], padded["attention_mask"]
        if left_truncate_len:
            self.fits(ids.shape[1], left_truncate_len, self.max_length)
        return ids, mask

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], Tokens, Tokens]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        longest = max((len(context) + len(answer) for _, context, answer in requests), default=0)
        self.fits(longest, self.max_length + 1, self.max_length)  # the last token is only predicted
        texts = sorted((context + answer for _, context, answer in requests), key=len)
        self._prove([*texts[:2], *texts[-2:]], "right")
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _leaves(self, texts: list[Tokens]) -> bool:
        """Tell whether `decoding` gives what `generate` gives, tested once for a model and length."""
        if not texts or not decoding.suits(self.base.model):
            return False
        return batches.check(self.model, self.base.model, texts, "leaving", self.proofs).exact

    def _prove(self, texts: list[Tokens], side: Literal["left", "right"]) -> None:
        """Test padding on this side, once for a model and length.

        If it is not exact, set the batch size to 1 and say so.
        """
        if self.batch_size == 1 or not texts:
            return
        padded = batches.check(self.model, self.base.model, texts, side, self.proofs)
        if not padded.exact:
            self.batch_size_per_gpu = 1
            print(f"{self.base.name}: evaluated one by one ({padded.miss} in a batch)", file=sys.stderr)

    def _stopped(self, stop: list[str]) -> Callable[[Tokens], bool] | None:
        """Return a function that tells whether one of these texts is among the last tokens of an answer.

        The harness cuts the answer before it: where the text is missed, the answer is only longer before it is cut.
        """
        texts = list(filter(None, stop))
        if not texts:
            return None
        recent = max(len(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts) + _LOOKED_BACK
        return lambda answer: any(text in self.tokenizer.decode(answer[-recent:]) for text in texts)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super()._model_call(inps, *args, **kwargs)
        self.count(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        # Generation stops at these tokens anyway. The harness would decode every sequence after every token to look for their text.
        stop = [text for text in stop if text not in self.ends]
        room = max_length - context.shape[1]
        if self.passes and kwargs.keys() <= _GREEDY and not kwargs.get("do_sample"):
            mask, pad = kwargs["attention_mask"], self.tokenizer.pad_token_id
            ends = self.end_ids, pad, self._stopped(stop)
            sequences = decoding.greedy(self.passes, self.base.model, context, mask, room, *ends)
        else:
            sequences = super()._model_generate(context, max_length, stop, **kwargs)
        self.cache_hook.next += [
            self.was_cut(answer, room, stop) for answer in sequences[:, context.shape[1] :].tolist()
        ]
        self.count(len(context))
        return sequences
