"""The two shapes that a benchmark kind can have. Each kind is one of them, in a file of its own; `d2lora.scoring.KINDS` lists them.

Nothing here reads rows or settings: the settings take a kind's facts from here, so it must not import them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Generated:
    """A kind whose answers the model writes. An item may have several golds: each metric's best over them counts."""

    name: str  # the value of `kind` in a benchmark's file
    metrics: tuple[str, ...]  # as records have them; a report shows the first
    compare: Callable[[str, str], dict[str, float]]  # answer, gold -> a value for each metric
    problem: Callable[[str], str | None]  # why a gold that is not blank can't be compared with; {} stands for the gold
    family: str = ""  # what metrics that a report shows all, and not the first only, begin with
    needs: ClassVar[tuple[str, ...]] = ()  # fields of a benchmark that are optional and that this kind can't do without
    generates: ClassVar[bool] = True

    def score(self, answer: str, golds: Sequence[str]) -> dict[str, float]:
        """Compare an answer with each gold (one at least) and return the best value of each metric."""
        compared = [self.compare(answer, gold) for gold in golds]
        return {metric: max(values[metric] for values in compared) for metric in self.metrics}


@dataclass(frozen=True)
class MultipleChoice:
    """A kind whose answers are given: the model's is the likeliest of the item's choices. The engine computes the metrics."""

    name: str
    metrics: tuple[str, ...]
    family: str = ""
    needs: ClassVar[tuple[str, ...]] = ("choices", "labels")
    generates: ClassVar[bool] = False


Kind = Generated | MultipleChoice
