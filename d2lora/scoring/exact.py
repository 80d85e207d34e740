"""Benchmark kind `exact`: the final answer equals the gold's text, apart from case, spaces and wrapping
(`answers.exact_text`).
"""

from d2lora.scoring import answers
from d2lora.scoring.kinds import Generated


def _compare(answer: str, gold: str) -> dict[str, float]:
    return {"accuracy": float(answers.same_text(answer, gold))}


def _problem(gold: str) -> str | None:
    return None if answers.exact_text(gold) else "the gold answer is blank"


EXACT = Generated("exact", ("accuracy",), _compare, _problem)
