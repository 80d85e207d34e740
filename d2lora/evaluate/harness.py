"""Benchmarks through lm-evaluation-harness, on the model in memory. Every item is kept."""

import contextlib
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as harness
from lm_eval.models.huggingface import HFLM

from d2lora import data
from d2lora.base import Base, device
from d2lora.data.texts import fill
from d2lora.errors import UserError
from d2lora.layouts import proof
from d2lora.scoring import answers
from d2lora.settings import Benchmark

_FEWSHOT_SEED = 1234  # lm-evaluation-harness's default

METRICS = {
    "number": ["accuracy"],
    "exact": ["accuracy"],
    "rouge": ["rouge1", "rouge2", "rougeL", "rougeLsum"],
    "choice": ["acc", "acc_norm"],
}


def evaluate(
    base: Base,
    model: torch.nn.Module,
    task: "str | ConfigurableTask",
    chat: bool,
    batch: int,
    progress: Callable[[int, int], None],
    proofs: proof.Memory,
    limit: int | None = None,
) -> tuple[dict, list[dict], int]:
    """Metrics {name: {value, stderr, items}}, the items of one benchmark (the first `limit`), those `cut` at max_new_tokens marked so, and the batch.

    That is 1 where texts in a padded batch do not get what each gets alone. RuntimeError if there are no items. `stderr` is the standard error of the mean over items (sample standard deviation over the root of their number).
    """
    name, tasks = _named(task)
    with _quiet():
        # A bfloat16 model's likelihoods in bfloat16 would tie where they should not.
        kind = {"batch_size": batch, "device": device(), "softmax_dtype": "float32"}
        lm = _Watched(progress, chat, base, proofs, pretrained=model, tokenizer=base.tokenizer, **kind)
        how = {"bootstrap_iters": 0, "log_samples": True, "apply_chat_template": chat, "verbosity": "ERROR"}
        result = harness(lm=lm, task_dict=tasks, limit=limit, **how)
    logged = result["samples"][name]
    if not logged:
        raise RuntimeError(f"benchmark {name}: the evaluation gave no items")
    # A task may read each answer in several ways ("filters"): its first one counts, so that an item is one item.
    samples = sorted((s for s in logged if s["filter"] == logged[0]["filter"]), key=lambda s: s["doc_id"])
    metrics = [m for m in samples[0].get("metrics", []) if all(isinstance(s.get(m), int | float) for s in samples)]
    if not metrics:
        raise RuntimeError(f"benchmark {name}: no metric has a number for each item")
    items = [_item(s, metrics) for s in samples]
    for item, sample in zip(items, samples, strict=True):
        if sample["arguments"][0][0] in lm.cut:
            item["cut"] = True
    return {m: _summary([float(s[m]) for s in samples]) for m in metrics}, items, lm.batch_size


def _named(task: "str | ConfigurableTask") -> tuple[str, dict]:
    if not isinstance(task, str):
        return str(task.config.task), {str(task.config.task): task}
    from lm_eval.tasks import get_task_dict

    found = get_task_dict([task], data.harness())
    found[task].set_fewshot_seed(_FEWSHOT_SEED)  # the harness does so only at its own front door
    return task, found


def _summary(values: list[float]) -> dict:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1) if len(values) > 1 else 0.0
    return {"value": mean, "stderr": math.sqrt(variance / len(values)), "items": len(values)}


def _item(sample: dict, metrics: list[str]) -> dict:
    """What is kept of an item: its prompt, the answer (a choice's text for choices), the gold and the scores."""
    requests = list(sample["arguments"])
    scores = {m: sample[m] for m in metrics}
    if len(requests) > 1:
        likelihoods = [float(r[0]) if isinstance(r, list | tuple) else float(r) for r in sample["filtered_resps"]]
        best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
        texts, target = [request[1].strip() for request in requests], sample["target"]
        given = {
            "answer": texts[best],
            "gold": texts[target] if isinstance(target, int) else target,
            "loglikelihoods": likelihoods,
            "choices": texts,
        }
    else:
        given = {"answer": sample["filtered_resps"][0], "gold": sample["target"]}
    return {"index": sample["doc_id"], "prompt": requests[0][0], **given, **scores}


