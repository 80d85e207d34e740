"""Turn values of rows into texts. A value that is no text is refused, never formatted into one."""

import functools
import math
import re
import unicodedata
from string import Formatter
from typing import Any

from d2lora.data.files import Row


class LeftOut(Exception):
    """A row that is readable but must not be trained on or evaluated. `reason` is what it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NotText(ValueError):
    """A value that is no text, where one is needed."""


def text_of(value: Any) -> str:
    """Return a row's value as text: a string, a number as JSON writes it, or the joined parts of a typed content.

    NotText for values without one spelling as text (nulls, booleans, NaN, lists, mappings), and for a text with a lone
    surrogate.
    """
    if isinstance(value, str) and is_encodable(value):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if isinstance(value, list) and value and all(_is_text_part(part) for part in value):
        return text_of("".join(part["text"] for part in value))
    raise NotText(f"{quoted(value)} is no text")


def is_encodable(text: str) -> bool:
    """Tell whether UTF-8 can encode a text.

    JSON can hold half of a character ("\\ud83d"), which tokenizers and files refuse.
    """
    return text.isascii() or not _HALVES.search(text)


_HALVES = re.compile("[\ud800-\udfff]")


def _is_text_part(part: Any) -> bool:
    """Tell whether a value is {"type": "text", "text": ...}, as chat APIs write the parts of a message's content."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def quoted(value: Any) -> str:
    """Spell a value for an error line, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_blank(text: str) -> bool:
    """Tell whether a text is invisible: only white space, and characters without width such as byte order marks."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


class _Texts(Formatter):
    """A str.format whose fields must be texts (`text_of`), and whose paths may lead through lists and mappings only."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        name, *keys = field_name.replace("]", "").split("[")
        value = kwargs[name]
        for key in keys:
            if isinstance(value, str) and key.isdecimal():  # "{answers[0]}" would be its first letter
                raise NotText(f"{quoted(value)} is a text, and {{{field_name}}} names a part of it")
            value = value[int(key) if key.isdecimal() else key]
        return value, name

    def convert_field(self, value: Any, conversion: Any) -> Any:
        # "{x!r}" of a list would be a text otherwise
        return super().convert_field(text_of(value), conversion) if conversion else value

    def format_field(self, value: Any, format_spec: str) -> str:
        return format(text_of(value), format_spec)


def field(name: str, row: Row) -> Any:
    """Return the value of a template's field: a column's, or with a path ("answers[text]") a value inside it."""
    return _Texts().get_field(name, (), row)[0]


def fill(template: str, row: Row) -> str:
    """Fill the row's columns into the template. NotText where a value is no text."""
    return _Texts().vformat(template, (), row)


@functools.cache
def paths(template: str) -> tuple[str, ...]:
    """Return the fields of a template, with their paths: "answers[text]"."""
    return tuple(dict.fromkeys(name for _, name, _, _ in Formatter().parse(template) if name is not None))


@functools.cache
def only_field(template: str) -> str | None:
    """Return the field of a template that consists of this field alone; None for others."""
    names = paths(template)
    return names[0] if len(names) == 1 and template == f"{{{names[0]}}}" else None
