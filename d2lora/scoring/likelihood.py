"""Benchmark kind `likelihood`: how likely a model takes the reference solution to be. It generates nothing.

The metric is the solution's log-likelihood in bits per byte of its UTF-8 text: lm-evaluation-harness's bits_per_byte with
the other sign, so that more is better, as in all other metrics.
"""

import math
import re

from d2lora.scoring.kinds import Likelihood

METRIC = "loglikelihood_per_byte"
# What GSM8K writes around a solution, and no model: <<48/2=24>> for a calculator, and the answer once more in a last line.
_CALCULATION = re.compile(r"<<[^<>\n]*>>")
_LAST_LINE = re.compile(r"\s*\n[^\S\n]*####[^\n]*\s*\Z")


def solution(gold: str) -> str:
    """Return a gold's solution: without GSM8K's <<calculations>> and its last line "#### answer"."""
    return _LAST_LINE.sub("", _CALCULATION.sub("", gold)).rstrip()


def _score(nats: float, text: str) -> dict[str, float]:
    return {METRIC: nats / math.log(2) / len(text.encode())}


def _problem(gold: str) -> str | None:
    return None if solution(gold) else "the gold answer {} has no solution to score"


LIKELIHOOD = Likelihood("likelihood", (METRIC,), solution, _score, _problem)
