"""Benchmarks through lm-evaluation-harness, on the model in memory. Every item is kept."""

import contextlib
import logging
import math
from collections.abc import Callable

import torch
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as harness
from lm_eval.models.huggingface import HFLM

from d2lora import answers, data
from d2lora.config import Benchmark
from d2lora.errors import UserError
from d2lora.model import Base, device

_FEWSHOT_SEED = 1234  # lm-evaluation-harness's default

METRICS = {
    "number": ["accuracy"],
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
    limit: int | None = None,
) -> tuple[dict, list[dict]]:
    """Metrics {name: {value, stderr, items}} and the items, or the first `limit`, of one benchmark. RuntimeError if it gives no items.

    `stderr` is the standard error of the mean over items (sample standard deviation over the root of their number).
    """
    name, tasks = _named(task)
    with _quiet():
        # A bfloat16 model's likelihoods in bfloat16 would tie where they should not.
        kind = {"batch_size": batch, "device": device(), "softmax_dtype": "float32"}
        lm = _Watched(progress, pretrained=model, tokenizer=base.tokenizer, **kind)
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
    return {m: _summary([float(s[m]) for s in samples]) for m in metrics}, [_item(s, metrics) for s in samples]


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


def task_of(name: str, benchmark: Benchmark, rows: list[dict], template: bool) -> ConfigurableTask:
    """The harness's task of one of our benchmark files, over the rows that data.py read.

    For a base without a chat `template` a chat's prompt ends in a newline, as data.rendered_prompt has it in training.
    """
    rows = rows[: benchmark.limit]
    data.check_items(benchmark, rows)  # an answer without a number would equal a gold answer without one
    end = "\n" if benchmark.chat and not template else ""
    config = {
        "task": name,
        # Numbers of rows only: a table would refuse columns whose values differ in type, and turn 1 into 1.0.
        "custom_dataset": lambda **_: {"test": Dataset.from_list([{"row": i} for i in range(len(rows))])},
        "test_split": "test",
        "doc_to_text": lambda doc: benchmark.prompt.format(**rows[doc["row"]]) + end,
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS[benchmark.kind]
        ],
        "num_fewshot": 0,
    }
    config |= _choice(benchmark, rows) if benchmark.kind == "choice" else _generation(benchmark, rows)
    with _quiet():
        return ConfigurableTask(config=config)


def _choice(benchmark: Benchmark, rows: list[dict]) -> dict:
    def right(doc: dict) -> int:
        row = rows[doc["row"]]
        return data.at(row, benchmark.labels).index(benchmark.gold.format(**row))

    return {
        "output_type": "multiple_choice",
        "doc_to_choice": lambda doc: data.at(rows[doc["row"]], benchmark.choices),
        "doc_to_target": right,
    }


def _generation(benchmark: Benchmark, rows: list[dict]) -> dict:
    def gold(doc: dict) -> str:
        return benchmark.gold.format(**rows[doc["row"]])

    return {
        "output_type": "generate_until",
        "doc_to_target": gold,
        "process_results": lambda doc, results: _SCORES[benchmark.kind](results[0], gold(doc)),
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": benchmark.max_new_tokens},
    }


def _same_number(answer: str, gold: str) -> dict:
    return {"accuracy": float(answers.final_number(answer) == answers.final_number(gold))}


_SCORES: dict[str, Callable[[str, str], dict]] = {"number": _same_number, "rouge": answers.rouge}


class _Watched(HFLM):
    """The harness's model, telling how many of its requests are through. It would cut prompts that are too long; this refuses them."""

    def __init__(self, progress: Callable[[int, int], None], **kwargs) -> None:
        self.progress, self.requests, self.through = progress, 0, 0
        super().__init__(**kwargs)
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {self.tok_decode(end, skip_special_tokens=False) for end in ends if end is not None}

    def generate_until(self, requests, disable_tqdm=True):
        self.requests += len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood(self, requests, disable_tqdm=True):
        self.requests += len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self._fits(ids.shape[1], left_truncate_len)
        return ids, mask

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        longest = max((len(context) + len(answer) for _, context, answer in requests), default=0)
        self._fits(longest, self.max_length + 1)  # the last token is only predicted
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

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
        return self._count(len(context), super()._model_generate(context, max_length, stop, **kwargs))

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
