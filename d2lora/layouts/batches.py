"""Test on a model whether texts in a batch of an evaluation get what each gets alone."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from d2lora.layouts import decoding, small
from d2lora.layouts.proof import COARSE, EXACT, Memory, Proof, logits_difference

_STEPS = 4  # tokens of an answer
_Steps = list[tuple[torch.Tensor, int]]  # of an answer's tokens: logits (vocabulary), and the token that was taken
Compare = Callable[[torch.nn.Module, PreTrainedModel, list[list[int]]], float]  # model, base, texts -> difference
Side = Literal["left", "right", "leaving"]
_NAMES: dict[Side, str] = {
    "left": "batch padded on the left",
    "right": "batch padded on the right",
    "leaving": "batch padded on the left that texts leave",
}


def check(
    model: torch.nn.Module, base: PreTrainedModel, texts: Sequence[list[int]], side: Side, memory: Memory
) -> Proof:
    """Test whether texts in a padded batch get what each gets alone.

    Padded on the "left" as for generation, on the "right" as for likelihoods; "leaving" is the left with `decoding`
    instead of `generate`. `texts` are the ids of all texts; the two longest and the two shortest are tried.
    """
    ordered = sorted(texts, key=len)
    tested = [*ordered[:2], *ordered[-2:]] if len(ordered) > 3 else ordered
    compare = {"left": _next_logits, "right": _all_logits, "leaving": _decoded_logits}[side]
    name = _NAMES[side]
    if side == "leaving":
        name += ", passes of llama.py" if decoding.as_llama(model) else ", all of its room read"
    return memory.remember(name, len(tested), len(tested[-1]), lambda: _proof(name, model, base, tested, compare))


def _proof(name: str, model: torch.nn.Module, base: PreTrainedModel, texts: list[list[int]], compare: Compare) -> Proof:
    """Compare texts, by length, in one batch with each of them alone; a bfloat16 base's also on a small copy."""
    length, tolerance = len(texts[-1]), EXACT
    try:
        difference = compare(model, base, texts)
        if base.dtype != torch.float32:  # other shapes round otherwise: what is small is seen on a small copy
            tolerance = COARSE
            with torch.random.fork_rng():
                copy = small.model(base.config, base.config._attn_implementation)
                difference_in_float32 = compare(copy, copy, [small.random_ids(len(ids)) for ids in texts])
            if difference_in_float32 > EXACT:
                why = "shown on a small copy in float32"
                return Proof.measured(name, length, difference_in_float32, EXACT, why)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family's code raises over padding
        return Proof.failed(name, length, tolerance, error)
    return Proof.measured(name, length, difference, tolerance)


@torch.no_grad()
def _next_logits(model: torch.nn.Module, base: PreTrainedModel, prompts: list[list[int]]) -> float:
    """Return the largest difference over the first tokens of greedy answers, up to the first token that differs."""
    ids, mask = _left_padded(model, prompts)
    together = _greedy(model, ids, mask)
    tokens = together.sequences[:, ids.shape[1] :].tolist()
    steps = [[(logits[row], tokens[row][s]) for s, logits in enumerate(together.logits)] for row in range(len(ids))]
    return _difference_alone(model, prompts, steps)


@torch.no_grad()
def _decoded_logits(model: torch.nn.Module, base: PreTrainedModel, prompts: list[list[int]]) -> float:
    """Return the same for `decoding`: texts leave the batch after different numbers of tokens, the shortest first."""
    together: list[_Steps] = [[] for _ in prompts]
    with decoding.prepared(model, base) as passes:
        _decode(decoding.Batch(passes, base, *_left_padded(model, prompts)), together)
    return _difference_alone(model, prompts, together)


def _decode(batch: decoding.Batch, together: list[_Steps]) -> None:
    """Decode a few tokens of each text, and add them to `together`; the texts leave one by one."""
    for step in range(_STEPS):
        logits = batch.step() if step else batch.prompts()
        tokens = logits.argmax(-1)
        for row, row_logits, token in zip(batch.rows, logits, tokens.tolist(), strict=True):
            together[row].append((row_logits, token))
        batch.append(tokens)
        if len(batch.rows) > 1 and step:
            batch.leave([row == min(batch.rows) for row in batch.rows])


def _left_padded(model: torch.nn.Module, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, each (prompts, tokens)."""
    longest_prompt, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.tensor([[0] * (longest_prompt - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest_prompt - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def _difference_alone(model: torch.nn.Module, prompts: list[list[int]], together: list[_Steps]) -> float:
    """Compare each prompt's logits with those of the prompt alone in `generate`, as long as the tokens are the same."""
    worst, device = 0.0, next(model.parameters()).device
    for prompt, steps in zip(prompts, together, strict=True):
        one = torch.tensor([prompt], device=device)
        alone = _greedy(model, one, torch.ones_like(one))
        tokens = alone.sequences[0, len(prompt) :].tolist()
        for (batched, token), (single,), token_alone in zip(steps, alone.logits, tokens, strict=False):
            worst = max(worst, logits_difference(batched, single))
            if token != token_alone:  # of equal likelihoods either; and `generate` takes no end so early
                break
    return worst


def _greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    """Generate a few tokens with their logits."""
    fixed = {"min_new_tokens": _STEPS, "max_new_tokens": _STEPS, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **fixed)


@torch.no_grad()
def _all_logits(model: torch.nn.Module, base: PreTrainedModel, texts: list[list[int]]) -> float:
    """Return the largest difference at any token of texts padded on the right without a mask, as the harness does it."""
    length, device = max(map(len, texts)), next(model.parameters()).device
    together = model(input_ids=torch.tensor([t + [0] * (length - len(t)) for t in texts], device=device)).logits
    alone = [model(input_ids=torch.tensor([t], device=device)).logits[0] for t in texts]
    return max(logits_difference(together[i, : len(t)], alone[i]) for i, t in enumerate(texts))
