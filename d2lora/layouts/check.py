"""Test on a model whether a layout of its training rows is exact: each token gets what it gets in a plain pass."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from d2lora.data import Example, longest
from d2lora.layouts import families, log_probs, small
from d2lora.layouts.by_text import BY_TEXT
from d2lora.layouts.log_probs import Tokens
from d2lora.layouts.packing import FLEX, Layout
from d2lora.layouts.proof import COARSE, EXACT, Proof, logits_difference

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]

_NOISE = 3.0  # in bfloat16: times the rounding noise that was measured ...
_LEAST = 0.02  # ... and at least this, because some batches show no noise


@dataclass
class Check:
    """Tests layouts of a model, `base` with its adapter, on some examples.

    Values that do not depend on the layout are computed once, when they are needed.
    """

    model: torch.nn.Module
    base: PreTrainedModel
    examples: Sequence[Example]
    prompt_loss: bool = False
    autocast: Autocast = contextlib.nullcontext

    @property
    def length(self) -> int:
        """Return the length of the longest text, in tokens."""
        return max(longest(e) for e in self.examples)

    def compare(self, layout: Layout) -> Proof:
        """Compare a layout with plain passes; a bfloat16 base's also on a small copy in float32."""
        tolerance = self.tolerance
        try:
            difference, why = self._difference(layout), ""
            if difference <= tolerance and self.base.dtype != torch.float32:
                difference_in_float32, why = on_small_copy(self.base.config, layout, self.length, self.prompt_loss)
                if difference_in_float32 > EXACT:
                    return Proof.measured(layout.name, self.length, difference_in_float32, EXACT, why)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a family's code raises over a mask or positions that it does not know
            return Proof.failed(layout.name, self.length, tolerance, error)
        return Proof.measured(layout.name, self.length, difference, tolerance, why)

    def causal(self) -> Proof:
        """Test that later tokens change no earlier logits in a plain pass, and that a gradient reaches the adapter."""
        example = max(self.examples, key=longest)
        ids = example["input_ids"] if "input_ids" in example else example["prompt_ids"] + example["chosen_ids"]
        half, device = -(-len(ids) // 2), next(self.model.parameters()).device
        with self.autocast():
            part = self.model(input_ids=torch.tensor([ids[:half]], device=device)).logits[0]
            if not part.requires_grad:
                return Proof("causal", self.length, None, EXACT, False, "no gradient reaches an adapter")
            with torch.no_grad():
                full = self.model(input_ids=torch.tensor([ids], device=device)).logits[0]
        tolerance = EXACT if self.base.dtype == torch.float32 else COARSE
        change = logits_difference(part.detach(), full[:half])
        why = "" if change <= tolerance else f"no causal language model: a token's log-probability is off by {change:.2g} when more text follows"  # fmt: skip
        return Proof.measured("causal", self.length, change, tolerance, why)

    @cached_property
    def tolerance(self) -> float:
        """Return the difference up to which a layout is exact: in bfloat16 a few times what rounding alone makes."""
        if self.base.dtype == torch.float32:
            return EXACT
        return min(COARSE, max(_LEAST, _NOISE * self._noise()))

    def _noise(self) -> float:
        """Return the difference that padding alone makes in bfloat16, which is its rounding.

        0 if the model can't be padded.
        """
        try:
            return self._difference(Layout("padded", attention=self.base.config._attn_implementation))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the family can't be padded: the error is reported when that layout is tried
            return 0.0

    def _difference(self, layout: Layout) -> float:
        """Return the largest difference of a token's log-probability from that of a plain pass."""
        hidden = self.base.config.get_text_config().hidden_size
        with families.attention(self.base, layout.attention), self.autocast():
            measured = log_probs.in_layout(self.model, self.examples, layout, hidden, self.prompt_loss)
        return log_probs.difference(measured, self._expected)

    @cached_property
    def _expected(self) -> Tokens:
        """Return the log-probabilities of plain passes."""
        with self.autocast():
            return log_probs.plain(self.model, self.examples, self.prompt_loss)


def on_small_copy(config: PretrainedConfig, layout: Layout, length: int, prompt_loss: bool) -> tuple[float, str]:
    """Test a layout on a small random model with the same config, in float32: (largest difference, what was done).

    Rounding in bfloat16 could hide a layout's error. The small model has the same kinds of layers, windows and
    positions, and in float32 the error is visible.
    """
    if layout.rows == "single" and layout.head == "whole":
        return 0.0, ""
    no_copy = layout.attention == FLEX or (layout.attention == BY_TEXT and torch.cuda.is_available())
    attention = "sdpa" if no_copy else layout.attention  # kernels of a GPU that have no float32
    with torch.random.fork_rng():
        model = small.model(config, "sdpa" if attention == BY_TEXT else attention)
        sizes = ((length // 2, length - length // 2, 9), (7, 12, 5), (3, 2, 4))
        texts = [map(small.random_ids, counts) for counts in sizes]
        examples = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)) for ids in texts]
    add_fused_lm_head(model)
    layout = Layout(layout.rows, layout.head, layout.reaches, attention)
    with families.attention(model, attention):
        measured = log_probs.in_layout(model, examples, layout, config.get_text_config().hidden_size, prompt_loss)
    expected = log_probs.plain(model, examples, prompt_loss)
    return log_probs.difference(measured, expected), "shown on a small copy in float32"
