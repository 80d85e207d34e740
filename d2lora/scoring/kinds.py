"""Define the types of benchmark kinds. Each kind is an instance in a file of its own; `d2lora.scoring.KINDS` lists
them.

Nothing here may import rows or settings, because the settings take each kind's facts from here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Unit:
    """The unit of 100 times a metric, which is what a report shows, and of a difference of it by one."""

    name: str
    one: str
    several: str
    digits: int  # of detectable differences and of intervals' ends

    def text(self, amount: float) -> str:
        """Return an amount with the unit of differences: 1 point, 1.5 points."""
        return f"{amount:g} {self.one if amount == 1 else self.several}"

    def rounded(self, amount: float) -> str:
        """Return a measured amount with the unit: 1.9 points, 0.23 hundredths of a bit."""
        return f"{amount:.{self.digits}f} {self.several}"


PERCENT = Unit("%", "point", "points", 1)
BITS = Unit("hundredths of a bit", "hundredth of a bit", "hundredths of a bit", 2)


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
    unit: ClassVar[Unit] = PERCENT

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
    unit: ClassVar[Unit] = PERCENT


@dataclass(frozen=True)
class Likelihood:
    """A kind that asks for no answer: it scores a reference solution by the likelihood that the model gives it."""

    name: str
    metrics: tuple[str, ...]
    solution: Callable[[str], str]  # gold -> the text that is scored
    score: Callable[[float, str], dict[str, float]]  # its log-likelihood in nats, the text -> a value for each metric
    problem: Callable[[str], str | None]
    family: str = ""
    right_or_wrong: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    generates: ClassVar[bool] = False
    unit: ClassVar[Unit] = BITS


Kind = Generated | MultipleChoice | Likelihood
