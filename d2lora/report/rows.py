"""Rows by column, as CSV and as frames: what files and notebooks get."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]  # a column's name -> a number, a text, or None where there is no value


def frame(rows: Sequence[Row], columns: Sequence[str]) -> "pd.DataFrame":
    """Return rows as a frame: `columns` first, then others in order of appearance. Numbers with gaps become floats, as in pandas."""
    import pandas as pd  # late: a plan and a report need none of it

    return pd.DataFrame(list(rows), columns=_all_columns(rows, columns))


def csv_of_rows(rows: Sequence[Row], columns: Sequence[str], end: str = "\n") -> str:
    """Return rows as CSV: `columns` first, then others in order of appearance, each value as it is; nothing for None and NaN."""
    head = _all_columns(rows, columns)
    return lines_text(head, ([row.get(column) for column in head] for row in rows), end)


def lines_text(head: Sequence[str], lines: Iterable[Sequence[Any]], end: str = "\n") -> str:
    """Return a head and lines of values as CSV; nothing for None and NaN."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=end)
    writer.writerow(head)
    writer.writerows(["" if value != value else value for value in line] for line in lines)
    return text.getvalue()


def _all_columns(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*columns, *(key for row in rows for key in row)]))
