"""Compute tokens' log-probabilities in plain passes and in a layout, and how far they are apart."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from d2lora.data import Example
from d2lora.layouts import packing
from d2lora.layouts.packing import Layout

Tokens = dict[tuple[int, int, int], float]  # (example, answer, column) -> log-probability


@torch.no_grad()
def plain(model: torch.nn.Module, examples: Sequence[Example], prompt_loss: bool = False) -> Tokens:
    """Return the log-probability of each predicted token in plain passes, under the keys of `packing.pack`."""
    expected: Tokens = {}
    for index, example in enumerate(examples):
        for answer, start, ids, labels in _texts(example, index, len(examples), prompt_loss):
            logits = model(input_ids=torch.tensor([ids], device=next(model.parameters()).device)).logits[0].float()
            next_ids = torch.tensor(ids[1:], device=logits.device)[:, None]
            logps = logits[:-1].log_softmax(-1).gather(1, next_ids)[:, 0].tolist()
            for position in range(1, len(ids)):
                if labels[position] != -100:
                    key = (index, answer, position - start) if position >= start else (index, -1, position)
                    expected[key] = logps[position - 1]
    return expected


def _texts(
    example: Example, index: int, count: int, prompt_loss: bool
) -> Iterable[tuple[int, int, list[int], list[int]]]:
    """Yield (answer, where it starts, ids, labels) of an example's texts."""
    if "input_ids" in example:
        yield -1, 0, example["input_ids"], example["labels"]
        return
    prompt = example["prompt_ids"]
    for part, kind in enumerate(("chosen_ids", "rejected_ids")):
        prompt_labels = prompt if prompt_loss and part == 0 else [-100] * len(prompt)
        yield index + part * count, len(prompt), prompt + example[kind], prompt_labels + example[kind]


@torch.no_grad()
def in_layout(
    model: torch.nn.Module, examples: Sequence[Example], layout: Layout, hidden: int, prompt_loss: bool = False
) -> Tokens:
    """Return the log-probability of each predicted token in a layout's hardest case: one row, or one padded pass."""
    layout = replace(layout, filled=0.0)
    packed = _to(packing.pack(examples, layout, hidden, prompt_loss), next(model.parameters()).device)
    log_probs = packing.log_probs(model, packed, layout).log_probs
    assert log_probs is not None, "TRL computes them wherever a token is predicted"
    values = log_probs[0].float().tolist()
    keys = zip(*(packed[k].tolist() for k in ("example", "answer", "column")), strict=True)
    return dict(zip(keys, values, strict=True))


def _to(value: Any, device: torch.device) -> Any:
    """Move all tensors in a value to a device."""
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    if isinstance(value, list):
        return [_to(v, device) for v in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def difference(measured: Tokens, expected: Tokens) -> float:
    """Return the largest difference of a token's log-probability; infinite if a token is missing or a value is NaN."""
    if measured.keys() != expected.keys():
        return float("inf")
    worst = max((abs(measured[k] - expected[k]) for k in expected), default=0.0)
    return worst if worst == worst else float("inf")
