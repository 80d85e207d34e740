"""Continue the texts of a batch greedily: the cache has room for the tokens to come, and a text that has ended leaves
the batch.

`generate` of transformers copies the whole cache for every token, and computes texts that have ended until the last one
does. On a CPU that is most of its time.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin

from d2lora.layouts import families, llama, prepacked
from d2lora.layouts.by_rows import BY_ROWS
from d2lora.layouts.cache import Layer

_ROOM = 16  # tokens that a cache grows by: it is copied once in so many steps
# Steps between two looks at which texts have ended. Each look waits for a GPU; a CPU has computed it already.
_LOOK = {"cpu": 1, "cuda": 8}
# Tokens of prompts that a CPU computes in one pass: what a layer makes of more does not fit its cache.
_PROMPTS = {"cpu": 1024}
_MEMORY = 2**28  # bytes of keys and values up to which a CPU decodes more texts at once than it is asked to


@dataclass(frozen=True)
class Usual:
    """Passes by transformers' own code.

    `whole` is whether its attention takes a mask that is added to scores, over all of a cache's room.
    """

    model: torch.nn.Module
    whole: bool
    last_only: dict[str, int]  # only the last token's logits are needed: generate asks the same of a family's forward

    @classmethod
    def of(cls, model: torch.nn.Module, base: PreTrainedModel) -> "Usual":
        """Return the passes of the base, or of a model that is the base with an adapter."""
        parameters = inspect.signature(base.forward).parameters
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        return cls(model, _own(model, base).config._attn_implementation in ("sdpa", BY_ROWS), last_only)

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, layers: Sequence[Layer]
    ) -> torch.Tensor:
        """Return the logits (texts, vocabulary) of the token behind each text, and append the ids to the cache's layers.

        Ids and positions are (texts, tokens). The mask is True where a token of a prompt is, (texts, tokens); for one more
        token of each text, and `whole`, it is (texts, 1, 1, room), to be added to scores.
        """
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | self.last_only
        out = self.model(**inputs, cache=Cache(layers=list(layers)), use_cache=True, return_dict=True)
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits


Passes = Usual | llama.Decoder


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


@contextlib.contextmanager
def prepared(model: torch.nn.Module, base: PreTrainedModel) -> Iterator[Passes]:
    """Yield the passes for `greedy`, of the base or of a model that is the base with an adapter.

    On a CPU in float32 they are those of `llama` where the model's code is Llama's. Else its large weights are laid out anew
    inside the `with` block, and attention is computed by rows.
    """
    if as_llama(model):
        yield llama.Decoder(model)
        return
    own = _own(model, base)
    with contextlib.ExitStack() as stack:
        if _plain_cpu(base):
            stack.enter_context(prepacked.weights(model))
            if own.config._attn_implementation == "sdpa" and own._supports_attention_backend:
                stack.enter_context(families.attention(own, BY_ROWS))
        yield Usual.of(model, base)


def as_llama(model: torch.nn.Module) -> TypeGuard[PreTrainedModel]:
    """Tell whether the passes of a model are those of `llama`: there are copies of its weights, so they must fit."""
    return isinstance(model, PreTrainedModel) and _plain_cpu(model) and llama.suits(model) and prepacked.fits(model)


def _own(model: torch.nn.Module, base: PreTrainedModel) -> PreTrainedModel:
    """Return the model itself, which has a config, or the base that is inside of it."""
    return model if isinstance(model, PreTrainedModel) else base


def _plain_cpu(base: PreTrainedModel) -> bool:
    return base.device.type == "cpu" and base.dtype == torch.float32


def at_once(base: PreTrainedModel, batch: int, tokens: int) -> int:
    """Return how many texts of up to `tokens` tokens to decode at once where a batch of `batch` is asked for.

    In float32 on a CPU the answers do not depend on it, and each pass of a small model costs more in Python than for a
    text: as many more as _MEMORY has room for.
    """
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    text = 2 * 4 * config.num_hidden_layers * heads * width * tokens
    return max(batch, _MEMORY // text) if _plain_cpu(base) else batch


class Batch:
    """Texts that are being continued, padded on the left: ids and mask are (texts, tokens).

    `rows` says which texts are left, in the order of the logits that `prompts` and `step` return.
    """

    def __init__(self, passes: Passes, base: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.passes, self.dtype = passes, base.dtype
        self.tokens = ids.shape[1]
        self.room = self.tokens + _ROOM
        count = len(DynamicCache(config=base.config).layers)
        self.layers = [Layer(len(ids), self.room, passes.whole) for _ in range(count)]
        self.rows = list(range(len(ids)))
        self.ids, self.mask = ids, mask.bool()
        self.positions = (mask.long().cumsum(-1) - 1).clamp(min=0)

    def prompts(self) -> torch.Tensor:
        """Return the logits (rows, vocabulary) of each text's first new token, in float32."""
        padding: list[int] = (~self.mask).sum(-1).tolist()  # tokens before each row's text
        logits, first = [], 0
        while first < len(self.rows):
            count = self._at_once(self.tokens - padding[first])
            some, shared = slice(first, first + count), min(padding[first : first + count])
            for layer in self.layers:
                layer.first, layer.padding = first, shared
            ids, mask, positions = (part[some, shared:] for part in (self.ids, self.mask, self.positions))
            logits.append(self.passes(ids, mask, positions, self.layers))
            first += count
        for layer in self.layers:
            layer.first = layer.padding = 0
        if self.passes.whole:
            seen = torch.zeros(self.mask.shape, dtype=self.dtype, device=self.mask.device)
            self.mask = self._with_room(seen.masked_fill_(~self.mask, float("-inf"))[:, None, None])
        return torch.cat(logits)

    def _at_once(self, tokens: int) -> int:
        """Return how many prompts of so many tokens to compute in one pass."""
        return max(1, _PROMPTS.get(self.ids.device.type, self.ids.numel()) // tokens)

    def _with_room(self, mask: torch.Tensor) -> torch.Tensor:
        """Return a mask that hides what room there is behind it."""
        return torch.nn.functional.pad(mask, (0, self.room - mask.shape[-1]), value=float("-inf"))

    def step(self) -> torch.Tensor:
        """Return the same after a token was appended to each text."""
        return self.passes(self.ids, self.mask, self.positions, self.layers)

    def append(self, tokens: torch.Tensor) -> None:
        """Append a token (rows) to each text."""
        self.ids, self.positions = tokens[:, None], self.positions[:, -1:] + 1
        self.tokens += 1
        if self.tokens > self.room:
            self._grow()
        if self.passes.whole:
            self.mask[..., self.tokens - 1] = 0
        else:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], -1)

    def _grow(self) -> None:
        self.room += _ROOM
        for layer in self.layers:
            layer.grow(self.room)
        if self.passes.whole:
            self.mask = self._with_room(self.mask)

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
    passes: Passes,
    base: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    room: int,
    ends: Sequence[int],
    pad: int,
    stopped: Callable[[list[int]], bool] | None = None,
) -> torch.Tensor:
    """Return the texts with their greedy continuations, (texts, tokens and up to `room` more), as `generate` does.

    A continuation ends with the first of the `ends`, or soon after `stopped` is true of its tokens, and is padded after it.
    """
    batch, ending = Batch(passes, base, ids, mask), torch.tensor(list(ends), device=ids.device)
    answers = torch.full((len(ids), room), pad, device=ids.device)
    rows = torch.arange(len(ids), device=ids.device)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    often = _LOOK.get(ids.device.type, 1)
    for step in range(room):
        logits = batch.step() if step else batch.prompts()
        tokens = logits.argmax(-1).masked_fill(ended, pad)
        answers[rows, step] = tokens
        ended |= torch.isin(tokens, ending)
        gone: list[bool] = ended.tolist() if step % often == often - 1 else []
        if gone and stopped:
            gone = [
                end or stopped(answer) for end, answer in zip(gone, answers[rows, : step + 1].tolist(), strict=True)
            ]
        if gone and all(gone):
            return torch.cat([ids, answers[:, : step + 1]], 1)
        batch.append(tokens)
        if any(gone):
            batch.leave(gone)
            rows, ended = rows.new_tensor(batch.rows), ended.new_zeros(len(batch.rows))
    return torch.cat([ids, answers], 1)
