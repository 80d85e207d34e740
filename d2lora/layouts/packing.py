"""Lay examples into rows, and compute their tokens' log-probabilities from a model.

Packed, a pair is one stretch of a row, [prompt | chosen | rejected]. Positions restart after the prompt for each
answer, and an answer attends to its prompt and itself, so every token gets what it would get in a sequence of its own
(the idea of arXiv 2410.20305). That holds where masks by position describe a model's layers completely. Layers that
carry a state need each text in a row of its own: padded, or in passes of single texts. `check.py` tests on the
model which layouts are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import softmax
from trl.trainer.utils import FusedCausalLMOutput

from d2lora.data import Example
from d2lora.layouts import by_text
from d2lora.layouts.families import Reach

Packed = dict[str, Any]
FLEX = "flex_attention"
BLOCK = 128  # of FlexAttention: rows are whole blocks, so that kernels are compiled for few lengths
_PROMPT, _IGNORED = -1, -100


@dataclass(frozen=True)
class Layout:
    """How examples go through a model.

    rows: "packed" shares prompts and rows; "padded" gives each text a row; "single" gives each text a forward pass of
    its own.

    head: "fused" is TRL's, which never holds all logits; "whole" is the model's own.

    reaches: how far the layers of each type attend, for packed rows (`families.reaches`).

    attention: the implementation that the model runs with.

    step: rows that attention by text runs on are a multiple of so many tokens.

    filled: the least share of padded rows that is not padding; a text whose length would make it less gets another
    pass. At 0 all texts are in one pass, and in one row if packed.
    """

    rows: Literal["packed", "padded", "single"] = "packed"
    head: Literal["fused", "whole"] = "fused"
    reaches: dict[str, Reach] = field(default_factory=lambda: {"": Reach()})
    attention: str = "sdpa"
    step: int = 1
    filled: float = 0.8

    @property
    def name(self) -> str:
        """Return the name in records: "packed", "padded, whole logits" ..."""
        return self.rows + ("" if self.head == "fused" else ", whole logits")


@dataclass(frozen=True)
class _Piece:
    """A part of a text: ids and labels, its example, the answer that its predictions belong to, its number (0: prompt)."""

    ids: list[int]
    labels: list[int]
    example: int
    answer: int = _PROMPT
    part: int = 0


_Text = list[_Piece]


def pack(examples: Sequence[Example], layout: Layout, hidden: int, prompt_loss: bool = False) -> Packed:
    """Lay the examples of one micro-batch into rows.

    `examples` are P pairs {prompt_ids, chosen_ids, rejected_ids}, or sequences {input_ids, labels}; `hidden` is the
    model's width; with `prompt_loss` the prompts of pairs are predicted too.

    Returns `passes`, the forward passes (one, if packed), each with tensors (rows, length): `ids`, `positions`,
    `sequence` (number of the text in its pass, -1 in padding), `part` (0 in a prompt, 1 and 2 in its answers); and with
    `source`, for each of its predicted tokens the index, in the flattened rows, of the token before it. For all T
    predicted tokens: `target`, `example`, `answer` (chosen ones from 0, rejected ones from P, -1 in a prompt or
    sequence) and `column`, the index in that answer. `lengths` (2P) are the answers'. For attention by text, a pass has
    `stretches` (by_text.Stretches) too.
    """
    texts = [text for i, e in enumerate(examples) for text in _texts(e, i, len(examples), layout.rows, prompt_loss)]
    sizes = [sum(len(piece.ids) for piece in text) for text in texts]
    rows_and_tokens = [
        _lay([texts[i] for i in group], positions, length)
        for group, positions, length in _passes(sizes, layout, hidden)
    ]
    if layout.attention == by_text.BY_TEXT:
        for (rows, _), (group, positions, length) in zip(rows_and_tokens, _passes(sizes, layout, hidden), strict=True):
            pieces = [[len(piece.ids) for piece in texts[i]] for i in group]
            rows["stretches"] = by_text.of_row(pieces, [start for _, start in positions], length)
    predicted = [torch.cat(parts) for parts in zip(*(p for _, p in rows_and_tokens), strict=True)]
    lengths = [len(e[k]) for k in ("chosen_ids", "rejected_ids") for e in examples if k in e and "input_ids" not in e]
    return {
        "passes": [rows for rows, _ in rows_and_tokens],
        **dict(zip(("target", "example", "answer", "column"), predicted, strict=True)),
        "lengths": torch.tensor(lengths),
    }


def _texts(example: Example, index: int, count: int, rows: str, prompt_loss: bool) -> list[_Text]:
    """Return an example's texts: a pair is one text if packed, else two. A sequence's first token is never predicted."""
    if "input_ids" in example:
        return [[_Piece(example["input_ids"], [_IGNORED, *example["labels"][1:]], index)]]
    ids = example["prompt_ids"]
    unpredicted = _Piece(ids, [_IGNORED] * len(ids), index)
    prompt = _Piece(ids, [_IGNORED, *ids[1:]], index) if prompt_loss else unpredicted
    answers = [
        _Piece(example[k], example[k], index, index + part * count, part + 1)
        for part, k in enumerate(("chosen_ids", "rejected_ids"))
    ]
    return [[prompt, *answers]] if rows == "packed" else [[prompt, answers[0]], [unpredicted, answers[1]]]


def _lay(texts: list[_Text], starts: list[tuple[int, int]], length: int) -> tuple[Packed, tuple[torch.Tensor, ...]]:
    """Return one forward pass, and (target, example, answer, column) of its predicted tokens.

    Tensors are made once of whole lists: a few operations a pass, where each piece would cost a dozen.
    """
    shape = (1 + max(row for row, _ in starts), length)
    # Padded with a real token: the padding token's embedding may be 0, where the root of its norm has no gradient (Gemma 3n).
    filling = {"ids": texts[0][0].ids[0], "positions": 0, "part": 0, "sequence": -1}
    rows = {name: [value] * (shape[0] * length) for name, value in filling.items()}
    predicted: list[tuple[int, ...]] = []
    for index, (text, (row, start)) in enumerate(zip(texts, starts, strict=True)):
        begin, prompt = row * length + start, len(text[0].ids)
        at = begin
        for piece in text:
            size, first = len(piece.ids), prompt if piece.part else 0
            span = slice(at, at + size)
            rows["ids"][span], rows["positions"][span] = piece.ids, range(first, first + size)
            rows["sequence"][span], rows["part"][span] = [index] * size, [piece.part] * size
            before = [begin + prompt - 1, *range(at, at + size - 1)]  # an answer follows its prompt
            predicted += [
                (source, label, piece.example, piece.answer, column)
                for column, (source, label) in enumerate(zip(before, piece.labels, strict=True))
                if label != _IGNORED
            ]
            at += size
    source, *of_tokens = torch.tensor(predicted, dtype=torch.long).view(-1, 5).t().contiguous().unbind()
    tensors = {name: torch.tensor(values).view(shape) for name, values in rows.items()}
    return tensors | {"source": source, "target": of_tokens[0]}, tuple(of_tokens)


def _passes(sizes: list[int], layout: Layout, hidden: int) -> list[tuple[list[int], list[tuple[int, int]], int]]:
    """Return (texts, (row, start) of each, the rows' length) of each forward pass."""
    if layout.rows == "packed":
        return [(list(range(len(sizes))), *_positions(sizes, layout, hidden))]
    groups = _of_one_length(sizes, layout.filled) if layout.rows == "padded" else [[i] for i in range(len(sizes))]
    return [(group, [(row, 0) for row in range(len(group))], max(sizes[i] for i in group)) for group in groups]


def _of_one_length(sizes: list[int], filled: float) -> list[list[int]]:
    """Group the texts, longest first, so that each group's padded rows are filled as far as `filled` says."""
    groups: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        group = [*groups[-1], index] if groups else []
        if group and sum(sizes[i] for i in group) >= filled * len(group) * sizes[group[0]]:
            groups[-1] = group
        else:
            groups.append([index])
    return groups


def _positions(sizes: list[int], layout: Layout, hidden: int) -> tuple[list[tuple[int, int]], int]:
    """Return (row, start) of each example, and the rows' length: one row where attention skips what a mask would hide,
    else among several lengths the cheapest.

    A row costs its length in the linear layers and its square in attention; in a Llama the two are equal at a length of
    about six times the model's width.
    """
    skips = layout.attention in (FLEX, by_text.BY_TEXT)
    if skips or not layout.filled:
        starts, length = _first_fit(sizes, sum(sizes))
        step = layout.step if layout.attention == by_text.BY_TEXT else BLOCK
        return starts, -(-length // step) * step
    options = [_first_fit(sizes, int(max(sizes) * factor)) for factor in (1, 1.25, 1.5, 2, 3, 4)]
    return min(options, key=lambda t: (1 + max(row for row, _ in t[0])) * t[1] * (1 + t[1] / (6 * hidden)))


def _first_fit(sizes: list[int], capacity: int) -> tuple[list[tuple[int, int]], int]:
    """Put each example into the first row that has room for it, longest first."""
    filled: list[int] = []
    starts = [(0, 0)] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, tokens in enumerate(filled) if tokens + sizes[index] <= capacity), len(filled))
        if row == len(filled):
            filled.append(0)
        starts[index] = (row, filled[row])
        filled[row] += sizes[index]
    return starts, max(filled)


