"""Choose a layout for a training: list those that may suit a base, and take the first that is exact for it."""

import sys
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from d2lora.data import Example, longest
from d2lora.errors import UserError
from d2lora.layouts import families, packing
from d2lora.layouts.by_text import BY_TEXT
from d2lora.layouts.check import Check
from d2lora.layouts.packing import FLEX, Layout
from d2lora.layouts.proof import Memory, Proof

_TESTED = 5  # examples at most: the longest, and the shortest
_COMPILED = 1e8  # parameters from which on FlexAttention's kernels are worth the seconds that compiling them takes
_CALLED = 64  # tokens of a text from which on, on a CPU, an attention of its own costs less than what a mask would hide


def candidates(model: PreTrainedModel, packed: bool, attention: str, examples: Sequence[Example]) -> list[Layout]:
    """Return the layouts to try on a base for these examples, cheapest first.

    `attention` is the recipe's. Packed rows need layers that masks describe, or that see all of a text if attention is by
    text.
    """
    own = model.config._attn_implementation
    reaches = families.reaches(model.config)
    sizes = [_tokens(e) for e in examples]
    shape = (sum(sizes) / len(sizes), "prompt_ids" in examples[0], sum(p.numel() for p in model.parameters()))
    kinds = _attentions(attention, own, *shape)
    if BY_TEXT in kinds and not families.whole(reaches, _longest_text(examples)):
        kinds = [kind for kind in kinds if kind != BY_TEXT] or [own]
    reached = reaches or {"": families.Reach()}
    layouts: list[Layout] = []
    if packed and reaches is not None:
        step = packing.BLOCK if torch.cuda.is_available() else 1
        layouts = [Layout("packed", head, reached, kind, step) for kind in kinds for head in ("fused", "whole")]
    last = FLEX if attention == FLEX else own
    return layouts + [Layout(rows, head, reached, last) for rows in ("padded", "single") for head in ("fused", "whole")]


def _attentions(attention: str, own: str, tokens: float, pairs: bool, parameters: int) -> list[str]:
    """Return the implementations to try: the recipe's; for "auto", by device, rows and size of the model."""
    if attention != "auto":
        return [own if attention == "sdpa" else attention]
    if own != "sdpa":  # such a family has an attention of its own
        return [own]
    if not torch.cuda.is_available():
        return [BY_TEXT, own] if tokens >= _CALLED else [own]
    if parameters < _COMPILED:
        return [BY_TEXT, own]
    return [FLEX, BY_TEXT, own] if pairs else [BY_TEXT, FLEX, own]


def _longest_text(examples: Sequence[Example]) -> int:
    """Return a length that no text exceeds, in tokens. KTO pairs a prompt with another row's answer."""
    if "prompt_ids" not in examples[0]:
        return max(map(longest, examples))
    answers = max(len(e[kind]) for e in examples for kind in ("chosen_ids", "rejected_ids") if kind in e)
    return max(len(e["prompt_ids"]) for e in examples) + answers


def _tokens(example: Example) -> int:
    """Count the tokens of an example, a pair's prompt once."""
    return sum(len(example[k]) for k in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids") if k in example)


def tested(examples: Sequence[Example], at_once: int) -> list[Example]:
    """Return the examples that layouts are tested on: the longest and the shortest, as many as go through at once."""
    ordered = sorted(examples, key=lambda e: -longest(e))
    count = min(_TESTED, at_once, len(ordered))
    return ordered[: max(1, count - 1)] + (ordered[-1:] if count > 1 else [])


def choose(name: str, check: Check, layouts: list[Layout], memory: Memory) -> tuple[Layout, Proof]:
    """Return the first of the layouts that is exact for the model on the check's examples, and its proof.

    UserError if none is. `name` is the user's name for the model. Proofs are looked up in `memory`, and added to it.
    """
    causal = memory.remember("causal", 1, check.length, check.causal)
    if not causal.exact:
        raise UserError(f"model={name}: {causal.why}")
    failed: list[Proof] = []
    for layout in layouts:
        proof = _proof(check, layout, memory)
        if proof.exact:
            _say_why(name, check, layout, failed)
            return layout, proof
        failed.append(proof)
    reasons = "; ".join(f"{proof.layout}: {proof.miss}" for proof in failed)
    raise UserError(f"model={name}: no layout of its rows gives what plain passes of single texts give ({reasons})")


def _proof(check: Check, layout: Layout, memory: Memory) -> Proof:
    """Return the proof of a layout, from memory if it covers the check's examples."""
    key = f"{layout.name}, {layout.attention}" + (", prompts too" if check.prompt_loss else "")
    return memory.remember(key, len(check.examples), check.length, lambda: check.compare(layout))


def _say_why(name: str, check: Check, layout: Layout, failed: list[Proof]) -> None:
    """Print why texts are not packed, or not laid out as the recipe says, if so."""
    if failed and failed[0].layout != layout.name:
        _say(name, layout, f"{failed[0].layout}: {failed[0].miss}")
    elif families.reaches(check.base.config) is None:
        _say(name, layout, "a layer carries a state from text to text")


_said: set[tuple[str, str]] = set()


def _say(name: str, layout: Layout, why: str) -> None:
    """Print a line, once a process, about a layout that is not the recipe's."""
    if (name, layout.name) not in _said:
        _said.add((name, layout.name))
        print(f"{name}: texts are laid {layout.name} ({why})", file=sys.stderr)
