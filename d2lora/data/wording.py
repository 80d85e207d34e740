"""Take a row's texts apart for the overlap check: its words, and what templates make of it.

As in GPT-3's check (Brown et al. 2020, appendix C) texts are compared as words, lower-cased and without punctuation.
"""

import contextlib
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from string import Formatter
from typing import Any

from d2lora.data.conversations import written
from d2lora.data.files import Row
from d2lora.data.texts import LeftOut, NotText, fill, text_of
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


def _is_typed(value: list[Any]) -> bool:
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
            if _has_words(self.core) or len(values) == 1 or len(as_one(core)) >= NGRAM:
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


def as_one(group: Group) -> tuple[str, ...]:
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


def fill_template(row: Row, text: str) -> tuple[list[Group], list[Group]]:
    """Return the questions and runs of values that a template makes of a row; nothing if the row can't fill it."""
    values = template(text).values(row)
    return ([], []) if values is None else template(text).read(values)
