"""Define the types of benchmark kinds. Each kind is an instance in a file of its own; `d2lora.scoring.KINDS` lists
them.

Nothing here may import rows or settings, because the settings take each kind's facts from here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Unit:
    """The unit of 100 times a metric, which is what a report shows, and how it is rounded. Its methods take fractions.

    `margin`, in the unit, is that within which two arms are called equivalent unless `report.<margin_setting>` says another.
    """

    name: str
    one: str  # of differences
    several: str
    digits: int  # of intervals' ends and detectable differences; values and differences have one more
    margin: float
    margin_setting: str

    def text(self, amount: float) -> str:
        """Return an amount, in the unit, with the unit of differences: 1 point, 1.5 points."""
        return f"{amount:g} {self.one if amount == 1 else self.several}"

    def rounded(self, fraction: float, sign: str = "") -> str:
        """Return a measured size with the unit: 1.9 points, 0.23 hundredths of a bit."""
        return f"{100 * fraction:{sign}.{self.digits}f} {self.several}"

    def value(self, fraction: float | None, sign: str = "") -> str:
        """Return a score, or with sign="+" a difference: 45.93, -51.204. Nothing for None."""
        return "" if fraction is None else f"{100 * fraction:{sign}.{self.digits + 1}f}"

    def bounds(self, interval: tuple[float, float], sign: str = "") -> str:
        """Return an interval: [41.2, 50.6]."""
        low, high = (f"{100 * end:{sign}.{self.digits}f}" for end in interval)
        return f"[{low}, {high}]"


PERCENT = Unit("%", "point", "points", digits=1, margin=1.0, margin_setting="margin")
# A tenth of a hundredth of a bit goes with about one point of accuracy: five times the samples give SFT in the lab 0.8 and 7.1.
BITS = Unit(
    "hundredths of a bit",
    "hundredth of a bit",
    "hundredths of a bit",
    digits=2,
    margin=0.1,
    margin_setting="likelihood_margin",
)


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
    of_any_script: "Generated | None" = None  # for texts in other scripts than Latin; None where all are read alike
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
    of_any_script: ClassVar[None] = None
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
    of_any_script: ClassVar[None] = None
    needs: ClassVar[tuple[str, ...]] = ()
    generates: ClassVar[bool] = False
    unit: ClassVar[Unit] = BITS


Kind = Generated | MultipleChoice | Likelihood
