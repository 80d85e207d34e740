"""Compute attention text by text in a row of packed texts, without a mask and without scores that a mask would discard.

Each stretch of a row (a prompt with its first answer, then each further answer) attends causally to itself, and to all
of its prompt: on a CPU one call of PyTorch's flash attention a stretch, on a GPU one call of its kernel for texts of
different lengths (`torch.nn.attention.varlen`) with all of them. Heads of keys and values are not repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BY_TEXT = "by_text"  # recipe.attention, and the name under which transformers knows it

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Stretch:
    """Tokens `start` to `stop` of a row, which attend causally to themselves, and to the `prompt` tokens from `text` on."""

    start: int
    stop: int
    text: int = 0
    prompt: int = 0

    def keys(self, values: torch.Tensor) -> torch.Tensor:
        """Return what of values (1, heads, tokens, width) the stretch attends to."""
        own = values[:, :, self.start : self.stop]
        return torch.cat([values[:, :, self.text : self.text + self.prompt], own], 2) if self.prompt else own


@dataclass(frozen=True, eq=False)
class Stretches:
    """The stretches of one row, in its order; together they cover it. What all layers need is computed once."""

    each: tuple[Stretch, ...]
    _masks: dict[torch.dtype, tuple[torch.Tensor | None, ...]] = field(default_factory=dict, repr=False)
    _lengths: dict[torch.device, "Lengths"] = field(default_factory=dict, repr=False)

    def masks(self, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
        """Return for each stretch the scores' mask on a CPU, to be added; None where the kernel's causal one is right."""
        if dtype not in self._masks:
            self._masks[dtype] = tuple(
                _mask(s.stop - s.start, s.prompt, dtype) if s.prompt else None for s in self.each
            )
        return self._masks[dtype]

    def lengths(self, device: torch.device) -> "Lengths":
        """Return what the kernel for texts of different lengths takes."""
        if device not in self._lengths:
            self._lengths[device] = self._lengths_on(device)
        return self._lengths[device]

    def _lengths_on(self, device: torch.device) -> "Lengths":
        queries = [s.stop - s.start for s in self.each]
        keys = [s.stop - s.start + s.prompt for s in self.each]
        index = None
        if queries != keys:
            index = torch.cat(
                [torch.cat([_range(s.text, s.prompt), _range(s.start, s.stop - s.start)]) for s in self.each]
            )
        borders = (
            torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32) for sizes in (queries, keys)
        )
        moved = [None if t is None else t.to(device) for t in (*borders, index)]
        return Lengths(cast(torch.Tensor, moved[0]), cast(torch.Tensor, moved[1]), moved[2], max(queries), max(keys))


@dataclass(frozen=True)
class Lengths:
    """Borders of the stretches' queries and keys, each (stretches + 1,), the keys' tokens, and the largest counts."""

    queries: torch.Tensor
    keys: torch.Tensor
    index: torch.Tensor | None  # None: each token once, in order
    longest_query: int
    longest_key: int


def _range(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count)


def _mask(queries: int, prompt: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask (queries, prompt + queries) to be added to scores: all of the prompt, and causally the rest."""
    later = torch.ones(queries, prompt + queries, dtype=torch.bool).triu(prompt + 1)
    return torch.zeros(later.shape, dtype=dtype).masked_fill(later, float("-inf"))


class _OnCpu(torch.autograd.Function):
    """Flash attention, one call a stretch; gradients go straight into those of the whole row."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stretches: Stretches, scale: float | None
    ) -> torch.Tensor:
        """Return attention's output (1, heads, tokens, width)."""
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        sums = []
        for stretch, mask in zip(stretches.each, stretches.masks(query.dtype), strict=True):
            own = slice(stretch.start, stretch.stop)
            states = query[:, :, own], stretch.keys(key), stretch.keys(value)
            output[:, :, own], logsumexp = _forward(*states, 0.0, mask is None, attn_mask=mask, scale=scale)
            sums.append(logsumexp)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.stretches, ctx.scale = stretches, scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        query, key, value, output, *sums = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        masks = ctx.stretches.masks(query.dtype)
        for stretch, mask, logsumexp in zip(ctx.stretches.each, masks, sums, strict=True):
            own, prompt = slice(stretch.start, stretch.stop), slice(stretch.text, stretch.text + stretch.prompt)
            states = query[:, :, own], stretch.keys(key), stretch.keys(value), output[:, :, own], logsumexp
            parts = _backward(gradient[:, :, own], *states, 0.0, mask is None, attn_mask=mask, scale=ctx.scale)
            of_query[:, :, own] = parts[0]
            for whole, part in zip((of_key, of_value), parts[1:], strict=True):
                if stretch.prompt:
                    whole[:, :, prompt] += part[:, :, : stretch.prompt]
                whole[:, :, own] += part[:, :, stretch.prompt :]
        return of_query, of_key, of_value, None, None


def _on_gpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stretches: Stretches, scale: float | None
) -> torch.Tensor:
    """Return attention's output (1, tokens, heads, width): its kernel aligns queries with the last of their keys."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = stretches.lengths(query.device)
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    if lengths.index is not None:
        keys, values = keys.index_select(0, lengths.index), values.index_select(0, lengths.index)
    output = varlen_attn(
        queries.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        lengths.queries,
        lengths.keys,
        lengths.longest_query,
        lengths.longest_key,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return cast(torch.Tensor, output)[None]


@torch.compiler.disable  # it would be compiled for the borders of each batch anew
def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    stretches: Stretches | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention's output (1, tokens, heads, width), as transformers calls it for each layer.

    TypeError where a family's layers do not hand `stretches` down, or want what is not computed here.
    """
    own = [name for name in ("softcap", "s_aux", "sinks", "position_bias") if kwargs.get(name) is not None]
    if stretches is None or attention_mask is not None or dropout or own:
        raise TypeError(f"attention by text knows no {', '.join(own) or 'mask, dropout or text without borders'}")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as PyTorch's own attention does
        query, key, value = (states.to(torch.get_autocast_dtype(kind)) for states in (query, key, value))
    if kind == "cpu":
        return _OnCpu.apply(query, key, value, stretches, scaling).transpose(1, 2), None
    return _on_gpu(query, key, value, stretches, scaling), None


def of_row(texts: Sequence[Sequence[int]], starts: Sequence[int], length: int) -> Stretches:
    """Return the stretches of a row: texts of pieces of so many tokens (prompt, answers ...), and where each text starts.

    What is left of `length` behind the last text is padding, and a stretch of its own.
    """
    each: list[Stretch] = []
    for start, pieces in sorted(zip(starts, texts, strict=True)):
        first = start + sum(pieces[:2])
        each.append(Stretch(start, first))
        for answer in filter(None, pieces[2:]):
            each.append(Stretch(first, first + answer, start, pieces[0]))
            first += answer
    end = each[-1].stop if each else 0
    return Stretches((*each, Stretch(end, length)) if end < length else tuple(each))


ALL_ATTENTION_FUNCTIONS.register(BY_TEXT, attend)