def log_probs(model: Any, packed: Packed, layout: Layout) -> FusedCausalLMOutput:
    """Return what TRL's fused head computes for the T predicted tokens, each (1, T): log_probs, entropy, ..."""
    forward = _fused if layout.head == "fused" else _whole
    outputs = [forward(model, rows, layout) for rows in packed["passes"]]
    if len(outputs) == 1:
        return outputs[0]
    fields = ("log_probs", "entropy", "mean_logits", "is_top1", "label_mask")
    joined = {k: [getattr(one, k) for one in outputs] for k in fields}
    return FusedCausalLMOutput(**{k: torch.cat(v, 1) for k, v in joined.items() if v[0] is not None})


def _fused(model: Any, rows: Packed, layout: Layout) -> FusedCausalLMOutput:
    """Run one pass through TRL's fused head, with hidden states only where a token is predicted."""
    backbone = model.get_base_model().base_model if hasattr(model, "get_base_model") else model.base_model

    def keep_sources(_module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[rows["source"]][None]
        return output

    hook = backbone.register_forward_hook(keep_sources)
    try:
        return model(**inputs(rows, layout, model.dtype), shift_labels=rows["target"][None], fused_lm_head=True)
    finally:
        hook.remove()


def _whole(model: Any, rows: Packed, layout: Layout) -> FusedCausalLMOutput:
    """Run one pass with the model's own head, for families whose head does more than multiply with its matrix."""
    logits = model(**inputs(rows, layout, model.dtype), use_cache=False).logits.flatten(0, 1)[rows["source"]].float()
    target, logps = rows["target"], logits.log_softmax(-1)
    return FusedCausalLMOutput(
        log_probs=logps.gather(1, target[:, None])[None, :, 0],
        entropy=-(softmax(logits, -1) * logps).sum(-1)[None],
        mean_logits=logits.mean(-1)[None],
        is_top1=(logits.argmax(-1) == target)[None],
        label_mask=torch.ones_like(target, dtype=torch.bool)[None],
    )


def inputs(rows: Packed, layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of a model's forward for one pass of a layout."""
    if layout.rows == "single":
        return {"input_ids": rows["ids"]}
    if layout.rows == "padded":
        return {"input_ids": rows["ids"], "attention_mask": (rows["sequence"] >= 0).long()}
    texts = {"input_ids": rows["ids"], "position_ids": rows["positions"]}
    if layout.attention == by_text.BY_TEXT:
        return texts | {"stretches": rows["stretches"]}
    masks = {name: attention(rows, reach, layout.attention, dtype) for name, reach in layout.reaches.items()}
    if layout.attention == "sdpa":  # which would turn booleans into numbers in each layer
        masks = {name: _added(mask, dtype) for name, mask in masks.items()}
    return texts | {"attention_mask": masks.get("", masks)}


def _added(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask to be added to scores, in the type that attention runs in."""
    kind = allowed.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def attention(rows: Packed, reach: Reach, kind: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """Return the mask by which tokens of packed rows attend to their own text only.

    Booleans (rows, 1, length, length) for sdpa; numbers to be added for eager; a block mask for FlexAttention. Windows
    and chunks are of positions: indices in a text, not in the row.
    """
    sequence, part, positions = rows["sequence"], rows["part"], rows["positions"]

    def attends(row: Any, _head: Any, query: Any, key: Any) -> torch.Tensor:
        same = sequence[row, query] == sequence[row, key]
        allowed = (query >= key) & same & ((part[row, key] == 0) | (part[row, query] == part[row, key]))
        if reach.kind == "sliding":
            allowed = allowed & (positions[row, query] - positions[row, key] < reach.size)
        elif reach.kind == "chunked":
            allowed = allowed & (positions[row, query] // reach.size == positions[row, key] // reach.size)
        return allowed

    count, length = sequence.shape
    if kind == FLEX:
        return create_block_mask(attends, count, None, length, length, device=sequence.device)
    index = torch.arange(length, device=sequence.device)
    allowed = attends(torch.arange(count, device=sequence.device)[:, None, None, None], None, index[:, None], index)
    if kind == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def by_answer(values: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Return values of the predicted tokens (1, T) as (2P, longest answer), zero behind an answer's end."""
    answers = packed["answer"] >= 0
    table = values.new_zeros(len(packed["lengths"]), int(packed["lengths"].max()))
    return table.index_put((packed["answer"][answers], packed["column"][answers]), values[0, answers])


def mask_of(packed: Packed) -> torch.Tensor:
    """Return a mask (2P, longest answer): 1 where an answer has a token."""
    return (
        torch.arange(int(packed["lengths"].max()), device=packed["lengths"].device) < packed["lengths"][:, None]
    ).long()
