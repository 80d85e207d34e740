"""Make tasks for lm-evaluation-harness: of our benchmarks, or those that it brings."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from d2lora import data
from d2lora.data.files import Row
from d2lora.data.texts import fill
from d2lora.scoring import Generated, Likelihood
from d2lora.settings import Benchmark

_FEWSHOT_SEED = 1234  # lm-evaluation-harness's default


def task_of(name: str, benchmark: Benchmark, rows: Sequence[Row], template: bool) -> ConfigurableTask:
    """Make the harness's task of a benchmark file and its rows. UserError if a row can't be evaluated or scored.

    Where the base has no chat `template`, the prompt of a chat ends in a newline, as data.rendered_prompt writes it in
    training.
    """
    rows = rows[: benchmark.limit]
    data.check_items(benchmark, rows)
    end = "\n" if benchmark.chat and not template else ""
    kind = benchmark.scoring
    config = {
        "task": name,
        # The data set holds row numbers only: Arrow refuses columns with values of several types, and turns 1 into 1.0.
        "custom_dataset": lambda **_: {"test": Dataset.from_list([{"row": i} for i in range(len(rows))])},
        "test_split": "test",
        "doc_to_text": lambda doc: fill(benchmark.prompt, rows[doc["row"]]) + end,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in kind.metrics],
        "num_fewshot": 0,
    }
    if isinstance(kind, Generated):
        config |= _generation(benchmark, kind, rows)
    else:
        config |= _solutions(benchmark, kind, rows) if isinstance(kind, Likelihood) else _choices(benchmark, rows)
    with quiet():
        return ConfigurableTask(config=config)


def _choices(benchmark: Benchmark, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": lambda doc: data.choices(benchmark, rows[doc["row"]]),
        "doc_to_target": lambda doc: data.right_choice(benchmark, rows[doc["row"]]),
    }


def _generation(benchmark: Benchmark, kind: Generated, rows: Sequence[Row]) -> dict[str, Any]:
    golds = [data.golds(benchmark, row) for row in rows]
    return {
        "output_type": "generate_until",
        "doc_to_target": lambda doc: " | ".join(golds[doc["row"]]),
        "process_results": lambda doc, results: kind.score(results[0], golds[doc["row"]]),
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": benchmark.max_new_tokens},
    }


def _solutions(benchmark: Benchmark, kind: Likelihood, rows: Sequence[Row]) -> dict[str, Any]:
    texts = [kind.solution(data.golds(benchmark, row)[0]) for row in rows]
    return {
        "output_type": "loglikelihood",
        "doc_to_target": lambda doc: texts[doc["row"]],
        "process_results": lambda doc, results: kind.score(results[0][0], texts[doc["row"]]),
    }


def scores_solutions(task: ConfigurableTask) -> bool:
    """Tell whether a task asks for the likelihood of solutions, behind prompts as training has them."""
    return task.OUTPUT_TYPE == "loglikelihood"


def harness_task(name: str) -> ConfigurableTask:
    """Load the harness's own task of this name."""
    from lm_eval.tasks import get_task_dict

    task = get_task_dict([name], data.harness())[name]
    task.set_fewshot_seed(_FEWSHOT_SEED)  # the harness sets it only in simple_evaluate, which we do not use
    return task


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the harness's log inside the `with` block: our records have what matters of it."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
