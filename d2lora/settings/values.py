"""The types that settings are made of: texts, templates, amounts, rates."""

import math
import re
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, StrictStr


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def _amount(value: Any) -> Any:
    if value == "all" or (type(value) is int and value >= 0):
        return value
    raise ValueError("a whole number from 0 on, or all")


def _template(value: Any) -> Any:
    """A text with {column} fields; refused when it is not one, so that a typing error shows before the data is read."""
    if isinstance(value, str):
        try:
            fields(value)
        except ValueError as error:
            raise ValueError(f"a text with {{column}} fields ({error}; write {{{{ and }}}} for braces)") from error
    return value


def fields(template: str) -> set[str]:
    """The columns a template names: "{question} {choices[text]}" -> {"question", "choices"}."""
    names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    if "" in names:
        raise ValueError("a field without a name")
    for name in sorted(names):
        if "." in re.sub(r"\[[^\]]*\]", "", name):
            meant = re.sub(r"\.(\w+)", r"[\1]", name)
            raise ValueError(f"{{{name}}} names an attribute: {{{meant}}} is meant")
    return {name.split("[")[0].split(".")[0] for name in names}


def _text(value: str) -> str:
    """A text that files and keys can carry."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("a text in UTF-8") from None
    if "\0" in value:
        raise ValueError("a text without null bytes")
    return value


def _home(value: str) -> str:
    """A path whose ~name is somebody's home."""
    try:
        Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return value


def _plain(value: Any) -> Any:
    """A value that a column of rows may have."""
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


def amount(value: int | str) -> str:
    """Return 40k for 40000, as the paper writes its sizes."""
    return f"{value // 1000}k" if isinstance(value, int) and value >= 1000 and value % 1000 == 0 else str(value)
