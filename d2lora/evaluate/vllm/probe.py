"""Hold the engine against the model in memory: the log-probabilities of a fixed text, under the base and each adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel

from d2lora.adapters import attach
from d2lora.base import Base

EXACT = 1e-4  # nats a token, the largest difference in float32: adapters differ from the base by 0.3 and more
COARSE = 0.05  # nats a token, the mean difference in bfloat16 (docs/engines.md)
_TEXT = "The engine must give each token of this text what the model in memory gives it: 17 + 25 = 42, and so on."
_TOKENS = 40


class Expected(NamedTuple):
    """What the model in memory gives the probe: log-probabilities of all tokens but the first.

    `changes` tells of an adapter whether it changes logits at all (attach.check_applied).
    """

    log_probs: list[float]
    changes: bool = False


def ids(base: Base) -> list[int]:
    """Return the token ids of the probe, the same for all adapters of a base."""
    some: list[int] = base.tokenizer(_TEXT)["input_ids"]
    return (some * _TOKENS)[:_TOKENS]


def expected(base: Base, folder: Path | None) -> Expected:
    """Compute the probe in memory, under the adapter in `folder` as PEFT applies it; None is the base."""
    if folder is None:
        return Expected(_log_probs(base.model, ids(base)))
    try:
        wrapped = PeftModel.from_pretrained(base.model, folder).eval()
        return Expected(_log_probs(wrapped, ids(base)), attach.check_applied(base, wrapped))
    finally:
        base.restore()


def _log_probs(model: torch.nn.Module, tokens: list[int]) -> list[float]:
    rows = torch.tensor([tokens], device=next(model.parameters()).device)
    with torch.inference_mode():
        log_probs = model(input_ids=rows).logits[0].float().log_softmax(-1)
    values: list[float] = log_probs[:-1].gather(1, rows[0, 1:, None])[:, 0].tolist()
    return values


def off(measured: Sequence[float], expected: Sequence[float], exact: bool) -> float:
    """Return the largest difference of a log-probability (`exact`), or the mean one; infinite if one is missing or NaN."""
    if len(measured) != len(expected):
        return float("inf")
    differences = [abs(a - b) for a, b in zip(measured, expected, strict=True)]
    value = max(differences) if exact else sum(differences) / len(differences)
    return value if value == value else float("inf")


def limit(exact: bool) -> float:
    """Return the difference that `off` may have."""
    return EXACT if exact else COARSE
