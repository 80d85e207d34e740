"""Examples laid into rows, and what a model makes of them.

Packed, a pair lies in its row as [prompt | chosen | rejected]. Positions restart after the prompt for each answer, and an answer
sees its prompt and itself, so every token gets what it would get in a sequence of its own (the idea of arXiv 2410.20305). That
holds where masks by position describe a model's layers whole. A layer that carries a state needs its texts apart: padded, or one
by one. Which layout a model can do is proven (proof.py), not believed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import softmax
from trl.trainer.utils import FusedCausalLMOutput

from d2lora.layouts.families import Reach

Packed = dict[str, Any]
_PROMPT, _IGNORED = -1, -100


@dataclass(frozen=True)
class Layout:
    """How examples go through a model.

    rows: "packed" shares prompts and rows; "padded" gives each text a row; "single" each text a forward pass of its own.
    head: "fused" is TRL's, which makes no whole logits; "whole" is the model's own.
    reaches: of a model's types of layers, for packed rows (families.reaches).
    attention: the implementation that the model runs with.
    filled: the share of padded rows that is no padding, at least; texts of other lengths get a pass of their own. At 0 all lies in
        one pass, and in one row if packed.
    """

    rows: Literal["packed", "padded", "single"] = "packed"
    head: Literal["fused", "whole"] = "fused"
    reaches: dict[str, Reach] = field(default_factory=lambda: {"": Reach()})
    attention: str = "sdpa"
    filled: float = 0.8

    @property
    def name(self) -> str:
        """For records: "packed", "padded, whole logits" ..."""
        return self.rows + ("" if self.head == "fused" else ", whole logits")


@dataclass(frozen=True)
class _Piece:
    """A stretch of a text: its ids and labels, its example, the answer its predictions count for, and its part (0: a prompt)."""

    ids: list[int]
    labels: list[int]
    example: int
    answer: int = _PROMPT
    part: int = 0


_Text = list[_Piece]


def pack(examples: Sequence[dict], layout: Layout, hidden: int, prompt_loss: bool = False) -> Packed:
    """One micro-batch, laid into rows.

    `examples` are P pairs {prompt_ids, chosen_ids, rejected_ids}, or sequences {input_ids, labels}; `hidden` is the width of
    the model; with `prompt_loss` the prompts of pairs are predicted too.

    Returns `passes`, the forward passes (one, if packed), each with (rows, length): `ids`, `positions`, `sequence` (number of the
    text in its pass, -1 in padding), `part` (0 in a prompt, 1 and 2 in its answers), and the `source` of each of its predicted
    tokens (a place in the flattened rows). And for each of all T predicted tokens: its `target`, its `example`, its `answer` (chosen
    ones from 0, rejected ones from P, -1 in a prompt or sequence) and `column` in it. `lengths` (2P) are the answers'.
    """
    texts = [text for i, e in enumerate(examples) for text in _texts(e, i, len(examples), layout.rows, prompt_loss)]
    sizes = [sum(len(piece.ids) for piece in text) for text in texts]
    laid = [_lay([texts[i] for i in group], places, length) for group, places, length in _passes(sizes, layout, hidden)]
    predicted = [torch.cat(parts) for parts in zip(*(p for _, p in laid), strict=True)]
    lengths = [len(e[k]) for k in ("chosen_ids", "rejected_ids") for e in examples if k in e and "input_ids" not in e]
    return {
        "passes": [rows for rows, _ in laid],
        **dict(zip(("target", "example", "answer", "column"), predicted, strict=True)),
        "lengths": torch.tensor(lengths),
    }


def _texts(example: dict, index: int, count: int, rows: str, prompt_loss: bool) -> list[_Text]:
    """An example's texts: a pair is one if packed, else two. Nothing predicts a sequence's first token."""
    if "input_ids" in example:
        return [[_Piece(example["input_ids"], [_IGNORED, *example["labels"][1:]], index)]]
    ids = example["prompt_ids"]
    unseen = _Piece(ids, [_IGNORED] * len(ids), index)
    prompt = _Piece(ids, [_IGNORED, *ids[1:]], index) if prompt_loss else unseen
    answers = [
        _Piece(example[k], example[k], index, index + part * count, part + 1)
        for part, k in enumerate(("chosen_ids", "rejected_ids"))
    ]
    return [[prompt, *answers]] if rows == "packed" else [[prompt, answers[0]], [unseen, answers[1]]]


def _lay(texts: list[_Text], places: list[tuple[int, int]], length: int) -> tuple[Packed, tuple[torch.Tensor, ...]]:
    """One forward pass, and (target, example, answer, column) of its predicted tokens."""
    shape = (1 + max(row for row, _ in places), length)
    rows: Packed = {key: torch.zeros(shape, dtype=torch.long) for key in ("ids", "positions", "part")}
    rows["ids"] += texts[0][0].ids[
        0
    ]  # a padding token's embedding may be 0, and the root of its size has no gradient (Gemma 3n)
    rows["sequence"] = torch.full(shape, -1)
    sources, predicted = [], []
    for index, (text, (row, start)) in enumerate(zip(texts, places, strict=True)):
        begin, prompt = row * length + start, len(text[0].ids)
        for piece in text:
            here, first = (row, slice(start, start + len(piece.ids))), prompt if piece.part else 0
            rows["ids"][here] = torch.tensor(piece.ids, dtype=torch.long)
            rows["positions"][here] = torch.arange(first, first + len(piece.ids))
            rows["sequence"][here], rows["part"][here] = index, piece.part
            labels = torch.tensor(piece.labels, dtype=torch.long)
            column = labels.ne(_IGNORED).nonzero()[:, 0]
            source = row * length + start + column - 1
            source[column == 0] = begin + prompt - 1  # an answer follows its prompt
            whose = (torch.full_like(column, number) for number in (piece.example, piece.answer))
            sources.append(source)
            predicted.append((labels[column], *whose, column))
            start += len(piece.ids)
    of_tokens = tuple(torch.cat(parts) for parts in zip(*predicted, strict=True))
    return rows | {"source": torch.cat(sources), "target": of_tokens[0]}, of_tokens


def _passes(sizes: list[int], layout: Layout, hidden: int) -> list[tuple[list[int], list[tuple[int, int]], int]]:
    """(texts, (row, start) of each, the rows' length) of each forward pass."""
    if layout.rows == "packed":
        places, length = _places(sizes, None if layout.attention == "flex_attention" or not layout.filled else hidden)
        return [(list(range(len(sizes))), places, length)]
    groups = _of_one_length(sizes, layout.filled) if layout.rows == "padded" else [[i] for i in range(len(sizes))]
    return [(group, [(row, 0) for row in range(len(group))], max(sizes[i] for i in group)) for group in groups]


def _of_one_length(sizes: list[int], filled: float) -> list[list[int]]:
    """The texts in groups whose lengths differ so little that rows are filled, longest first."""
    groups: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        group = [*groups[-1], index] if groups else []
        if group and sum(sizes[i] for i in group) >= filled * len(group) * sizes[group[0]]:
            groups[-1] = group
        else:
            groups.append([index])
    return groups


def _places(sizes: list[int], hidden: int | None) -> tuple[list[tuple[int, int]], int]:
    """(row, start) of each example, and the rows' length: of some lengths the one that costs least.

    A row costs its length in the linear layers and the square of it in attention; in a Llama the two are equal at a length of
    about six times its width.
    """
    if hidden is None:
        places, length = _first_fit(sizes, sum(sizes))
        return places, -(-length // 128) * 128  # whole blocks, so that kernels are compiled for few lengths
    tries = [_first_fit(sizes, int(max(sizes) * factor)) for factor in (1, 1.25, 1.5, 2, 3, 4)]
    return min(tries, key=lambda t: (1 + max(row for row, _ in t[0])) * t[1] * (1 + t[1] / (6 * hidden)))


def _first_fit(sizes: list[int], capacity: int) -> tuple[list[tuple[int, int]], int]:
    """Each example in the first row that has room for it, longest first."""
    used: list[int] = []
    places = [(0, 0)] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, there in enumerate(used) if there + sizes[index] <= capacity), len(used))
        if row == len(used):
            used.append(0)
        places[index] = (row, used[row])
        used[row] += sizes[index]
    return places, max(used)


