"""Divide an effective batch into forward passes, and into smaller ones where memory ends.

Losses are sums over the effective batch (common.py), so how it is divided changes nothing beyond rounding.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from d2lora.data import Example
from d2lora.errors import UserError
from d2lora.outputs import write_json
from d2lora.settings.recipe import PASS_TOKENS

T = TypeVar("T")

_ADVICE = "out of memory: try recipe.gradient_checkpointing=true, a smaller recipe.max_length or a larger GPU"


def tokens_of(example: Example, packed: bool = True) -> int:
    """Count the tokens of a row that go through the model, without padding; packed, a pair's prompt once."""
    if "turns" in example:
        return sum(tokens_of(sequence, packed) for sequence in example["turns"])
    prompt = len(example.get("prompt_ids", ())) * (1 if packed else 2)
    return prompt + sum(len(example[k]) for k in ("input_ids", "chosen_ids", "rejected_ids") if k in example)


@dataclass
class Passes:
    """How much goes through the model at once: `rows` of them, or as many as `tokens` hold (at least one).

    `file` remembers the tokens for which memory sufficed, for the next training of this kind.
    """

    rows: int | None
    tokens: int = 0
    file: Path | None = None
    limited: bool = False  # memory has ended, now or in an earlier training: tokens are what it sufficed for

    @classmethod
    def of(cls, micro_batch: int | Literal["auto"], device: str, file: Path | None = None) -> "Passes":
        """Return the passes of a recipe, with the tokens that the file remembers."""
        if micro_batch != "auto":
            return cls(micro_batch)
        most = tokens = PASS_TOKENS[device]
        if file is not None:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                tokens = min(tokens, max(1, int(json.loads(file.read_text())["tokens"])))
        return cls(None, tokens, file, limited=tokens < most)

    @property
    def setting(self) -> str:
        """Return the setting as messages show it."""
        return (
            f"recipe.micro_batch={self.rows}"
            if self.rows
            else f"recipe.micro_batch=auto, {self.tokens:,} tokens a pass"
        )

    @property
    def metrics(self) -> dict[str, Any]:
        """Return what a record says of it."""
        return {"micro_batch": self.rows} if self.rows else {"micro_batch": "auto", "pass_tokens": self.tokens}

    def texts_at_once(self, batch: int, length: int) -> int:
        """Return how many texts of up to `length` tokens a test may put through the model at once: a batch, where it fits."""
        if self.rows:
            return self.rows
        return max(1, min(batch, self.tokens // length)) if self.limited else batch

    def parts(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Divide examples, in their order, into those of each pass; by tokens, into passes of nearly the same size."""
        if self.rows:
            return [list(examples[i : i + self.rows]) for i in range(0, len(examples), self.rows)]
        counts = [tokens_of(example) for example in examples]
        share = sum(counts) / max(1, -(-sum(counts) // self.tokens))
        parts: list[list[Example]] = []
        filled = 0
        for example, count in zip(examples, counts, strict=True):
            if not parts or filled + count > self.tokens or filled >= share:
                parts.append([])
                filled = 0
            parts[-1].append(example)
            filled += count
        return parts

    def halve(self, examples: Sequence[Example] = ()) -> None:
        """Halve the passes after memory has ended, in a pass of these examples if it was in one: that is remembered.

        UserError if nothing can be halved.
        """
        if self.rows and len(examples) > self.rows:
            return  # more than a pass has, tried for speed (a reference's): to be divided is enough
        if self.rows == 1 or len(examples) == 1 or (not self.rows and self.tokens < 2):
            raise UserError(f"recipe.micro_batch={self.rows or 'auto, a single row'}: {_ADVICE}")
        if self.rows:
            self.rows = min(self.rows, len(examples) or self.rows) // 2
        else:
            self.tokens = min(self.tokens, sum(map(tokens_of, examples)) or self.tokens) // 2
        self.limited = True
        if self.file is not None and examples:
            write_json(self.file, {"tokens": self.tokens})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"out of memory: again with {self.setting}", file=sys.stderr)

    def each(
        self,
        parts: Sequence[list[Example]],
        work: Callable[[list[Example]], T],
        undo: Callable[[], None] = lambda: None,
    ) -> list[T]:
        """Return work's results of all parts. A part for which memory ends is undone and divided, and the work goes on."""
        todo, results = list(parts), []
        while todo:
            result = _unless_memory_ends(work, todo[0])
            if result is not None:
                results.append(result)
                todo = todo[1:]
                continue
            undo()
            self.halve(todo[0])
            todo = [smaller for part in todo for smaller in self.parts(part)]
        return results


def _unless_memory_ends(work: Callable[[list[Example]], T], part: list[Example]) -> T | None:
    """Return work(part), or None: outside of `except` the error's frames hold no memory any more."""
    try:
        return work(part)
    except torch.OutOfMemoryError:
        return None
