"""Run benchmarks through lm-evaluation-harness, and keep the result of every item."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_harness

from d2lora import data
from d2lora.base import Base
from d2lora.errors import UserError
from d2lora.evaluate.engine import Evaluation, Item, Questions, Score, counts
from d2lora.evaluate.lm import WatchedLM
from d2lora.evaluate.prompts import AsTrained
from d2lora.evaluate.task import harness_task, scores_solutions, task_of
from d2lora.layouts import proof
from d2lora.progress import Progress
from d2lora.scoring.likelihood import LIKELIHOOD
from d2lora.settings import HarnessTask

__all__ = ["InMemory", "Questions", "Test", "counts", "evaluate", "task_of"]


@dataclass(frozen=True)
class InMemory:
    """The engine for a model in memory: the base, or `model`, which is the base with an adapter."""

    base: Base
    model: torch.nn.Module
    proofs: proof.Memory

    def evaluate(self, questions: Questions, batch: int, progress: Progress, limit: int | None = None) -> Evaluation:
        """Generate and score answers, as `Engine` defines it."""
        return evaluate(self.base, self.model, as_test(questions, self.base, limit), batch, progress, self.proofs)


class Test(NamedTuple):
    """The harness's task of a benchmark, and how it is asked and read."""

    task: ConfigurableTask
    chat: bool = False  # prompts are rendered as conversations, with examples as turns of their own
    limit: int | None = None  # the first items only
    filter_name: str | None = None  # which counts, of a task that reads answers with several; None: its first


def as_test(questions: Questions, base: Base, limit: int | None = None) -> Test:
    """Return the test that a benchmark is of a base; `limit` is the caller's, beside one of the task's settings.

    UserError for a task that is to be asked in the chat template of a base that has none.
    """
    template = base.tokenizer.chat_template is not None
    if benchmark := questions.benchmark:
        task = task_of(questions.name, benchmark, questions.rows, template)
        return Test(task, benchmark.chat and template, limit)
    wanted = questions.harness or HarnessTask(name=questions.name)
    if wanted.chat and not template:
        raise UserError(f"task.lm_eval={wanted.name}: chat=true: the base has no chat template")
    task = harness_task(wanted, questions.folder)
    first = min((each for each in (limit, wanted.limit) if each is not None), default=None)
    return Test(task, wanted.chat, first, wanted.filter)


def evaluate(
    base: Base, model: torch.nn.Module, test: Test, batch: int, progress: Progress, proofs: proof.Memory
) -> Evaluation:
    """Ask a test's items and score them; those `cut` at max_new_tokens are marked so.

    The batch becomes 1 where texts in a padded batch do not get what each gets alone. RuntimeError if there are no items.
    """
    with data.quiet():  # it warns of what it can't do, and is not asked for
        lm = WatchedLM(base, model, test.chat, batch, progress, proofs)
    metrics, items = scored(lm, test)
    return Evaluation(metrics, items, lm.batch_size)


def scored(lm: AsTrained, test: Test) -> tuple[dict[str, Score], list[Item]]:
    """Have a model of the harness answer a test's items, and return their scores and the items."""
    name, lm.solutions = str(test.task.config.task), scores_solutions(test.task)
    options = {"bootstrap_iters": 0, "log_samples": True, "verbosity": "ERROR"}
    options |= {"apply_chat_template": test.chat, "fewshot_as_multiturn": test.chat}
    with data.quiet():
        result = run_harness(lm=lm, task_dict={name: test.task}, limit=test.limit, **options)
    samples = _samples(result["samples"][name], name, test.filter_name)
    metrics = _metrics(samples, name)
    items = [_item(sample, metrics, lm.cut) for sample in samples]
    _tell_unread(name, items)
    return {m: _score([float(s[m]) for s in samples]) for m in metrics}, items


def _tell_unread(name: str, items: Sequence[Item]) -> None:
    """Print for how many answers the task's filter left neither letter nor digit.

    gsm8k's flexible-extract, for example, reads "$\\boxed{18}$." as "$.", and scores it as wrong.
    """
    read = [str(item["answer"]) for item in items if "raw" in item]
    marks = [answer for answer in read if answer and not any(map(str.isalnum, answer))]
    if marks:
        text = f"{name}: of {len(marks)} of {len(items)} answers the filter read marks only, such as {marks[0]!r}"
        print(f"{text}: scored as they are read (docs/running.md)", file=sys.stderr)


def _samples(logged: list[dict[str, Any]], name: str, filter_name: str | None) -> list[dict[str, Any]]:
    """Return one sample for each item, in order: those of one filter, where a task reads answers with several."""
    if not logged:
        raise RuntimeError(f"benchmark {name}: the evaluation gave no items")
    counts = filter_name or logged[0]["filter"]
    return sorted((sample for sample in logged if sample["filter"] == counts), key=lambda sample: sample["doc_id"])


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
    """Return an answer as a filter read it, and, where that is another text, as the model gave it.

    There is no answer where only the gold's likelihood was asked for.
    """
    if LIKELIHOOD.metrics[0] in sample["metrics"]:
        return {"answer": None, "gold": sample["target"]}
    answer, raw = sample["filtered_resps"][0], sample["resps"][0][0]
    return {"answer": answer, "gold": sample["target"], **({"raw": raw} if raw != answer else {})}


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
