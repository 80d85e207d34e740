"""Hold the engine against the model in memory: the log-probabilities of a fixed text, under the base and each adapter."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel

from d2lora.adapters import attach
from d2lora.base import Base

EXACT = 1e-4  # nats a token, the largest difference in float32: trained adapters differ from the base by 0.07 to 1.6
_TEXT = "The engine must give each token of this text what the model in memory gives it: 17 + 25 = 42, and so on."
_TOKENS = 40


class Expected(NamedTuple):
    """What the model in memory gives the probe: log-probabilities of all tokens but the first, and the largest logit.

    `changes` tells of an adapter whether it changes logits at all (attach.check_applied).
    """

    log_probs: list[float]
    largest: float
    changes: bool = False


def ids(base: Base) -> list[int]:
    """Return the token ids of the probe, the same for all adapters of a base."""
    some: list[int] = base.tokenizer(_TEXT)["input_ids"]
    return (some * _TOKENS)[:_TOKENS]


def expected(base: Base, folder: Path | None) -> Expected:
    """Compute the probe in memory, under the adapter in `folder` as PEFT applies it; None is the base."""
    if folder is None:
        return Expected(*_measured(base.model, ids(base)))
    try:
        wrapped = PeftModel.from_pretrained(base.model, folder).eval()
        return Expected(*_measured(wrapped, ids(base)), attach.check_applied(base, wrapped))
    finally:
        base.restore()


def _measured(model: torch.nn.Module, tokens: list[int]) -> tuple[list[float], float]:
    """Return the log-probabilities of the tokens after the first, and the largest absolute logit."""
    rows = torch.tensor([tokens], device=next(model.parameters()).device)
    with torch.inference_mode():
        logits = model(input_ids=rows).logits[0].float()
    values: list[float] = logits[:-1].log_softmax(-1).gather(1, rows[0, 1:, None])[:, 0].tolist()
    return values, float(logits.abs().max())


def why_off(measured: Sequence[float], expected: Expected, dtype: str) -> str:
    """Return why an engine's log-probabilities are not those of the model in memory, in one line; "" if they are."""
    if not math.isfinite(expected.largest):
        return f"the model in memory gives a probe logits of {expected.largest:g}"
    value, allowed = _difference(measured, expected.log_probs, dtype), limit(expected.largest, dtype)
    if value <= allowed:
        return ""
    return f"the log-probabilities of a probe are off by {value:.2g}, and {allowed:.2g} is allowed"


def _difference(measured: Sequence[float], expected: Sequence[float], dtype: str) -> float:
    """Return the difference of log-probabilities: the largest in float32, else the mean; infinite if one is missing or NaN."""
    if len(measured) != len(expected):
        return math.inf
    differences = [abs(a - b) for a, b in zip(measured, expected, strict=True)]
    if any(map(math.isnan, differences)):
        return math.inf
    return max(differences) if dtype == "float32" else sum(differences) / len(differences)


def limit(largest: float, dtype: str) -> float:
    """Return the difference of log-probabilities that is allowed where the largest absolute logit is `largest`.

    In bfloat16 both sides round each logit, so that a token's log-probability may be off by a step between two such
    numbers; in the mean by half a step at the largest logit.
    """
    if dtype == "float32":
        return EXACT
    return float(torch.finfo(getattr(torch, dtype)).eps * 2.0 ** (math.frexp(largest)[1] - 1) / 2)
