"""Initialize as EVA (Paischer et al. 2024, arXiv 2410.07170): A from the inputs' principal components, ranks by
explained variance.
"""

import functools
import itertools
from collections.abc import Iterator

import torch
from peft import EvaConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora.eva import get_eva_state_dict
from torch import nn

from d2lora.adapters.coverage import layers
from d2lora.adapters.layers import config_of, matrices
from d2lora.adapters.passes import Sequence
from d2lora.adapters.start import Start, for_training
from d2lora.errors import UserError
from d2lora.progress import Progress
from d2lora.settings.inits import EvaInit

_BATCH = 8  # rows
_PASSES = 50

Batch = dict[str, torch.Tensor]  # input_ids, attention_mask, labels: (rows, longest)


def eva(wrapped: PeftModel, start: Start[EvaInit], rows: list[Sequence], progress: Progress) -> None:
    """Start A from the rows' answer tokens. UserError for too few of them; RuntimeError where PEFT finds no directions."""
    rho, r = start.init.rho, start.lora.r
    fewest, tokens = round(r * rho), answer_tokens(rows)
    if tokens < fewest:  # PEFT would skip them, and go round for ever
        raise UserError(
            f"init=eva: {len(rows)} rows have {tokens} answer tokens, fewer than r * rho = {fewest}: take more of them "
            "(n, init.samples), a smaller recipe.lora.r or a smaller init.rho"
        )
    padded = [_padded(wrapped, rows_of_batch) for rows_of_batch in batches(rows, fewest)]
    config = config_of(wrapped)
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=rho)
    forward = functools.partial(_counted, itertools.count(1), _PASSES * len(padded), progress)
    directions = get_eva_state_dict(wrapped, padded, forward_fn=forward, show_progress_bar=False)
    if missing := layers(wrapped).keys() - directions.keys():  # PEFT would start them as plain LoRA, with a warning
        raise RuntimeError(f"EVA has no directions for {', '.join(sorted(missing))}")
    initialize_lora_eva_weights(wrapped, eva_state_dict=dict(directions))
    for name, layer in layers(wrapped).items():  # float32 also where PEFT has changed the rank on a bfloat16 base
        A, B = matrices(layer)
        A.data, B.data = directions[name].float().contiguous(), torch.zeros_like(B.data, dtype=torch.float32)
    for_training(wrapped)


def answer_tokens(rows: list[Sequence]) -> int:
    """Count the tokens that are learned."""
    return sum(label != -100 for row in rows for label in row["labels"])


def batches(rows: list[Sequence], fewest: int) -> list[list[Sequence]]:
    """Return batches of 8 rows, and more where these have fewer answer tokens than `fewest`: PEFT would skip them."""
    batched: list[list[Sequence]] = [[]]
    for row in rows:
        if len(batched[-1]) >= _BATCH and answer_tokens(batched[-1]) >= fewest:
            batched.append([])
        batched[-1].append(row)
    if len(batched) > 1 and answer_tokens(batched[-1]) < fewest:
        rest = batched.pop()
        batched[-1] += rest
    return batched


def _counted(count: Iterator[int], most: int, progress: Progress, model: nn.Module, inputs: Batch) -> None:
    """Do one of EVA's forward passes. RuntimeError if it goes over the data too often without converging."""
    if (number := next(count)) > most:
        raise RuntimeError(f"EVA has not converged in {_PASSES} passes over its rows: take more of them")
    progress(number, most)
    model(**inputs)


def _padded(model: nn.Module, rows: list[Sequence]) -> Batch:
    longest = max(len(row["input_ids"]) for row in rows)
    device = next(model.parameters()).device

    def batch(values: list[list[int]], filling: int) -> torch.Tensor:
        return torch.tensor([row + [filling] * (longest - len(row)) for row in values], device=device)

    return {
        "input_ids": batch([row["input_ids"] for row in rows], 0),
        "attention_mask": batch([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": batch([row["labels"] for row in rows], -100),
    }
