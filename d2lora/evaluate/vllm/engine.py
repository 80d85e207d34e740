"""Evaluate with vLLM: a model class of the harness whose requests go to a session."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)

from d2lora.base import Base
from d2lora.evaluate import harness
from d2lora.evaluate.engine import Evaluation, Questions
from d2lora.evaluate.prompts import AsTrained, Tokens
from d2lora.evaluate.vllm.running import Key
from d2lora.evaluate.vllm.sessions import Session, Unable
from d2lora.progress import Progress

_ROOM = 256  # tokens of an answer where a task does not say, as the harness has it for other models
_GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}  # with do_sample false


@dataclass(frozen=True)
class InVllm:
    """The engine for an adapter, or the base (None), in a session that has it loaded.

    The same benchmark is asked of the adapters in `together` in one call: their own evaluations then have its answers.
    """

    base: Base
    session: Session
    key: Key
    together: Sequence[Key] = ()

    def evaluate(self, questions: Questions, batch: int, progress: Progress, limit: int | None = None) -> Evaluation:
        """Generate and score answers, as `Engine` defines it; vLLM makes its own batches.

        sessions.Gone or sessions.Unable if they are to be evaluated in memory.
        """
        test = harness.as_test(questions, self.base, limit)
        metrics, items = harness.scored(SessionLM(self, test.chat, progress), test)
        return Evaluation(metrics, items, self.session.sequences)


class Prompt(NamedTuple):
    """A request to generate: the prompt's ids, the most tokens of its answer, and the texts that end it."""

    ids: Tokens
    room: int
    until: list[str]


class SessionLM(AsTrained, TemplateLM):
    """A model for the harness that a session answers for, with prompts and answers as in training."""

    def __init__(self, engine: InVllm, chat: bool, progress: Progress) -> None:
        super().__init__()
        self.engine, self.tokenizer = engine, engine.base.tokenizer
        self.max_length = resolve_max_length(engine.base.model.config, self.tokenizer)
        self.begin(engine.base, chat, progress)

    @property
    def eot_token_id(self) -> int:
        """Return the tokenizer's EOS."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Return what stands before a text without a context: the BOS, or the EOS if there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Return the tokenizer's name, by which the harness caches requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Tokens:
        """Encode as in training; with `add_special_tokens` said, as the tokenizer does."""
        if add_special_tokens is None:
            return super().tok_encode(string)
        ids: Tokens = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render the prompt as in training. Unable where the task itself begins the answer."""
        if not add_generation_prompt:
            raise Unable("the task begins the answers itself")
        return super().apply_chat_template(chat_history, add_generation_prompt)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generate answers to prompts. Unable if they are to be sampled."""
        self.requests += len(requests)
        prompts = [self._prompt(*request.args) for request in requests]
        wanted = [{"ids": prompt.ids, "max_tokens": prompt.room} for prompt in prompts]
        replies = self._replies("generate", wanted, ends=self.end_ids)
        return [
            self._text(request, prompt, reply["ids"])
            for request, prompt, reply in zip(requests, prompts, replies, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Raise Unable: texts that are longer than the model takes are scored in memory."""
        raise Unable("the task scores whole texts")

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], Tokens, Tokens]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = [(context + answer, len(context)) for _, context, answer in requests]
        self.fits(max((len(ids) for ids, _ in texts), default=0), self.max_length + 1, self.max_length)
        replies = self._replies("loglikelihood", [{"ids": ids, "start": start} for ids, start in texts])
        return [(sum(reply["logprobs"]), reply["greedy"]) for reply in replies]

    def _replies(self, do: str, requests: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
        engine = self.engine
        return engine.session.answers(do, engine.key, engine.together, requests, lambda: self.count(1), **more)

    def _prompt(self, text: str, settings: dict[str, Any]) -> Prompt:
        """Return what to ask for, as the harness's own model classes read a task's settings."""
        kwargs = normalize_gen_kwargs(settings, _ROOM)
        if kwargs["do_sample"] or (unknown := sorted(kwargs.keys() - _GREEDY)):
            raise Unable("the task samples answers" if kwargs["do_sample"] else f"the task sets {', '.join(unknown)}")
        ids, room = self.tok_encode(text), kwargs["max_gen_toks"]
        self.fits(len(ids), self.max_length - room, self.max_length)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        return Prompt(ids, room, handle_stop_sequences(kwargs["until"], eos=eos))

    def _text(self, request: Instance, prompt: Prompt, answer: Tokens) -> str:
        """Return the text of a generated answer, and note whether it was cut."""
        stop = [text for text in prompt.until if text not in self.ends]
        self.cache_hook.next.append(self.was_cut(answer, prompt.room, stop))
        text = postprocess_generated_text(self.tok_decode(answer), prompt.until, think_end_token=None)
        self.cache_hook.add_partial("generate_until", request.args, text)
        return str(text)
