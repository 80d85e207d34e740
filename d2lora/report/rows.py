"""Rows by column and frames of them: what CSV files are written from, and what notebooks get."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]  # a column's name -> a number, a text, or None where there is no value


def frame(rows: Sequence[Row], columns: Sequence[str], as_typed: bool = False) -> "pd.DataFrame":
    """Return rows as a frame: `columns` first, then others in order of appearance.

    Numbers with gaps become floats, as pandas does; with `as_typed` each value stays as it is, for files.
    """
    import pandas as pd  # late: planning a grid imports this package

    others = dict.fromkeys(key for row in rows for key in row if key not in columns)
    return pd.DataFrame(list(rows), columns=[*columns, *others], dtype=object if as_typed else None)
