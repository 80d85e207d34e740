"""Search a test set in a training set: the same question, or 13 words in a row. Pure functions.

As in GPT-3's check (Brown et al. 2020, appendix C) texts are compared as words, lower-cased and without punctuation,
and an item counts as overlapping if one of its word 13-grams occurs in the training set. Two differences: a question of
fewer than 13 words is only found as a whole (GPT-3 goes down to 8-grams), and no 13-gram is ignored for being frequent.

Questions are compared both as the columns have them and as the prompt templates render them. 13-grams are taken only
from the values that rows fill in: a template's own wording is the same in all rows, so a 13-gram with a word of it says
nothing of an item.
"""

import contextlib
import functools
import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from string import Formatter
from typing import Any, NamedTuple, TypedDict

from d2lora.data.conversations import written
from d2lora.data.files import Row
from d2lora.data.texts import LeftOut, NotText, fill, text_of
from d2lora.records import Score
from d2lora.scoring.words import SIGNS, UNSPACED

NGRAM = 13

_MARKS = re.compile(r"[^\w\s]+")
_MARKS_BUT_SIGNS = re.compile(rf"[^\w\s{SIGNS}]+")
_THOUSANDS = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")
# The ends of sentences in a template; a field's value may end one too: "{question} Please reason ..."
_SENTENCE_END = re.compile(r"[.?!:;](?=\s|$)|[\n。？！：；]|^\s+(?=[A-Z])")


@functools.lru_cache(256)  # each text of a row is needed several times
def words(text: str) -> tuple[str, ...]:
    """Return the words of a text, lower-cased and without punctuation.

    In scripts without spaces between words, each character counts as a word.
    """
    if text.isascii():
        return tuple(_MARKS.sub("", text.lower()).split())
    plain = unicodedata.normalize("NFKC", _THOUSANDS.sub("", text)).casefold()
    return tuple(UNSPACED.sub(r" \g<0> ", _MARKS_BUT_SIGNS.sub("", plain)).split())


