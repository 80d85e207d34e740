"""How much of a test set a training set contains: the same question, or 13 words in a row. Pure functions.

As in GPT-3's check (Brown et al. 2020, appendix C) texts are compared as words, lower-cased and without punctuation, and an
item counts as overlapping if one of its word 13-grams occurs in the training set. Two differences: here a question of fewer
than 13 words can only be found as a whole (GPT-3 goes down to 8-grams), and no 13-gram is left out for being frequent.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

NGRAM = 13
_MARKS = re.compile(r"[^\w\s]+")
Row = dict


def words(text: str) -> list[str]:
    """The words of a text, lower-cased and without punctuation."""
    return _MARKS.sub("", text.lower()).split()


def ngrams(found: list[str]) -> Iterator[tuple[str, ...]]:
    """All runs of NGRAM words, in order."""
    return zip(*(found[start:] for start in range(NGRAM)), strict=False)


def texts(row: Row, columns: list[str]) -> list[str]:
    """The texts of a row's columns, each for itself; of a list (a conversation, a question's options), those of its elements."""
    found = []
    for value in (row[column] for column in columns):
        found += _inner(value) if isinstance(value, list) else [str(value)]
    return found


def _inner(value: Any) -> list[str]:
    """The texts in a list or in an element of one: of a turn its content, of other mappings all values."""
    if isinstance(value, dict):
        value = [value["content"]] if "content" in value else list(value.values())
    return [text for inner in value for text in _inner(inner)] if isinstance(value, list) else [str(value)]


def overlap(
    tests: list[Row],
    question: list[str],
    answer: list[str],
    rows: list[Row],
    columns: list[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict]:
    """The items of a test set that a training set contains, in order: {index, question, exact, ngram13, ngram}.

    `exact` is the first row one of whose texts is the item's question, `ngram13` the first that shares a 13-gram with its
    question or answer, and `ngram` those words; None where there is no such row. `question`, `answer` and `columns` name
    the columns that are read.
    """
    whole, runs = _index(tests, question, answer)
    hits: dict[int, dict] = defaultdict(dict)
    seen: set[str] = set()
    for number, row in enumerate(rows):
        for text in texts(row, columns):
            if text not in seen:  # the columns of a data set repeat each other much
                seen.add(text)
                _note(hits, whole, runs, number, words(text))
        if number % 1000 == 0 or number == len(rows) - 1:
            progress(number + 1, len(rows))
    empty = {"exact": None, "ngram13": None, "ngram": None}
    return [{"index": i, "question": " ".join(texts(tests[i], question)), **empty, **hits[i]} for i in sorted(hits)]


def _index(tests: list[Row], question: list[str], answer: list[str]) -> tuple[dict, dict]:
    """Whole questions -> items, and 13-grams of questions and answers -> items."""
    whole: dict[tuple, list[int]] = defaultdict(list)
    runs: dict[tuple, list[int]] = defaultdict(list)
    for item, row in enumerate(tests):
        asked = tuple(words(" ".join(texts(row, question))))
        if asked:
            whole[asked].append(item)
        for text in texts(row, [*question, *answer]):
            for run in ngrams(words(text)):
                runs[run].append(item)
    return dict(whole), dict(runs)


def _note(hits: dict[int, dict], whole: dict, runs: dict, number: int, found: list[str]) -> None:
    """Note for each item whether it is, or shares a run with, a text of the row; the first row counts."""
    for item in whole.get(tuple(found), ()):
        hits[item].setdefault("exact", number)
    if len(found) < NGRAM or runs.keys().isdisjoint(ngrams(found)):
        return
    for run in ngrams(found):
        for item in runs.get(run, ()):
            if "ngram13" not in hits[item]:
                hits[item] |= {"ngram13": number, "ngram": " ".join(run)}


def shares(items: list[dict], total: int) -> dict:
    """Metrics {name: {value, stderr, items}}: the share of all items. The standard error is 0: no item is left out."""
    return {
        name: {"value": sum(item[name] is not None for item in items) / total, "stderr": 0.0, "items": total}
        for name in ("exact", "ngram13")
    }