def counts(items: list[dict]) -> dict[str, int]:
    """How many answers were cut at max_new_tokens, and how many are empty; nothing where none were generated."""
    generated = [item for item in items if "choices" not in item and isinstance(item["answer"], str)]
    if not generated:
        return {}
    return {
        "cut": sum(item.get("cut", False) for item in items),
        "empty": sum(not i["answer"].strip() for i in generated),
    }


def task_of(name: str, benchmark: Benchmark, rows: list[dict], template: bool) -> ConfigurableTask:
    """The harness's task of one of our benchmark files, over the rows that data.py read.

    For a base without a chat `template` a chat's prompt ends in a newline, as data.rendered_prompt has it in training.
    """
    rows = rows[: benchmark.limit]
    data.check_items(benchmark, rows)
    end = "\n" if benchmark.chat and not template else ""
    config = {
        "task": name,
        # Numbers of rows only: a table would refuse columns whose values differ in type, and turn 1 into 1.0.
        "custom_dataset": lambda **_: {"test": Dataset.from_list([{"row": i} for i in range(len(rows))])},
        "test_split": "test",
        "doc_to_text": lambda doc: fill(benchmark.prompt, rows[doc["row"]]) + end,
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS[benchmark.kind]
        ],
        "num_fewshot": 0,
    }
    config |= _choice(benchmark, rows) if benchmark.kind == "choice" else _generation(benchmark, rows)
    with _quiet():
        return ConfigurableTask(config=config)


def _choice(benchmark: Benchmark, rows: list[dict]) -> dict:
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": lambda doc: data.choices(benchmark, rows[doc["row"]]),
        "doc_to_target": lambda doc: data.right(benchmark, rows[doc["row"]]),
    }


def _generation(benchmark: Benchmark, rows: list[dict]) -> dict:
    golds = [data.golds(benchmark, row) for row in rows]
    return {
        "output_type": "generate_until",
        "doc_to_target": lambda doc: " | ".join(golds[doc["row"]]),
        "process_results": lambda doc, results: _best(_SCORES[benchmark.kind], results[0], golds[doc["row"]]),
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": benchmark.max_new_tokens},
    }


def _best(score: Callable[[str, str], dict], answer: str, golds: list[str]) -> dict:
    """Each metric's best over the golds."""
    found = [score(answer, gold) for gold in golds]
    return {metric: max(one[metric] for one in found) for metric in found[0]}


_SCORES: dict[str, Callable[[str, str], dict]] = {
    "number": lambda answer, gold: {"accuracy": float(answers.same_number(answer, gold))},
    "exact": lambda answer, gold: {"accuracy": float(answers.same_text(answer, gold))},
    "rouge": answers.rouge,
}


class _Cuts:
    """Stands where the harness's cache would be told of each answer, in the order of generation, and notes the prompts of cut ones."""

    def __init__(self, cut: set[str]) -> None:
        self.cut, self.next = cut, []  # type: ignore[var-annotated]

    def add_partial(self, kind: str, request: tuple, answer: object) -> None:
        if kind == "generate_until" and self.next.pop(0):
            self.cut.add(request[0])


