"""Search a test set in a training set: the same question, or 13 words in a row. Pure functions.

As in GPT-3's check (Brown et al. 2020, appendix C) texts are compared as words, lower-cased and without punctuation,
and an item counts as overlapping if one of its word 13-grams occurs in the training set. Two differences: a question of
fewer than 13 words is only found as a whole (GPT-3 goes down to 8-grams), and no 13-gram is ignored for being frequent.

Questions are compared both as the columns have them and as the prompt templates render them. 13-grams are taken only
from the values that rows fill in: a template's own wording is the same in all rows, so a 13-gram with a word of it says
nothing of an item.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from d2lora.data.files import Row
from d2lora.data.texts import fill
from d2lora.data.wording import NGRAM, Group, as_one, fill_template, ngrams, template, texts, words
from d2lora.progress import Progress
from d2lora.records import Score

Words = tuple[str, ...]


@dataclass(frozen=True)
class TestSet:
    """Test items, the columns of their questions and answers, and the templates that render them (empty: none)."""

    rows: list[Row]
    question: list[str]
    answer: list[str]
    prompt: str = ""
    gold: str = ""


@dataclass(frozen=True)
class TrainingSet:
    """Training rows, the columns to read, and the templates by which the rows become texts."""

    rows: list[Row]
    columns: list[str]
    templates: tuple[str, ...] = ()


class Hit(TypedDict):
    """An item of a test set that a training set contains, and the words that both have; a line of items.jsonl."""

    index: int
    question: str
    exact: int | None  # the first row one of whose texts is the item's question
    ngram13: int | None  # the first row that shares a 13-gram with its question or answer
    ngram: str | None  # those words


@dataclass
class _First:
    """The first rows of the training set that an item overlaps with."""

    exact: int | None = None
    ngram13: int | None = None
    ngram: str | None = None


class _Index(NamedTuple):
    """The items of a test set by whole questions and by 13-grams of questions and answers; and five words of each
    13-gram.
    """

    questions: dict[Words, list[int]]
    runs: dict[Words, list[int]]
    samples: set[Words]


def overlap(tests: TestSet, training: TrainingSet, progress: Progress = lambda done, total: None) -> list[Hit]:
    """Return the items of a test set that a training set contains, in order."""
    hits = _search(_index(tests), training, progress)
    return [_hit(item, _question(tests, item), hits[item]) for item in sorted(hits)]


def _hit(item: int, question: str, first: _First) -> Hit:
    """Return the outcome of an item."""
    return Hit(index=item, question=question, exact=first.exact, ngram13=first.ngram13, ngram=first.ngram)


def _search(index: _Index, training: TrainingSet, progress: Progress) -> dict[int, _First]:
    """Return for each item that a row overlaps with, by its index, the first rows that do."""
    hits: dict[int, _First] = defaultdict(_First)
    # What is looked up already: the columns of a data set often repeat each other.
    met_questions, met_texts = set[Group](), set[Group]()
    filled = set[tuple[str, Group]]()
    for number, row in enumerate(training.rows):
        raw = [(text,) for text in texts(row, training.columns)]
        questions, groups = _new_texts(row, training.templates, filled)
        for group in _new([*raw, *questions], met_questions):
            for item in index.questions.get(as_one(group), ()):
                if hits[item].exact is None:
                    hits[item].exact = number
        borders = (border for group in groups for border in _borders(group))
        for text_words in [*map(as_one, _new(raw, met_texts)), *_new(borders, met_texts)]:
            if not index.samples.isdisjoint(_samples(text_words)):
                _note(hits, index.runs, number, text_words)
        if number % 1000 == 0 or number == len(training.rows) - 1:
            progress(number + 1, len(training.rows))
    return hits


def _new_texts(row: Row, trained: Iterable[str], before: set[tuple[str, Group]]) -> tuple[list[Group], list[Group]]:
    """Return the questions, and runs of several values, that templates make of a row whose values they did not have
    before.
    """
    questions: list[Group] = []
    groups: list[Group] = []
    for text in trained:
        values = template(text).values(row)
        if values is not None and (text, values) not in before:
            before.add((text, values))
            filled, runs = template(text).read(values)
            questions += filled
            groups += [run for run in runs if len(run) > 1]
    return questions, groups


def _borders(group: Group) -> Iterator[tuple[str, ...]]:
    """Yield word sequences with the 13-grams that cross from one text of a group into the next."""
    across: tuple[str, ...] = ()
    for following in map(words, group):
        if len(following) < NGRAM:
            across += following
        else:
            yield across + following[: NGRAM - 1]
            across = following[1 - NGRAM :]
    yield across


def _new(groups: Iterable[Group], before: set[Group]) -> Iterator[Group]:
    """Yield the groups that are not in `before`, and add them to it."""
    for group in groups:
        if group not in before:
            before.add(group)
            yield group


def _question(tests: TestSet, item: int) -> str:
    """Return an item's question for the report."""
    row = tests.rows[item]
    is_filled = tests.prompt and template(tests.prompt).values(row) is not None
    return fill(tests.prompt, row) if is_filled else " ".join(texts(row, tests.question))


def _index(tests: TestSet) -> _Index:
    """Index the items of a test set."""
    by_question: dict[Words, list[int]] = defaultdict(list)
    by_ngram: dict[Words, list[int]] = defaultdict(list)
    samples: set[Words] = set()
    for item, row in enumerate(tests.rows):
        questions, groups = fill_template(row, tests.prompt)
        for form in {as_one(group) for group in ((" ".join(texts(row, tests.question)),), *questions)} - {()}:
            by_question[form].append(item)
        raw = {(text,) for text in texts(row, [*tests.question, *tests.answer])}
        texts_words = [as_one(group) for group in raw.union(groups, fill_template(row, tests.gold)[1])]
        for text_words in texts_words:
            samples.update(_samples(text_words))
            for run in ngrams(text_words):
                by_ngram[run].append(item)
    return _Index(dict(by_question), dict(by_ngram), samples)


def _samples(text_words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield five words of each 13-gram. Most texts share none of these, and they are faster to look up than all 13."""
    return zip(text_words, text_words[3:], text_words[6:], text_words[9:], text_words[NGRAM - 1 :], strict=False)


def _note(hits: dict[int, _First], by_ngram: dict[Words, list[int]], number: int, text_words: Words) -> None:
    """Record for the items that share a 13-gram with a text of row `number` that they do, unless an earlier row did."""
    for run in ngrams(text_words):
        for item in by_ngram.get(run, ()):
            if hits[item].ngram13 is None:
                hits[item].ngram13, hits[item].ngram = number, " ".join(run)


def shares(items: list[Hit], total: int) -> dict[str, Score]:
    """Return the share of all items for each measure. The standard error is 0: all items count."""
    return {
        "exact": _share([item["exact"] for item in items], total),
        "ngram13": _share([item["ngram13"] for item in items], total),
    }


def _share(rows: list[int | None], total: int) -> Score:
    """Return the share of items that overlap with a row."""
    return Score(value=sum(row is not None for row in rows) / total, stderr=0.0, items=total)


def shares_text(pair: str, measures: dict[str, Score]) -> str:
    """Return the overlap of a training and a test set as a line.

    `pair` names the two, `measures` is what `shares` returns.
    """
    parts = [f"{name} {100 * score.value:.2f} %" for name, score in measures.items() if score.value]
    items = max(score.items for score in measures.values())
    return f"{pair}: {', '.join(parts)} of {items} items" if parts else f"{pair}: no overlap found"
