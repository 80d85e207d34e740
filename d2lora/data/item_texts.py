"""Fill a benchmark's templates from a row; a row that can't be evaluated says why."""

from typing import Any

from d2lora.data.conversations import written
from d2lora.data.files import Row
from d2lora.data.texts import NotText, field, fill, is_blank, paths, quoted, text_of


class Unscorable(Exception):
    """A row that can't be evaluated.

    `problem` is shared by rows with the same fault; `value` is this row's, and fills its {}.
    """

    def __init__(self, problem: str, value: str = "") -> None:
        super().__init__(problem)
        self.problem, self.value = problem, value


def filled(name: str, template: str, row: Row) -> str:
    """Fill the row's texts into a template. Unscorable where a value is no text."""
    try:
        for column in paths(template):
            if isinstance(value := field(column, row), str) and written(value) is not None:
                raise NotText(f"{quoted(value)} is a list that is written out")
        return fill(template, row)
    except NotText as error:
        raise Unscorable(f"{name}={line_of(template)}: {{}}", str(error)) from None
    except (LookupError, AttributeError, TypeError, ValueError) as error:  # "{choices[text]}"
        problem = f"{name}={line_of(template)} can't be filled in ({type(error).__name__}: {{}})"
        raise Unscorable(problem, str(error)) from None


def line_of(template: str) -> str:
    """Return a template as an error line shows it."""
    return template if "\n" not in template else quoted(template)


def is_text(value: Any) -> bool:
    """Tell whether a value is a text (`text_of`)."""
    try:
        text_of(value)
    except NotText:
        return False
    return True


def is_unfilled(template: str, row: Row) -> bool:
    """Tell whether a template has fields, and the row holds nothing but nulls and blanks in them."""
    try:
        values = [field(name, row) for name in paths(template)]
    except (NotText, LookupError, AttributeError, TypeError, ValueError):
        return False
    return bool(values) and all(v is None or v == [] or (isinstance(v, str) and is_blank(v)) for v in values)
