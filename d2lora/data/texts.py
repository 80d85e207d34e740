"""Values of rows -> texts. A value that is no text is never formatted into one."""

import math
import re
import unicodedata
from string import Formatter
from typing import Any

from d2lora.data.files import Row


class LeftOut(Exception):
    """A row that can be read and must not be trained on or asked, by the `reason` under which it is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NotText(ValueError):
    """A value that is no text, where a text is wanted."""


def text_of(value: Any) -> str:
    """The text of a row's value: a string, a number as JSON writes it, or the joined text parts of a typed content.

    NotText for what has no one spelling as a text: nulls, truth values, NaN, lists and mappings; and half a character.
    """
    if isinstance(value, str) and is_whole(value):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if isinstance(value, list) and value and all(_is_text_part(part) for part in value):
        return text_of("".join(part["text"] for part in value))
    raise NotText(f"{shown(value)} is no text")


def is_whole(text: str) -> bool:
    """Whether UTF-8 can carry a text. JSON can write half of a character ("\\ud83d"), which no tokenizer and no file takes."""
    return text.isascii() or not _HALVES.search(text)


_HALVES = re.compile("[\ud800-\udfff]")


def _is_text_part(part: Any) -> bool:
    """Whether it is {"type": "text", "text": ...}, as chat APIs write a content's parts."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def shown(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: white space, and what has no width (zero-width spaces, byte order marks)."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


class _Texts(Formatter):
    """str.format whose fields are texts (`text_of`), and whose paths lead through lists and mappings only."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        name, *keys = field_name.replace("]", "").split("[")
        value = kwargs[name]
        for key in keys:
            if isinstance(value, str) and key.isdecimal():  # "{answers[0]}" would be its first letter
                raise NotText(f"{shown(value)} is a text, and {{{field_name}}} names a part of it")
            value = value[int(key) if key.isdecimal() else key]
        return value, name

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return (
            super().convert_field(text_of(value), conversion) if conversion else value
        )  # "{x!r}" of a list is no text

    def format_field(self, value: Any, format_spec: str) -> str:
        return format(text_of(value), format_spec)


def field(name: str, row: Row) -> Any:
    """The value that a template's field names: a column's, or with a path ("answers[text]") one in it."""
    return _Texts().get_field(name, (), row)[0]


def fill(template: str, row: Row) -> str:
    """The template with the row's columns in it. NotText where a value is no text."""
    return _Texts().vformat(template, (), row)