def log_probs(model: torch.nn.Module, packed: Packed, layout: Layout) -> FusedCausalLMOutput:
    """What TRL's fused head (`add_fused_lm_head`) says of the T predicted tokens, each (1, T): log_probs, entropy, ..."""
    forward = _fused if layout.head == "fused" else _whole
    said = [forward(model, rows, layout) for rows in packed["passes"]]
    if len(said) == 1:
        return said[0]
    fields = ("log_probs", "entropy", "mean_logits", "is_top1", "label_mask")
    given = {k: [getattr(one, k) for one in said] for k in fields}
    return FusedCausalLMOutput(**{k: torch.cat(v, 1) for k, v in given.items() if v[0] is not None})


def _fused(model: torch.nn.Module, rows: Packed, layout: Layout) -> FusedCausalLMOutput:
    """One pass through TRL's fused head, which runs only where a predicted token counts."""
    backbone = model.get_base_model().base_model if hasattr(model, "get_base_model") else model.base_model

    def wanted(_module, _inputs, output):
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[rows["source"]][None]
        return output

    hook = backbone.register_forward_hook(wanted)
    try:
        return model(**inputs(rows, layout, model.dtype), shift_labels=rows["target"][None], fused_lm_head=True)
    finally:
        hook.remove()


def _whole(model: torch.nn.Module, rows: Packed, layout: Layout) -> FusedCausalLMOutput:
    """One pass with the model's own head, for families that do more there than a product with its matrix."""
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
    """What a model's forward takes for one pass of a layout."""
    if layout.rows == "single":
        return {"input_ids": rows["ids"]}
    if layout.rows == "padded":
        return {"input_ids": rows["ids"], "attention_mask": (rows["sequence"] >= 0).long()}
    masks = {name: attention(rows, reach, layout.attention, dtype) for name, reach in layout.reaches.items()}
    mask = masks.get("", masks)
    return {"input_ids": rows["ids"], "position_ids": rows["positions"], "attention_mask": mask}


