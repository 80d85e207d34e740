"""Define the two types of benchmark kinds. Each kind is an instance in a file of its own; `d2lora.scoring.KINDS` lists
them.

Nothing here may import rows or settings, because the settings take each kind's facts from here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Generated:
    """A kind whose answers the model generates.

    Where an item has several golds, the best value of each metric over them counts.
    """

    name: str  # the value of `kind` in a benchmark's file
    metrics: tuple[str, ...]  # as records have them; a report shows the first
    compare: Callable[[str, str], dict[str, float]]  # answer, gold -> a value for each metric
    problem: Callable[[str], str | None]  # why nothing can be compared with this gold, or None; {} is the gold
    family: str = ""  # prefix of metrics that a report shows all together; without one it shows the first metric only
    right_or_wrong: bool = True  # whether the first metric is 1 or 0 of each item
    needs: ClassVar[tuple[str, ...]] = ()  # optional fields of a benchmark that this kind requires
    generates: ClassVar[bool] = True

    def score(self, answer: str, golds: Sequence[str]) -> dict[str, float]:
        """Compare an answer with each gold (at least one) and return the best value of each metric."""
        compared = [self.compare(answer, gold) for gold in golds]
        return {metric: max(values[metric] for values in compared) for metric in self.metrics}


@dataclass(frozen=True)
class MultipleChoice:
    """A kind whose items offer choices; the model's answer is the likeliest one. The engine computes the metrics."""

    name: str
    metrics: tuple[str, ...]
    family: str = ""
    right_or_wrong: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("choices",)
    generates: ClassVar[bool] = False


Kind = Generated | MultipleChoice
