"""What an evaluation is, whoever does it. An engine is a file of its own beside this one: `harness.py` has a model in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypedDict

from d2lora.data.files import Row
from d2lora.progress import Progress
from d2lora.settings import Benchmark

Item = dict[
    str, Any
]  # a line of items.jsonl: index, prompt, answer, gold, a value for each metric; of choices all of them


class Score(TypedDict):
    """A metric of an evaluation, as its record has it."""

    value: float  # the mean over items
    stderr: float  # its standard error: the sample standard deviation over the root of the number of items
    items: int


class Evaluation(NamedTuple):
    """What one benchmark gave: each metric, each item in the order of the rows, and the batch they were asked in."""

    metrics: dict[str, Score]
    items: list[Item]
    batch: int


@dataclass(frozen=True)
class Questions:
    """A benchmark and its rows; without a `benchmark` it is lm-evaluation-harness's own task of that name."""

    name: str
    benchmark: Benchmark | None = None
    rows: Sequence[Row] = ()


class Engine(Protocol):
    """What answers questions and scores the answers."""

    def evaluate(self, questions: Questions, batch: int, progress: Progress, limit: int | None = None) -> Evaluation:
        """Ask all items, or the first `limit`, up to `batch` at a time.

        torch.OutOfMemoryError where that many do not fit: the caller asks again with a smaller batch.
        """
        ...


def counts(items: Sequence[Item]) -> dict[str, int]:
    """Count the answers cut at max_new_tokens, and the empty ones; nothing where none were generated."""
    generated = [item for item in items if "choices" not in item and isinstance(item["answer"], str)]
    if not generated:
        return {}
    return {
        "cut": sum(item.get("cut", False) for item in items),
        "empty": sum(not item["answer"].strip() for item in generated),
    }
