"""Define the benchmark kinds and how answers are read and scored. No torch here.

To add a kind, write a file like `exact.py` and list it in `KINDS`.
"""

from collections.abc import Sequence

from d2lora.scoring.choice import CHOICE
from d2lora.scoring.exact import EXACT
from d2lora.scoring.kinds import Generated, Kind, MultipleChoice
from d2lora.scoring.number import NUMBER
from d2lora.scoring.rouge import ROUGE, ROUGE_OF_ANY_SCRIPT

__all__ = ["KINDS", "Generated", "Kind", "MultipleChoice", "is_right_or_wrong", "kind_named", "shown_metrics"]

KINDS: tuple[Kind, ...] = (NUMBER, EXACT, ROUGE, CHOICE)


def kind_named(name: str, script: str = "latin") -> Kind:
    """Return the benchmark kind of this name, for texts in a `script`: latin or any. KeyError if there is none."""
    if script == "any" and name == ROUGE.name:
        return ROUGE_OF_ANY_SCRIPT
    return {kind.name: kind for kind in KINDS}[name]


def is_right_or_wrong(metric: str) -> bool:
    """Tell whether 0 and 1 of a metric are wrong and right answers: of ROUGE they are the ends of a scale."""
    graded = tuple(kind.family for kind in KINDS if kind.family and not kind.right_or_wrong)
    return not metric.startswith(graded)


def shown_metrics(metrics: Sequence[str]) -> list[str]:
    """Choose the metrics of an evaluation that a report shows: the first, and all of its family (ROUGE).

    Tasks of lm-evaluation-harness have no kind, so a metric's family is recognized by its name.
    """
    families = tuple(kind.family for kind in KINDS if kind.family)
    return [*metrics[:1], *(metric for metric in metrics[1:] if metric.startswith(families))]
