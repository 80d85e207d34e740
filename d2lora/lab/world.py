"""Define what all rows that the lab warms up, trains and tests on have in common: names, prompts, splits.

Everything is a pure function of a `random.Random`, so a seed gives the same rows on any machine. A hash of a row's
text decides its split, so the base's corpus, train, validation and test never share a row.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

NAMES = [
    *("Ann", "Ben", "Cara", "Dan", "Eve", "Finn", "Gina", "Hugo", "Iris", "Jack"),
    *("Kim", "Leo", "Mia", "Ned", "Olga", "Paul", "Rosa", "Sam", "Tina", "Vic"),
]
THINGS = [
    *("apples", "books", "coins", "shells", "stamps", "cards", "pens", "rocks", "eggs", "toys"),
    *("cups", "keys", "balls", "beads", "seeds", "plums", "nuts", "hats", "kites", "nails"),
]

# Percent of all rows, by a hash of the row's text.
SPLITS = {"corpus": 50, "train": 40, "validation": 4, "test": 6}

# The paper's, Appendix A.
PROMPT = "{question} Please reason step by step, and put your final answer within \\boxed{{}}."
TITLE_PROMPT = "Write a title for this abstract: {abstract}"


class Identified(Protocol):
    """Anything that a text identifies: a word problem, a row."""

    @property
    def text(self) -> str:
        """Return the text."""


R = TypeVar("R", bound=Identified)


@dataclass(frozen=True)
class Row:
    """A row of a data set (`fields`), which `text` identifies."""

    text: str
    fields: dict[str, Any]


def split_of(text: str) -> str:
    """Return the split that a row with this text belongs to: a pure function of the text."""
    slot = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100
    for split, share in SPLITS.items():
        if slot < share:
            return split
        slot -= share
    raise AssertionError("the shares of SPLITS add up to 100")


def distinct(make: Callable[[random.Random], R], split: str, count: int, seed: int) -> Iterator[R]:
    """Yield `count` different rows of one split, in a seeded order."""
    rng = random.Random(f"{seed}/{split}")
    texts: set[str] = set()
    while len(texts) < count:
        row = make(rng)
        if row.text not in texts and split_of(row.text) == split:
            texts.add(row.text)
            yield row
