"""Define what an evaluation is, whichever engine does it. Each engine is a file beside this one: `harness.py` runs a
model in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypedDict

from d2lora.data.files import Row
from d2lora.progress import Progress
from d2lora.settings import Benchmark, HarnessTask

# A line of items.jsonl: index, prompt, answer, gold, a value for each metric; for choices also all choices.
Item = dict[str, Any]


class Score(TypedDict):
    """A metric of an evaluation, as its record has it."""

    value: float  # the mean over items
    stderr: float  # its standard error: the sample standard deviation over the root of the number of items
    items: int


class Evaluation(NamedTuple):
    """The result of one benchmark: its metrics, its items in the order of the rows, and the batch size that was used."""

    metrics: dict[str, Score]
    items: list[Item]
    batch: int


@dataclass(frozen=True)
class Questions:
    """A benchmark and its rows, or `harness`: a task of lm-evaluation-harness, or of the user's `folder` of such tasks."""

    name: str
    benchmark: Benchmark | None = None
    rows: Sequence[Row] = ()
    harness: HarnessTask | None = None
    folder: str | None = None


class Engine(Protocol):
    """A way to generate and score the answers to a benchmark."""

    def evaluate(self, questions: Questions, batch: int, progress: Progress, limit: int | None = None) -> Evaluation:
        """Evaluate all items, or the first `limit`, with up to `batch` in one pass.

        Raise torch.OutOfMemoryError if that batch does not fit: the caller tries a smaller one.
        """
        ...


def counts(items: Sequence[Item]) -> dict[str, int]:
    """Count the answers that were cut at max_new_tokens, and the empty ones. Return {} if none were generated."""
    generated = [item for item in items if "choices" not in item and isinstance(item["answer"], str)]
    if not generated:
        return {}
    return {
        "cut": sum(item.get("cut", False) for item in items),
        "empty": sum(not item["answer"].strip() for item in generated),
    }
