"""Continue the texts of a batch greedily: the cache has room for the tokens to come, and a text that has ended leaves
the batch.

`generate` of transformers copies the whole cache for every token, and computes texts that have ended until the last one
does. On a CPU that is most of its time.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin

_ROOM = 16  # tokens that a cache grows by: copied once in so many steps, and what is unused between texts is not read
# Steps between two looks at which texts have ended. Each look waits for a GPU; a CPU has computed it already.
_LOOK = {"cpu": 1, "cuda": 8}
# Tokens of prompts that a CPU computes in one pass: what a layer makes of more does not fit its cache.
_PROMPTS = {"cpu": 1024}


def suits(model: PreTrainedModel) -> bool:
    """Tell whether a model's cache is keys and values of all tokens in every layer, and its inputs are the usual ones.

    Windows, states and inputs of their own are left to `generate`.
    """
    if getattr(type(model), "prepare_inputs_for_generation", None) is not GenerationMixin.prepare_inputs_for_generation:
        return False
    try:
        layers = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, ValueError):  # a family without a cache of this kind
        return False
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


class _Growing:
    """The keys or values of a layer, (texts, heads, tokens, width), in a larger tensor that has room for more tokens."""

    def __init__(self, texts: int) -> None:
        self.texts, self.tokens = texts, 0
        self.whole: torch.Tensor | None = None

    def write(self, new: torch.Tensor, first: int) -> torch.Tensor:
        """Write states (some texts, heads, new tokens, width) of the texts from `first` on behind those that they have.

        Return all states of these texts.
        """
        end, last = self.tokens + new.shape[2], first + len(new)
        if self.whole is None or end > self.whole.shape[2]:
            larger = new.new_empty(self.texts, new.shape[1], end + _ROOM, new.shape[3])
            if self.whole is not None:
                larger[:, :, : self.tokens] = self.whole[: self.texts, :, : self.tokens]
            self.whole = larger
        self.whole[first:last, :, self.tokens : end] = new
        self.tokens = end if last == self.texts else self.tokens
        return self.whole[first:last, :, :end]

    def keep(self, moved: torch.Tensor, holes: torch.Tensor, count: int) -> torch.Tensor:
        """Write the texts `moved` over the `holes`, and return the first `count`."""
        assert self.whole is not None, "a step comes first"
        self.whole[holes, :, : self.tokens] = self.whole[moved, :, : self.tokens]
        self.texts = count
        return self.whole[:count, :, : self.tokens]


class _Layer(DynamicLayer):
    """A layer of transformers' cache whose keys and values are not copied for every token.

    `first` is the number of the first text in the next pass: prompts may be computed some texts at a time.
    """

    def __init__(self, texts: int) -> None:
        super().__init__()
        self.parts, self.first = (_Growing(texts), _Growing(texts)), 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the tokens of a pass, and return keys and values of its texts."""
        keys, values = (
            part.write(new, self.first) for part, new in zip(self.parts, (key_states, value_states), strict=True)
        )
        if self.first + len(keys) == self.parts[0].texts:
            self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values

    def keep(self, moved: torch.Tensor, holes: torch.Tensor, count: int) -> None:
        """Write the texts `moved` over the `holes`, and keep the first `count`."""
        self.keys, self.values = (part.keep(moved, holes, count) for part in self.parts)


class Batch:
    """Texts that are being continued, padded on the left: ids and mask are (texts, tokens).

    `rows` says which texts are left, in the order of the logits that `prompts` and `step` return.
    """

    def __init__(self, model: torch.nn.Module, base: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.model, self.base = model, base
        self.layers = [_Layer(len(ids)) for _ in DynamicCache(config=base.config).layers]
        self.cache = Cache(layers=list(self.layers))
        self.rows = list(range(len(ids)))
        self.ids, self.mask = ids, mask.bool()
        self.positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        # Only the last token's logits are needed. generate asks the same of a family's forward.
        parameters = inspect.signature(base.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def prompts(self) -> torch.Tensor:
        """Return the logits (rows, vocabulary) of each text's first new token, in float32."""
        at_once = max(1, _PROMPTS.get(self.ids.device.type, self.ids.numel()) // self.ids.shape[1])
        logits = []
        for first in range(0, len(self.rows), at_once):
            for layer in self.layers:
                layer.first = first
            some = slice(first, first + at_once)
            logits.append(self._pass(self.ids[some], self.mask[some], self.positions[some]))
        for layer in self.layers:
            layer.first = 0
        if self.base.config._attn_implementation == "sdpa":  # which takes a mask for one token as it is, added
            unseen = torch.zeros(self.mask.shape, dtype=self.base.dtype, device=self.mask.device)
            self.mask = unseen.masked_fill_(~self.mask, float("-inf"))[:, None, None]
        return torch.cat(logits)

    def step(self) -> torch.Tensor:
        """Return the same after a token was appended to each text."""
        return self._pass(self.ids, self.mask, self.positions)

    def _pass(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        out = self.model(**inputs, **self.last_only, cache=self.cache, use_cache=True, return_dict=True)
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits

    def append(self, tokens: torch.Tensor) -> None:
        """Append a token (rows) to each text."""
        self.ids = tokens[:, None]
        seen = torch.ones if self.mask.dtype == torch.bool else torch.zeros
        new = seen((*self.mask.shape[:-1], 1), dtype=self.mask.dtype, device=self.mask.device)
        self.mask = torch.cat([self.mask, new], -1)
        self.positions = self.positions[:, -1:] + 1

    def leave(self, ended: Sequence[bool]) -> None:
        """Remove the rows that have ended.

        The last ones that have not take their places, so that no more of the cache is copied than leaves it.
        """
        count = len(ended) - sum(ended)
        holes = [row for row in range(count) if ended[row]]
        moved = [row for row in range(count, len(ended)) if not ended[row]]
        order = list(range(count))
        for hole, row in zip(holes, moved, strict=True):
            order[hole] = row
        self.rows = [self.rows[row] for row in order]
        kept, to, source = (self.ids.new_tensor(rows, dtype=torch.long) for rows in (order, holes, moved))
        self.ids, self.mask, self.positions = self.ids[kept], self.mask[kept], self.positions[kept]
        for layer in self.layers:
            layer.keep(source, to, count)


@torch.inference_mode()
def greedy(
    model: torch.nn.Module,
    base: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    room: int,
    ends: Sequence[int],
    pad: int,
) -> torch.Tensor:
    """Return the texts with their greedy continuations, (texts, tokens and up to `room` more), as `generate` does.

    A continuation ends with the first of the `ends`, and is padded after it.
    """
    batch, ending = Batch(model, base, ids, mask), torch.tensor(list(ends), device=ids.device)
    answers = torch.full((len(ids), room), pad, device=ids.device)
    rows = torch.arange(len(ids), device=ids.device)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    often = _LOOK.get(ids.device.type, 1)
    for step in range(room):
        logits = batch.step() if step else batch.prompts()
        tokens = logits.argmax(-1).masked_fill(ended, pad)
        answers[rows, step] = tokens
        ended |= torch.isin(tokens, ending)
        gone = ended.tolist() if step % often == often - 1 else []
        if gone and all(gone):
            return torch.cat([ids, answers[:, : step + 1]], 1)
        batch.append(tokens)
        if any(gone):
            batch.leave(gone)
            rows, ended = rows.new_tensor(batch.rows), ended.new_zeros(len(batch.rows))
    return torch.cat([ids, answers], 1)
