"""Run benchmarks through lm-evaluation-harness on a model in memory, and keep the result of every item."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_harness

from d2lora.base import Base
from d2lora.evaluate.engine import Evaluation, Item, Questions, Score, counts
from d2lora.evaluate.lm import WatchedLM
from d2lora.evaluate.task import harness_task, quiet, scores_solutions, task_of
from d2lora.layouts import proof
from d2lora.progress import Progress
from d2lora.scoring.likelihood import LIKELIHOOD

__all__ = ["InMemory", "Questions", "counts", "evaluate", "task_of"]


@dataclass(frozen=True)
class InMemory:
    """The engine for a model in memory: the base, or `model`, which is the base with an adapter."""

    base: Base
    model: torch.nn.Module
    proofs: proof.Memory

    def evaluate(self, questions: Questions, batch: int, progress: Progress, limit: int | None = None) -> Evaluation:
        """Generate and score answers, as `Engine` defines it."""
        template = self.base.tokenizer.chat_template is not None
        task: str | ConfigurableTask = questions.name
        chat = False
        if benchmark := questions.benchmark:
            task = task_of(questions.name, benchmark, questions.rows, template)
            chat = benchmark.chat and template
        return evaluate(self.base, self.model, task, chat, batch, progress, self.proofs, limit)


def evaluate(
    base: Base,
    model: torch.nn.Module,
    task: str | ConfigurableTask,
    chat: bool,
    batch: int,
    progress: Progress,
    proofs: proof.Memory,
    limit: int | None = None,
) -> Evaluation:
    """Ask a task's items (the first `limit`) and score them; those `cut` at max_new_tokens are marked so.

    The batch becomes 1 where texts in a padded batch do not get what each gets alone. RuntimeError if there are no items.
    """
    name = task if isinstance(task, str) else str(task.config.task)
    own = not isinstance(task, str)
    task = harness_task(task) if isinstance(task, str) else task
    with quiet():
        lm = WatchedLM(base, model, chat, batch, progress, proofs)
        lm.solutions = own and scores_solutions(task)
        options = {"bootstrap_iters": 0, "log_samples": True, "apply_chat_template": chat, "verbosity": "ERROR"}
        result = run_harness(lm=lm, task_dict={name: task}, limit=limit, **options)
    samples = _samples(result["samples"][name], name)
    metrics = _metrics(samples, name)
    items = [_item(sample, metrics, lm.cut) for sample in samples]
    return Evaluation({m: _score([float(s[m]) for s in samples]) for m in metrics}, items, lm.batch_size)


def _samples(logged: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return one sample for each item, in order. If a task reads answers with several filters, the first one counts."""
    if not logged:
        raise RuntimeError(f"benchmark {name}: the evaluation gave no items")
    first = logged[0]["filter"]
    return sorted((sample for sample in logged if sample["filter"] == first), key=lambda sample: sample["doc_id"])


def _metrics(samples: list[dict[str, Any]], name: str) -> list[str]:
    """Return the metrics that have a number for each item; a perplexity, for example, has not."""
    listed = samples[0].get("metrics", [])
    metrics = [m for m in listed if all(isinstance(sample.get(m), int | float) for sample in samples)]
    if not metrics:
        raise RuntimeError(f"benchmark {name}: no metric has a number for each item")
    return metrics


def _score(values: Sequence[float]) -> Score:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1) if len(values) > 1 else 0.0
    return {"value": mean, "stderr": math.sqrt(variance / len(values)), "items": len(values)}


def _item(sample: dict[str, Any], metrics: list[str], cut: set[str]) -> Item:
    """Return an item for items.jsonl: prompt, answer (of choices, the text of the likeliest), gold and scores."""
    requests = list(sample["arguments"])
    prompt = requests[0][0]
    answer = _choices(sample) if len(requests) > 1 else _answer(sample)
    scores = {metric: sample[metric] for metric in metrics}
    return {"index": sample["doc_id"], "prompt": prompt, **answer, **scores, **({"cut": True} if prompt in cut else {})}


def _answer(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the answer and the gold; no answer where only the gold's likelihood was asked for."""
    answer = None if LIKELIHOOD.metrics[0] in sample["metrics"] else sample["filtered_resps"][0]
    return {"answer": answer, "gold": sample["target"]}


def _choices(sample: dict[str, Any]) -> dict[str, Any]:
    likelihoods = [float(r[0]) if isinstance(r, list | tuple) else float(r) for r in sample["filtered_resps"]]
    best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
    texts, target = [request[1].strip() for request in sample["arguments"]], sample["target"]
    return {
        "answer": texts[best],
        "gold": texts[target] if isinstance(target, int) else target,
        "loglikelihoods": likelihoods,
        "choices": texts,
    }
