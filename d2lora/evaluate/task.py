"""Make tasks for lm-evaluation-harness: of our benchmarks, or those that it brings."""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from d2lora import data
from d2lora.data.conversations import Message
from d2lora.data.files import Row
from d2lora.errors import UserError
from d2lora.scoring import Generated, Likelihood
from d2lora.settings import Benchmark, HarnessTask

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
    prompts = [data.item_prompt(benchmark, row) for row in rows]
    config = {
        "task": name,
        # The data set holds row numbers only: Arrow refuses columns with values of several types, and turns 1 into 1.0.
        "custom_dataset": lambda **_: {"test": Dataset.from_list([{"row": i} for i in range(len(rows))])},
        "test_split": "test",
        "doc_to_text": lambda doc: _last_text(prompts[doc["row"]]) + end,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in kind.metrics],
        "num_fewshot": 0,
    }
    if isinstance(kind, Generated):
        config |= _generation(benchmark, kind, rows)
    else:
        config |= _solutions(benchmark, kind, rows) if isinstance(kind, Likelihood) else _choices(benchmark, rows)
    with data.quiet():
        return _Conversations(prompts, config)


class _Conversations(ConfigurableTask):
    """The harness's task with prompts that may be conversations; its own are one user's turn."""

    def __init__(self, prompts: Sequence[str | list[Message]], config: dict[str, Any]) -> None:
        self.prompts = prompts
        super().__init__(config=config)

    def fewshot_context(
        self, doc: dict[str, Any], *args: Any, chat_template: Callable[..., str] | None = None, **more: Any
    ) -> str | list[str]:
        """Return an item's prompt, rendered with the chat template."""
        prompt = self.prompts[doc["row"]]
        if isinstance(prompt, str):
            return super().fewshot_context(doc, *args, chat_template=chat_template, **more)
        if chat_template is None:
            raise UserError("a prompt of several turns needs a model with a chat template")
        return chat_template(prompt)


def _last_text(prompt: str | list[Message]) -> str:
    """Return a prompt, or what the last turn of a conversation says: the harness wants a text of each item."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"] or ""


def _choices(benchmark: Benchmark, rows: Sequence[Row]) -> dict[str, Any]:
    choices = [data.choices(benchmark, row) for row in rows]  # the harness asks for both several times an item
    right = [data.right_choice(benchmark, row) for row in rows]
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": lambda doc: choices[doc["row"]],
        "doc_to_target": lambda doc: right[doc["row"]],
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
    """Tell whether a task is a benchmark of ours that scores solutions, behind prompts as training has them."""
    return isinstance(task, _Conversations) and task.OUTPUT_TYPE == "loglikelihood"


def harness_task(settings: HarnessTask, folder: str | None = None) -> ConfigurableTask:
    """Load a task of the harness, or of the user's `folder`, with the number of examples that the settings ask for."""
    task = data.load_harness_task(settings.name, folder)
    task.set_fewshot_seed(_FEWSHOT_SEED)  # the harness sets it only in simple_evaluate, which we do not use
    if settings.fewshot is not None:
        task.set_config(key="num_fewshot", value=settings.fewshot)
    return task
