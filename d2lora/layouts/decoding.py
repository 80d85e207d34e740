"""Continue the texts of a batch greedily: the cache has room for the tokens to come, and a text that has ended leaves
the batch.

`generate` of transformers copies the whole cache for every token, and computes texts that have ended until the last one
does. On a CPU that is most of its time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin

_ROOM = 64  # tokens that a cache grows by
_CHECK = 8  # steps on a GPU between two looks at which texts have ended: each look waits for the GPU


def suits(model: PreTrainedModel) -> bool:
    """Tell whether a model's cache is keys and values of all tokens in every layer, and its inputs are the usual ones.

    Windows, states and inputs of their own are left to `generate`.
    """
    if type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        return False
    try:
        layers = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, ValueError):  # a family without a cache of this kind
        return False
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


class _Layer(DynamicLayer):
    """Keys and values of a layer, each (batch, heads, tokens, width), as views of larger tensors that the next tokens
    are written into.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make keys and values without tokens."""
        self.device = key_states.device
        self.full = [states.new_empty(0) for states in (key_states, value_states)]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new tokens, and return keys and values of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys = self._appended(0, self.keys, key_states)
        self.values = self._appended(1, self.values, value_states)
        return self.keys, self.values

    def _appended(self, which: int, states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, width = states.shape
        end = tokens + new.shape[2]
        if self.full[which].dim() == 1 or end > self.full[which].shape[2]:
            self.full[which] = new.new_empty(batch, heads, end + _ROOM, width)
            self.full[which][:, :, :tokens] = states
        self.full[which][:batch, :, tokens:end] = new
        return self.full[which][:batch, :, :end]

    def keep(self, moved: torch.Tensor, holes: torch.Tensor, count: int) -> None:
        """Move the texts `moved` to where the `holes` are, and keep the first `count`."""
        assert self.keys is not None and self.values is not None
        for states in (self.keys, self.values):
            states[holes] = states[moved]
        self.keys, self.values = self.keys[:count], self.values[:count]


class Batch:
    """Texts that are being continued, padded on the left: ids and mask are (texts, tokens).

    `rows` says which texts are left, in the order of the logits that `step` returns.
    """

    def __init__(self, model: torch.nn.Module, base: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.model = model
        self.cache = Cache(layers=[_Layer() for _ in DynamicCache(config=base.config).layers])
        self.rows = list(range(len(ids)))
        self.ids, self.mask = ids, mask.bool()
        self.positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        self.last_only = {"logits_to_keep": 1} if base._supports_logits_to_keep() else {}
        # sdpa takes one token's mask as it is. Others read the mask of all tokens, which the model makes its own of.
        self.ready = base.config._attn_implementation == "sdpa"

    def step(self) -> torch.Tensor:
        """Return the logits (rows, vocabulary) of each text's next token, in float32."""
        mask = self.mask[:, None, None] if self.ready and self.ids.shape[1] == 1 else self.mask
        inputs = {"input_ids": self.ids, "attention_mask": mask, "position_ids": self.positions}
        out = self.model(**inputs, **self.last_only, cache=self.cache, use_cache=True, return_dict=True)
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits

    def append(self, tokens: torch.Tensor) -> None:
        """Append a token (rows) to each text."""
        self.ids = tokens[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
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
        kept, to, source = (torch.tensor(x, device=self.ids.device) for x in (order, holes, moved))
        self.ids, self.mask, self.positions = self.ids[kept], self.mask[kept], self.positions[kept]
        for layer in self.cache.layers:
            layer.keep(source.long(), to.long(), count)


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
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    step, often = 0, 1 if ids.device.type == "cpu" else _CHECK
    for step in range(room):
        tokens = batch.step().argmax(-1).masked_fill(ended, pad)
        answers[rows, step] = tokens
        ended |= torch.isin(tokens, ending)
        if step % often == often - 1 and (gone := ended.tolist()) and any(gone):
            if all(gone):
                break
            batch.append(tokens)
            batch.leave(gone)
            rows = torch.tensor(batch.rows, device=ids.device)
            ended = torch.zeros_like(ended[: len(rows)])
        else:
            batch.append(tokens)
    return torch.cat([ids, answers[:, : step + 1]], 1)
