"""Benchmark kind `rouge`: the words, and sequences of words, that an answer shares with the gold."""

import functools
import re
from typing import TYPE_CHECKING

from d2lora.scoring.kinds import Generated

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@functools.cache
def _scorer() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(METRICS), use_stemmer=True)


def rouge(answer: str, gold: str) -> dict[str, float]:
    """Compute the F-measures of ROUGE-1, -2, -L and -Lsum (rouge-score, Porter stemming on), each in 0..1."""
    return {name: score.fmeasure for name, score in _scorer().score(gold, answer.strip()).items()}


def _problem(gold: str) -> str | None:
    # rouge-score reads a-z and 0-9 only: a gold without them scores 0, even for an identical answer.
    if re.search("[a-z0-9]", gold.lower()) is None:
        return (
            "the gold answer {} has no Latin letter and no digit, and ROUGE reads nothing else "
            "(kind: exact compares texts)"
        )
    return None


ROUGE = Generated("rouge", METRICS, rouge, _problem, family="rouge", right_or_wrong=False)
