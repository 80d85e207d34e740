"""Define the benchmark kinds and how answers are read and scored. No torch here.

To add a kind, write a file like `exact.py` and list it in `KINDS`.
"""

from collections.abc import Sequence

from d2lora.scoring.choice import CHOICE
from d2lora.scoring.exact import EXACT
from d2lora.scoring.kinds import PERCENT, Generated, Kind, Likelihood, MultipleChoice, Unit
from d2lora.scoring.likelihood import LIKELIHOOD
from d2lora.scoring.number import NUMBER
from d2lora.scoring.rouge import ROUGE

__all__ = [
    "KINDS",
    "Generated",
    "Kind",
    "Likelihood",
    "MultipleChoice",
    "Unit",
    "is_graded",
    "kind_named",
    "shown_metrics",
    "unit_of",
]

KINDS: tuple[Kind, ...] = (NUMBER, EXACT, ROUGE, CHOICE, LIKELIHOOD)


def kind_named(name: str, script: str = "latin") -> Kind:
    """Return the benchmark kind of this name, for texts in a `script`: latin or any. KeyError if there is none."""
    kind = {kind.name: kind for kind in KINDS}[name]
    return kind.of_any_script or kind if script == "any" else kind


def shown_metrics(metrics: Sequence[str]) -> list[str]:
    """Choose the metrics of an evaluation that a report shows: the first, and all of its family (ROUGE).

    Tasks of lm-evaluation-harness have no kind, so a metric's family is recognized by its name.
    """
    return [*metrics[:1], *(metric for metric in metrics[1:] if metric.startswith(_families()))]


def is_graded(metric: str) -> bool:
    """Tell whether a metric's values lie between right and wrong, as those of the ROUGE family do: an answer that scores 0
    is then not one that was judged wrong.
    """
    return metric.startswith(_families())


def _families() -> tuple[str, ...]:
    return tuple(kind.family for kind in KINDS if kind.family)


def unit_of(metric: str) -> Unit:
    """Return the unit of 100 times a metric, as a report shows it: % but for log-likelihoods."""
    return next((kind.unit for kind in KINDS if metric in kind.metrics), PERCENT)