def ngrams(text_words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield all runs of NGRAM words, in order."""
    return zip(*(text_words[start:] for start in range(NGRAM)), strict=False)


def texts(row: Row, columns: Iterable[str]) -> list[str]:
    """Return the texts in a row's columns, each by itself.

    Of a list (a conversation, options to choose from) those of its elements.
    """
    return [text for column in columns for text in _inner(row.get(column))]


def _inner(value: Any) -> list[str]:
    """Return the texts in a value: a turn's content, all values of another mapping, all elements of a list.

    None for a null.
    """
    if isinstance(value, dict):
        value = [value["content"]] if "content" in value else list(value.values())
    elif isinstance(value, str) and (turns := _written(value)):
        value = turns
    elif not isinstance(value, list) or _is_typed(value):
        return _plain(value)
    return [text for inner in value for text in ([inner] if isinstance(inner, str) else _inner(inner))]


def _written(text: str) -> list[dict] | None:
    """Return the turns that a text is, as a CSV has them; None if it is no conversation."""
    with contextlib.suppress(NotText):
        return written(text)
    return None


def _is_typed(value: list) -> bool:
    """Tell whether a list begins like a content of typed parts."""
    return bool(value) and isinstance(value[0], dict) and value[0].get("type") == "text"


# The tokens that chat templates write around turns. They separate the texts of rows that are rendered already.
_TURNS = re.compile(
    r"(?:<[|｜][^<>]*[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]|</?s>)(?:(?:system|developer|user|assistant|model|tool)\n)?"
)


def _plain(value: Any) -> list[str]:
    """Return a value's texts, those of rendered conversations apart; any other value as Python spells it."""
    try:
        text = text_of(value)
        return [text] if "<" not in text else [part for part in _TURNS.split(text) if part.strip()]
    except LeftOut:
        return []
    except NotText:
        if isinstance(value, list):
            return [text for part in value for text in _inner(part)]
        return [] if value is None or isinstance(value, float | bytes) else [str(value)]


# --- templates -----------------------------------------------------------------------------------------------------

Piece = tuple[str, str]  # (fixed wording, "") or ("", a field such as "{question}")
Group = tuple[str, ...]  # texts that follow each other without words between them


@dataclass(frozen=True)
class Template:
    r"""A template split into fixed wording and fields: all `pieces`, and the `core`, those of the sentences that have a
    field.

    The core tells what is asked: "{question} Please reason step by step." and "Question: {question}\nAnswer:" ask the
    same. A core without words of its own that only joins short values is no question by itself: "{a}, {b}. Which is
    larger?" and "{a}, {b}. Add them." ask different things.
    """

    pieces: tuple[Piece, ...]
    core: tuple[Piece, ...]

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        """Return the fields, each once."""
        return tuple(dict.fromkeys(field for _, field in self.pieces if field))

    def values(self, row: Row) -> Group | None:
        """Return the texts of the fields; None if the row can't fill them."""
        try:
            return tuple([_value(field, row) for field in self.fields])
        except (LeftOut, LookupError, AttributeError, TypeError, ValueError):
            return None

    def read(self, values: Group) -> tuple[list[Group], list[Group]]:
        """Return what the template makes of the fields' values: its questions, and its runs of values."""
        by_field = dict(zip(self.fields, values, strict=True))
        return list(self.questions(by_field)), list(self.runs(by_field))

    def questions(self, values: dict[str, str]) -> Iterator[Group]:
        """Yield the filled template, and its filled core if that differs."""
        yield _joined(self.pieces, values)
        if self.core != self.pieces:
            core = _joined(self.core, values)
            if _has_words(self.core) or len(values) == 1 or len(_as_one(core)) >= NGRAM:
                yield core

    def runs(self, values: dict[str, str]) -> Iterator[Group]:
        """Yield the values in groups: values are in one group if the core has no words between them."""
        group: list[str] = []
        for fixed, field in self.core:
            if field:
                group.append(values[field])
            elif words(fixed) and group:
                yield tuple(group)
                group = []
        if group:
            yield tuple(group)


def _value(field: str, row: Row) -> str:
    """Return the text of a field."""
    name = field[1:-1]
    return text_of(row[name]) if name in row else fill(field, row)  # the short way is the same, and faster


@functools.cache
def _has_words(pieces: tuple[Piece, ...]) -> bool:
    """Tell whether the pieces have wording of their own."""
    return any(words(fixed) for fixed, _ in pieces)


@functools.cache
def _are_apart(pieces: tuple[Piece, ...]) -> bool:
    """Tell whether there is something between any two fields."""
    return not any(one and next_ for (_, one), (_, next_) in itertools.pairwise(pieces))


def _joined(pieces: tuple[Piece, ...], values: dict[str, str]) -> Group:
    """Return the text of the pieces. If it is the values' words only, return the values: their words are cached."""
    if _are_apart(pieces) and not _has_words(pieces):
        return tuple(values[field] for _, field in pieces if field)
    return ("".join(values[field] if field else fixed for fixed, field in pieces),)


def _as_one(group: Group) -> tuple[str, ...]:
    """Return the words of a group, as if it were one text."""
    return words(group[0]) if len(group) == 1 else tuple(itertools.chain.from_iterable(map(words, group)))


@functools.cache
def template(text: str) -> Template:
    """Parse a text with {column} fields as a Template, cached."""
    pieces: list[Piece] = []
    sentences: list[list[Piece]] = [[]]
    for fixed, name, spec, conversion in Formatter().parse(text):
        first, *others = _SENTENCE_END.split(fixed)
        sentences[-1].append((first, ""))
        sentences += [[(f" {other}", "")] for other in others]
        field = f"{{{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}}}" if name else ""
        sentences[-1].append(("", field))
        pieces += [(fixed, ""), ("", field)]
    core = [piece for sentence in sentences if any(field for _, field in sentence) for piece in sentence]
    is_core = all(any(field for _, field in sentence) for sentence in sentences)
    pieces, core = ([piece for piece in part if any(piece)] for part in (pieces, core))
    return Template(tuple(pieces), tuple(pieces if is_core else core))


def _filled(row: Row, text: str) -> tuple[list[Group], list[Group]]:
    """Return the questions and runs of values that a template makes of a row; nothing if the row can't fill it."""
    values = template(text).values(row)
    return ([], []) if values is None else template(text).read(values)


# --- the check -----------------------------------------------------------------------------------------------------

Words = tuple[str, ...]


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


def overlap(
    tests: list[Row],
    question: list[str],
    answer: list[str],
    rows: list[Row],
    columns: list[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    prompt: str = "",
    gold: str = "",
    trained: Iterable[str] = (),
) -> list[Hit]:
    """Return the items of a test set that a training set contains, in order.

    `question`, `answer` and `columns` name the columns to read; `prompt`, `gold` and `trained` are the templates that
    the two sets are rendered with.
    """
    index = _index(tests, question, answer, prompt, gold)
    hits = _search(index, rows, columns, tuple(trained), progress)
    return [_hit(item, _question(tests[item], question, prompt), hits[item]) for item in sorted(hits)]


def _hit(item: int, question: str, first: _First) -> Hit:
    """Return the outcome of an item."""
    return Hit(index=item, question=question, exact=first.exact, ngram13=first.ngram13, ngram=first.ngram)


def _search(
    index: _Index,
    rows: list[Row],
    columns: list[str],
    trained: tuple[str, ...],
    progress: Callable[[int, int], None],
) -> dict[int, _First]:
    """Return for each item that a row overlaps with, by its index, the first rows that do."""
    hits: dict[int, _First] = defaultdict(_First)
    # What is looked up already: the columns of a data set often repeat each other.
    met_questions, met_texts = set[Group](), set[Group]()
    filled = set[tuple[str, Group]]()
    for number, row in enumerate(rows):
        raw = [(text,) for text in texts(row, columns)]
        questions, groups = _new_texts(row, trained, filled)
        for group in _new([*raw, *questions], met_questions):
            for item in index.questions.get(_as_one(group), ()):
                if hits[item].exact is None:
                    hits[item].exact = number
        borders = (border for group in groups for border in _borders(group))
        for text_words in [*map(_as_one, _new(raw, met_texts)), *_new(borders, met_texts)]:
            if not index.samples.isdisjoint(_samples(text_words)):
                _note(hits, index.runs, number, text_words)
        if number % 1000 == 0 or number == len(rows) - 1:
            progress(number + 1, len(rows))
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


def _question(row: Row, question: list[str], prompt: str) -> str:
    """Return an item's question for the report."""
    values = template(prompt).values(row)
    return fill(prompt, row) if prompt and values is not None else " ".join(texts(row, question))


def _index(tests: list[Row], question: list[str], answer: list[str], prompt: str, gold: str) -> _Index:
    """Index the items of a test set."""
    by_question: dict[Words, list[int]] = defaultdict(list)
    by_ngram: dict[Words, list[int]] = defaultdict(list)
    samples: set[Words] = set()
    for item, row in enumerate(tests):
        questions, groups = _filled(row, prompt)
        for form in {_as_one(group) for group in ((" ".join(texts(row, question)),), *questions)} - {()}:
            by_question[form].append(item)
        raw = {(text,) for text in texts(row, [*question, *answer])}
        texts_words = [_as_one(group) for group in raw.union(groups, _filled(row, gold)[1])]
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
