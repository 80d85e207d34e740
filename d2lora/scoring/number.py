"""Benchmark kind `number`: the number that the answer ends on equals the gold's."""

from d2lora.scoring import answers
from d2lora.scoring.kinds import Generated


def _compare(answer: str, gold: str) -> dict[str, float]:
    return {"accuracy": float(answers.same_number(answer, gold))}


def _problem(gold: str) -> str | None:
    if answers.gold_number(gold) is None:
        return "the gold answer {} is not a number, or not a single sure one (kind: exact compares texts)"
    return None


NUMBER = Generated("number", ("accuracy",), _compare, _problem)
