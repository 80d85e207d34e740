"""Values of rows -> texts. A value that is no text is never formatted into one."""

import math
import re
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


def value_at(row: Row, field: str) -> Any:
    """The value of a template's field ("options[0]") in a row. LookupError, TypeError or ValueError where there is none."""
    outer = field.rpartition("[")[0]
    if outer and isinstance(value_at(row, outer), str):
        raise TypeError(f"{outer} is a text, of which [...] would take one character")
    return Formatter().get_field(field, (), row)[0]


class _Texts(Formatter):
    """str.format whose fields are texts (`text_of`)."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        return value_at(kwargs, field_name), field_name

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return (
            super().convert_field(text_of(value), conversion) if conversion else value
        )  # "{x!r}" of a list is no text

    def format_field(self, value: Any, format_spec: str) -> str:
        return format(text_of(value), format_spec)


def fill(template: str, row: Row) -> str:
    """The template with the row's columns in it. NotText where a value is no text."""
    return _Texts().vformat(template, (), row)
