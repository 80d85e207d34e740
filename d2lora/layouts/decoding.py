"""Continue the texts of a batch greedily: the cache has room for the tokens to come, and a text that has ended leaves
the batch.

`generate` of transformers copies the whole cache for every token, and computes texts that have ended until the last one
does. On a CPU that is most of its time.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from d2lora.layouts import families, prepacked

BY_ROWS = "by_rows"  # the name under which transformers knows `attend`
_BLOCK = 64  # texts whose attention is computed in one call
_MEMORY = 2**28  # bytes of keys and values up to which a CPU decodes more texts at once than it is asked to
# Tokens that a cache grows by: it is copied once in so many steps. A CPU's memory is not taken before it is written.
_ROOM = {"cpu": 64, "cuda": 16}
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


def _plain_cpu(base: PreTrainedModel) -> bool:
    return base.device.type == "cpu" and base.dtype == torch.float32


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    starts: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute PyTorch's attention as transformers calls it for each layer, for one token of each text.

    `starts` has the first tokens of each _BLOCK texts: what is padding in all of them is not read.
    """
    if starts is None or attention_mask is None or query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for block, start in enumerate(starts):
        some, seen = slice(_BLOCK * block, _BLOCK * (block + 1)), slice(start, None)
        states = query[some], key[some, :, seen], value[some, :, seen], attention_mask[some, ..., seen]
        outputs.append(sdpa_attention_forward(module, *states, **kwargs)[0])
    return torch.cat(outputs), None


ALL_ATTENTION_FUNCTIONS.register(BY_ROWS, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(BY_ROWS, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextlib.contextmanager
def prepared(model: torch.nn.Module, base: PreTrainedModel) -> Iterator[None]:
    """Prepare a model for `greedy` inside the `with` block: on a CPU, lay out its large weights, and compute attention by
    rows.
    """
    own = model if isinstance(model, PreTrainedModel) else base
    with contextlib.ExitStack() as stack:
        if _plain_cpu(base):
            stack.enter_context(prepacked.weights(model))
            if own.config._attn_implementation == "sdpa" and own._supports_attention_backend:
                stack.enter_context(families.attention(own, BY_ROWS))
        yield


class _Growing:
    """The keys or values of a layer, (texts, heads, tokens, width), in a larger tensor that has room for more tokens."""

    def __init__(self, texts: int) -> None:
        self.texts, self.tokens = texts, 0
        self.whole: torch.Tensor | None = None

    def write(self, new: torch.Tensor, first: int, padding: int) -> torch.Tensor:
        """Write states (some texts, heads, new tokens, width) of the texts from `first` on behind those that they have.

        They begin behind so many tokens of `padding`, which become zeros. Return all states of these texts but those.
        """
        begin = self.tokens + padding
        end, last = begin + new.shape[2], first + len(new)
        whole = self._with_room(new, end)
        if padding:
            whole[first:last, :, :begin] = 0
        whole[first:last, :, begin:end] = new
        self.tokens = end if last == self.texts else self.tokens
        return whole[first:last, :, padding:end]

    def _with_room(self, new: torch.Tensor, end: int) -> torch.Tensor:
        """Return the whole tensor, with room for the tokens before `end`."""
        if self.whole is None or end > self.whole.shape[2]:
            room = _ROOM.get(new.device.type, 16)
            larger = new.new_empty(self.texts, new.shape[1], end + room, new.shape[3])
            if self.whole is not None:
                larger[:, :, : self.tokens] = self.read()
            self.whole = larger
        return self.whole

    def read(self) -> torch.Tensor:
        """Return the states of all texts."""
        assert self.whole is not None, "a pass comes first"
        return self.whole[: self.texts, :, : self.tokens]

    def keep(self, moved: torch.Tensor, holes: torch.Tensor, count: int) -> torch.Tensor:
        """Write the texts `moved` over the `holes`, and return the first `count`."""
        states = self.read()
        states[holes] = states[moved]
        self.texts = count
        return self.read()


class _Layer(DynamicLayer):
    """A layer of transformers' cache whose keys and values are not copied for every token.

    `first` is the number of the first text in the next pass: prompts may be computed some texts at a time, without the
    tokens of `padding` that they all begin with.
    """

    def __init__(self, texts: int) -> None:
        super().__init__()
        self.parts, self.first, self.padding = (_Growing(texts), _Growing(texts)), 0, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the tokens of a pass, and return keys and values of its texts."""
        keys, values = (
            part.write(new, self.first, self.padding)
            for part, new in zip(self.parts, (key_states, value_states), strict=True)
        )
        if self.first + len(keys) == self.parts[0].texts:
            self.keys, self.values = (part.read() for part in self.parts)
            self.is_initialized = True
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
        self.padding: list[int] = (~self.mask).sum(-1).tolist()  # tokens before each row's text
        # Only the last token's logits are needed. generate asks the same of a family's forward.
        parameters = inspect.signature(base.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        own = model if isinstance(model, PreTrainedModel) else base
        self.attention = own.config._attn_implementation

    def prompts(self) -> torch.Tensor:
        """Return the logits (rows, vocabulary) of each text's first new token, in float32."""
        logits, first = [], 0
        while first < len(self.rows):
            count = self._at_once(self.ids.shape[1] - self.padding[first])
            some, padding = slice(first, first + count), min(self.padding[first : first + count])
            for layer in self.layers:
                layer.first, layer.padding = first, padding
            logits.append(self._pass(*(part[some, padding:] for part in (self.ids, self.mask, self.positions))))
            first += count
        for layer in self.layers:
            layer.first = layer.padding = 0
        if self.attention in ("sdpa", BY_ROWS):  # which takes a mask for one token as it is, added
            unseen = torch.zeros(self.mask.shape, dtype=self.base.dtype, device=self.mask.device)
            self.mask = unseen.masked_fill_(~self.mask, float("-inf"))[:, None, None]
        return torch.cat(logits)

    def _at_once(self, tokens: int) -> int:
        """Return how many prompts of so many tokens to compute in one pass."""
        return max(1, _PROMPTS.get(self.ids.device.type, self.ids.numel()) // tokens)

    def step(self) -> torch.Tensor:
        """Return the same after a token was appended to each text."""
        starts = {}
        if self.attention == BY_ROWS:
            firsts = range(0, len(self.rows), _BLOCK)
            starts = {"starts": [min(self.padding[first : first + _BLOCK]) for first in firsts]}
        return self._pass(self.ids, self.mask, self.positions, **starts)

    def _pass(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, **more: Any) -> torch.Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | more
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
        self.rows, self.padding = ([part[row] for row in order] for part in (self.rows, self.padding))
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
    stopped: Callable[[list[int]], bool] | None = None,
) -> torch.Tensor:
    """Return the texts with their greedy continuations, (texts, tokens and up to `room` more), as `generate` does.

    A continuation ends with the first of the `ends`, or soon after `stopped` is true of its tokens, and is padded after it.
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
