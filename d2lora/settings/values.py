"""Define the types that settings consist of: texts, templates, amounts, rates."""

import contextlib
import json
import math
import re
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, StrictStr


class Strict(BaseModel):
    """The base of all settings: unknown keys are refused, and values can't be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def _amount(value: Any) -> Any:
    """Validate a number of rows: a whole number, or "all"."""
    if value == "all" or (type(value) is int and value >= 0):
        return value
    raise ValueError("a whole number from 0 on, or all")


def _template(value: Any) -> Any:
    """Validate a text with {column} fields, so that a mistyped one is reported before the data is read."""
    if isinstance(value, str):
        try:
            fields(value)
        except ValueError as error:
            raise ValueError(f"a text with {{column}} fields ({error}; write {{{{ and }}}} for braces)") from error
    return value


def fields(template: str) -> set[str]:
    """Return the columns that a template names: "{question} {choices[text]}" -> {"question", "choices"}.

    ValueError for a bad field.
    """
    names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    if "" in names:
        raise ValueError("a field without a name")
    for name in sorted(names):
        if "." in re.sub(r"\[[^\]]*\]", "", name):
            suggestion = re.sub(r"\.(\w+)", r"[\1]", name)
            raise ValueError(f"{{{name}}} names an attribute: {{{suggestion}}} is meant")
    return {name.split("[")[0].split(".")[0] for name in names}


def _text(value: str) -> str:
    """Validate a text: UTF-8 without null bytes, so that files and keys can hold it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("a text in UTF-8") from None
    if "\0" in value:
        raise ValueError("a text without null bytes")
    return value


def _home(value: str) -> str:
    """Validate a path: not blank, and its ~name must be a user's home."""
    if not value.strip():
        raise ValueError("a path: . is this folder")
    try:
        Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return value


def _plain(value: Any) -> Any:
    """Validate a value that rows may have in a column."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError("a text, a number, true or false")


Text = Annotated[StrictStr, AfterValidator(_text)]

PathText = Annotated[Text, AfterValidator(_home)]

Amount = Annotated[StrictInt | Literal["all"], BeforeValidator(_amount)]

Template = Annotated[Text, BeforeValidator(_template)]

Value = Annotated[Any, BeforeValidator(_plain)]

Positive = Annotated[StrictInt, Field(gt=0)]

Rate = Annotated[float, Field(gt=0, le=1)]

Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]


def by_name(union: Any) -> dict[str, Any]:
    """Return the classes of a union of settings, in its order, by the names that users choose them by."""
    return {choice.model_fields["name"].default: choice for choice in get_args(union)}


def as_given(value: object) -> object:
    """Return a value as an error shows it: a number or the like in quotes would look as if it were right."""
    with contextlib.suppress(ValueError):
        if isinstance(value, str) and not isinstance(json.loads(value), str):
            return f"{value!r}, a text"
    return value


def amount(value: int | str) -> str:
    """Return 40k for 40000, as the paper writes its sizes."""
    return f"{value // 1000}k" if isinstance(value, int) and value >= 1000 and value % 1000 == 0 else str(value)
