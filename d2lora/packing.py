"""Examples packed into rows that hold a shared prompt once, and what a model makes of them.

A pair lies in its row as [prompt | chosen | rejected]. Positions restart after the prompt for each answer, and an answer sees
its prompt and itself, so every token gets what it would get in a sequence of its own (the idea of arXiv 2410.20305). The
language-model head runs only where a predicted token counts.
"""

from collections.abc import Sequence

import torch
from torch.nn.attention.flex_attention import create_block_mask
from trl.trainer.utils import FusedCausalLMOutput

Packed = dict[str, torch.Tensor]
_PROMPT, _IGNORED = -1, -100


def pack(examples: Sequence[dict], hidden: int | None, prompt_loss: bool = False) -> Packed:
    """One micro-batch, packed into rows.

    `examples` are P pairs {prompt_ids, chosen_ids, rejected_ids}, or sequences {input_ids, labels}; `hidden` is the width of
    the model, None puts all into one row (for FlexAttention, to which length costs nothing); with `prompt_loss` the prompts
    of pairs are predicted too.

    Returns, each (rows, length): `ids`, `positions`, `sequence` (number of the example, -1 in padding) and `part` (0 in a
    prompt, 1 and 2 in its answers). And for each of the T predicted tokens: its `target`, the `source` of its prediction (a
    place in the flattened rows), its `answer` (chosen ones from 0, rejected ones from P, -1 in a prompt) and `column` in it.
    `lengths` (2P) are the answers'.
    """
    parts = [_parts(e, prompt_loss) for e in examples]
    places, length = _places([sum(len(ids) for ids, _ in p) for p in parts], hidden)
    shape = (1 + max(row for row, _ in places), length)
    packed = {"ids": torch.zeros(shape, dtype=torch.long), "positions": torch.zeros(shape, dtype=torch.long)}
    packed |= {"sequence": torch.full(shape, -1), "part": torch.zeros(shape, dtype=torch.long)}
    predicted = []
    for index, (row, start) in enumerate(places):
        prompt = len(parts[index][0][0])
        for part, (ids, labels) in enumerate(parts[index]):
            here, first = (row, slice(start, start + len(ids))), prompt if part else 0
            packed["ids"][here] = torch.tensor(ids)
            packed["positions"][here] = torch.arange(first, first + len(ids))
            packed["sequence"][here], packed["part"][here] = index, part
            column = torch.tensor(labels).ne(_IGNORED).nonzero()[:, 0]
            source = row * length + start + column - 1
            source[column == 0] = row * length + places[index][1] + prompt - 1  # an answer follows its prompt
            answer = torch.full_like(column, index + (part - 1) * len(parts) if part else _PROMPT)
            predicted.append((torch.tensor(labels)[column], source, answer, column))
            start += len(ids)
    packed |= dict(
        zip(("target", "source", "answer", "column"), map(torch.cat, zip(*predicted, strict=True)), strict=True)
    )
    return packed | {"lengths": torch.tensor([len(p[k][0]) for k in (1, 2) for p in parts if len(p) > 1])}


def _parts(example: dict, prompt_loss: bool) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of an example's prompt and answers. Nothing predicts a sequence's first token."""
    if "input_ids" in example:
        return [(example["input_ids"], [_IGNORED, *example["labels"][1:]])]
    prompt = example["prompt_ids"]
    labels = [_IGNORED, *prompt[1:]] if prompt_loss else [_IGNORED] * len(prompt)
    return [(prompt, labels), *((example[k], example[k]) for k in ("chosen_ids", "rejected_ids"))]


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


def log_probs(model: torch.nn.Module, packed: Packed) -> FusedCausalLMOutput:
    """What TRL's fused head (`add_fused_lm_head`) says of the T predicted tokens, each (1, T): log_probs, entropy, ..."""
    backbone = model.get_base_model().base_model if hasattr(model, "get_base_model") else model.base_model

    def wanted(_module, _inputs, output):
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[packed["source"]][None]
        return output

    hook = backbone.register_forward_hook(wanted)
    try:
        return model(
            input_ids=packed["ids"],
            position_ids=packed["positions"],
            attention_mask=attention(packed, flex=backbone.config._attn_implementation == "flex_attention"),
            shift_labels=packed["target"][None],
            fused_lm_head=True,
        )
    finally:
        hook.remove()


def attention(packed: Packed, flex: bool = False):
    """Who sees whom: booleans (rows, 1, length, length), or a block mask that lets FlexAttention skip what nobody sees."""
    sequence, part = packed["sequence"], packed["part"]

    def sees(row, head, query, key):
        same = sequence[row, query] == sequence[row, key]
        return (query >= key) & same & ((part[row, key] == 0) | (part[row, query] == part[row, key]))

    rows, length = sequence.shape
    if flex:
        return create_block_mask(sees, rows, None, length, length, device=sequence.device)
    place = torch.arange(length, device=sequence.device)
    return sees(torch.arange(rows, device=sequence.device)[:, None, None, None], None, place[:, None], place)


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
