"""Which layout is exact for which of transformers' text families: each in a tiny random configuration.

    python benchmarks/families.py [--only NAME...] [--csv FILE] [--markdown docs/models.md]

For each configuration, against plain passes of single unpadded texts: the largest difference of the log-probabilities of answers'
tokens in three pairs packed with one boolean mask, and in the same texts padded, both through TRL's fused head as in training;
and how many of four greedy answers in a left-padded batch are those of each alone.
"""

import argparse
import csv
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from configurations import configurations
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SCALE = 4  # a model without opinions hides what it is given: fresh weights are that much larger
NEW_TOKENS = 8
Pair = dict[str, list[int]]


def build(config: PretrainedConfig) -> PreTrainedModel:
    """The model with random weights of one seed, on sdpa unless its family has none."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "A_log" not in name:
                weight *= SCALE
    return model


def pairs() -> list[Pair]:
    """Three pairs whose texts, prompt and answer, have 20 to 60 tokens."""
    random = torch.Generator().manual_seed(0)
    lengths = [(12, 9, 25), (31, 29, 10), (20, 14, 40)]
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    ids = [[torch.randint(3, 1000, (n,), generator=random).tolist() for n in three] for three in lengths]
    return [dict(zip(keys, three, strict=True)) for three in ids]


def texts(examples: Iterable[Pair]) -> Iterator[tuple[list[int], int]]:
    """(ids, length of the answer) of each prompt with an answer: all chosen ones, then all rejected ones."""
    examples = list(examples)
    for answer in ("chosen_ids", "rejected_ids"):
        for pair in examples:
            yield pair["prompt_ids"] + pair[answer], len(pair[answer])


def answer_log_probs(logits: torch.Tensor, ids: list[int], answer: int) -> torch.Tensor:
    """The log-probabilities of a text's last `answer` tokens. `logits` (length, vocabulary) are those of the text."""
    found = logits[: len(ids) - 1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return found[-answer:]


def plain(model: PreTrainedModel, examples: list[Pair]) -> torch.Tensor:
    """Each text by itself, unpadded."""
    return torch.cat([answer_log_probs(model(torch.tensor([ids])).logits[0], ids, n) for ids, n in texts(examples)])


def padded(model: PreTrainedModel, examples: list[Pair]) -> torch.Tensor:
    """All texts in one batch, padded on the right."""
    lengths = [len(ids) for ids, _ in texts(examples)]
    batch = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, (ids, _) in zip(batch, texts(examples), strict=True):
        row[: len(ids)] = torch.tensor(ids)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    labels = batch.masked_fill(~mask, -100)[:, 1:]
    found = model(
        batch, attention_mask=mask.long(), shift_labels=pad(labels, (0, 1), value=-100), fused_lm_head=True
    ).log_probs
    ends = [(len(ids) - 1, answer) for ids, answer in texts(examples)]
    return torch.cat([row[end - answer : end] for row, (end, answer) in zip(found, ends, strict=True)])


def packed(model: PreTrainedModel, examples: list[Pair]) -> torch.Tensor:
    """All pairs in one row, with one boolean mask and positions that restart."""
    from d2lora import packing

    batch = packing.pack(examples, hidden=None)
    found = packing.log_probs(model, batch).log_probs[0]
    return found[torch.argsort(batch["answer"], stable=True)]


def greedy(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """The greedy answers to prompts in one batch, padded on the left."""
    length = max(map(len, prompts))
    batch = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    fixed = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    return model.generate(batch, attention_mask=mask, **fixed)[:, length:].tolist()


def greedy_same(model: PreTrainedModel, examples: list[Pair]) -> str:
    """How many of four greedy answers in a batch are those that each prompt gets alone."""
    prompts = [ids for ids, _ in texts(examples)][:4]
    together = greedy(model, prompts)
    return f"{sum(greedy(model, [p])[0] == a for p, a in zip(prompts, together, strict=True))}/{len(prompts)}"


def apart(found: torch.Tensor, expected: torch.Tensor) -> str:
    """The largest difference, or which of the two holds something that is no number."""
    return f"{(found - expected).abs().max():.1e}" if found.isfinite().all() else "not finite"


# Column -> what it holds of a model with TRL's fused head, given the pairs and the right log-probabilities of their answers.
MEASURES: dict[str, Callable[[PreTrainedModel, list[Pair], torch.Tensor], str]] = {
    "attention": lambda model, examples, right: model.config._attn_implementation,
    "packed_max_difference": lambda model, examples, right: apart(packed(model, examples), right),
    "padded_max_difference": lambda model, examples, right: apart(padded(model, examples), right),
    "greedy_in_a_batch_of_4_same_as_alone": lambda model, examples, right: greedy_same(model, examples),
}


@torch.no_grad()
def measure(family: str, make: Callable[[], PretrainedConfig]) -> dict[str, str]:
    """A configuration's line of the table. A measure that fails is its error: that is what a user would meet."""
    examples, row = pairs(), {"family": family}
    model = build(make())
    right = plain(model, examples)
    if not right.isfinite().all():
        raise ValueError(f"{family}: the log-probabilities of its own plain passes are not finite")
    add_fused_lm_head(model)
    for column, of in MEASURES.items():
        try:
            row[column] = of(model, examples, right)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            row[column] = f"raises {type(error).__name__}: {reason}"[:120]
    return row


def markdown(rows: list[dict[str, str]]) -> str:
    """The table as a page."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "trl"))
    lines = [f"{len(rows)} tiny random models of transformers' text families, called directly ({versions})."]
    lines += ["Made by `python benchmarks/families.py --markdown docs/models.md`, not by hand.", ""]
    lines += [_line(name.replace("_", " ") for name in rows[0]), _line("---" for _ in rows[0])]
    lines += [_line(row.values()) for row in rows]
    return "\n".join(["# Models", "", *lines, ""])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations")
    parser.add_argument("--csv", type=Path, help="write the table here, too")
    parser.add_argument("--markdown", type=Path, help="write it as a page here, too")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    everything = configurations()
    if unknown := [name for name in args.only or () if name not in everything]:
        parser.error(f"no configuration is named {', '.join(unknown)}; there are: {', '.join(everything)}")
    rows = []
    for name in args.only or everything:
        clock = time.monotonic()
        rows.append(measure(name, everything[name]))
        print(f"{len(rows):>3} {time.monotonic() - clock:4.1f} s  {name}", file=sys.stderr, flush=True)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    print(table.getvalue(), end="")
    if args.csv:
        args.csv.write_text(table.getvalue())
    if args.markdown:
        args.markdown.write_text(markdown(rows))


if __name__ == "__main__":
    main()