class _Watched(HFLM):
    """The harness's model, telling how many of its requests are through.

    It would cut prompts that are too long: this refuses them. It would pad whatever the model: this asks one by one where padding
    is not exact.
    """

    def __init__(
        self, progress: Callable[[int, int], None], chat: bool, base: Base, proofs: proof.Memory, **kwargs
    ) -> None:
        self.progress, self.requests, self.through = progress, 0, 0
        self.base, self.proofs = base, proofs
        super().__init__(**kwargs)
        ends = self.model.generation_config.eos_token_id
        self.end_ids = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
        self.ends = {self.tok_decode(end, skip_special_tokens=False) for end in self.end_ids}
        self.cut: set[str] = set()  # prompts whose answer ended at max_new_tokens only
        self.cache_hook = _Cuts(self.cut)
        self.opening = data.shape(self.tokenizer).opening if chat else ""
        self.before = data.opens(self.tokenizer) if chat else []

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The prompt as training has it. The harness would leave out a system turn that a template refuses."""
        if not add_generation_prompt:
            return super().apply_chat_template(chat_history, add_generation_prompt)
        return data.rendered_prompt(self.tokenizer, chat_history)

    def tok_encode(self, string, add_special_tokens=None, left_truncate_len=None, **kwargs):
        """Ids with one BOS, as in training; the harness leaves it to the tokenizer, and to a batch's first prompt."""
        if add_special_tokens is None and not left_truncate_len and not kwargs:
            return data.encode(self.tokenizer, string)
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)

    def tok_decode(self, tokens, skip_special_tokens=True):
        """The answer in generated ids: behind thoughts and what opens it, up to its end, whether or not that is a special token."""
        if skip_special_tokens and isinstance(tokens, list):
            tokens = tokens[: next((i for i, token in enumerate(tokens) if token in self.end_ids), None)]
            start = max((i + 1 for i, token in enumerate(tokens) if token in self.before), default=0)
            text = super().tok_decode(tokens[start:])
            return text.lstrip() if start else text
        return super().tok_decode(tokens, skip_special_tokens=skip_special_tokens)

    def generate_until(self, requests, disable_tqdm=True):
        self.requests += len(requests)
        texts = sorted((r.args[0] for r in requests), key=len)
        self._prove([self.tok_encode(text) for text in {*texts[:2], *texts[-2:]}], "left")
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood(self, requests, disable_tqdm=True):
        self.requests += len(requests)
        if self.opening:
            given = ((r, *r.arguments) for r in requests)
            requests = [replace(r, arguments=(prompt, self.opening + answer)) for r, prompt, answer in given]
        return super().loglikelihood(requests, disable_tqdm=True)

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        encoded = [data.encode(self.tokenizer, string) for string in strings]
        padded = self.tokenizer.pad({"input_ids": encoded}, padding_side=padding_side, return_tensors="pt")
        ids, mask = padded["input_ids"], padded["attention_mask"]
        if left_truncate_len:
            self._fits(ids.shape[1], left_truncate_len)
        return ids, mask

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        longest = max((len(context) + len(answer) for _, context, answer in requests), default=0)
        self._fits(longest, self.max_length + 1)  # the last token is only predicted
        texts = sorted((context + answer for _, context, answer in requests), key=len)
        self._prove([*texts[:2], *texts[-2:]], "right")
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _prove(self, texts: list[list[int]], side: str) -> None:
        """Go on one by one, with a line, where a batch padded on this side is not exact."""
        if self.batch_size == 1 or not texts:
            return
        shown = proof.batch(self.model, self.base.model, texts, side, self.proofs)
        if not shown.exact:
            self.batch_size_per_gpu = 1
            print(f"{self.base.name}: evaluated one by one ({proof.miss(shown)} in a batch)", file=sys.stderr)

    def _fits(self, tokens: int, room: int) -> None:
        if tokens > room:
            raise UserError(
                f"an item of {tokens} tokens, where {room} fit (the model takes {self.max_length}, max_new_tokens among them): its beginning would be cut"
            )

    def _model_call(self, inps, *args, **kwargs):
        return self._count(len(inps), super()._model_call(inps, *args, **kwargs))

    def _model_generate(self, context, max_length, stop, **kwargs):
        # The model ends at these by itself. The harness would look for their text, and decode each sequence after each token for it.
        stop = [text for text in stop if text not in self.ends]
        found = super()._model_generate(context, max_length, stop, **kwargs)
        self.cache_hook.next += self._cut(found[:, context.shape[1] :], max_length - context.shape[1], stop)
        return self._count(len(context), found)

    def _cut(self, answers: torch.Tensor, room: int, stop: list[str]) -> list[bool]:
        """Of each answer, whether it fills the room without an end token or a text that stops it."""
        if answers.shape[1] < room:
            return [False] * len(answers)
        ended = torch.isin(answers, torch.tensor(self.end_ids, device=answers.device)).any(dim=1).tolist()
        texts = self.tokenizer.batch_decode(answers) if any(stop) else [""] * len(answers)
        return [not done and not any(s and s in text for s in stop) for done, text in zip(ended, texts, strict=True)]

    def _count(self, requests: int, result):
        self.through += requests
        self.progress(min(self.through, self.requests), self.requests)
        return result


@contextlib.contextmanager
def _quiet():
    """The harness logs much about itself: what matters of it is in our records."""
    loggers = [logging.getLogger(n) for n in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