def attention(rows: Packed, reach: Reach, kind: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """Who sees whom in packed rows, as an implementation of attention takes it.

    Booleans (rows, 1, length, length) for sdpa; numbers to be added for eager; a block mask that lets FlexAttention skip what
    nobody sees. Windows and chunks are of positions: places in a text, not in the row.
    """
    sequence, part, positions = rows["sequence"], rows["part"], rows["positions"]

    def sees(row, head, query, key):
        same = sequence[row, query] == sequence[row, key]
        seen = (query >= key) & same & ((part[row, key] == 0) | (part[row, query] == part[row, key]))
        if reach.kind == "sliding":
            seen = seen & (positions[row, query] - positions[row, key] < reach.size)
        elif reach.kind == "chunked":
            seen = seen & (positions[row, query] // reach.size == positions[row, key] // reach.size)
        return seen

    count, length = sequence.shape
    if kind == "flex_attention":
        return create_block_mask(sees, count, None, length, length, device=sequence.device)
    place = torch.arange(length, device=sequence.device)
    seen = sees(torch.arange(count, device=sequence.device)[:, None, None, None], None, place[:, None], place)
    if kind == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def by_answer(values: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Values of the predicted tokens (1, T) as one row an answer (2P, longest answer), zero behind its end."""
    answers = packed["answer"] >= 0
    table = values.new_zeros(len(packed["lengths"]), int(packed["lengths"].max()))
    return table.index_put((packed["answer"][answers], packed["column"][answers]), values[0, answers])


def mask_of(packed: Packed) -> torch.Tensor:
    """(2P, longest answer): 1 where an answer has a token."""
    return (
        torch.arange(int(packed["lengths"].max()), device=packed["lengths"].device) < packed["lengths"][:, None]
    ).long()
