"""Read the rows of a file. An error names the row or line as the file numbers it; rows with the same error share one
line.
"""

import csv
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from d2lora.errors import UserError

Row = dict[str, Any]  # a column's name -> its value

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_OPEN: dict[str, Callable] = {".xz": lzma.open, ".gz": gzip.open}
_DAMAGED = (ValueError, EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, csv.Error)  # as readers raise them


def read_rows(file: Path) -> list[Row]:
    """Read the rows of a file, in the format that its name says (`FORMATS`, each also as .gz or .xz).

    UserError if it holds no rows.
    """
    name = file.name.removesuffix(".xz").removesuffix(".gz")
    kind = Path(name).suffix
    try:
        if kind == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(file).to_pylist()
        # utf-8-sig: spreadsheets write a byte order mark, which would become part of the first column's name
        text = _OPEN.get(file.suffix, open)(file, "rt", encoding="utf-8-sig", newline="").read()
        if kind in (".csv", ".tsv"):
            return _table(file, text, _delimiter(text) if kind == ".csv" else "\t")
        return _list_of_rows(file, _json(file, text) if kind == ".json" else _json_lines(file, text))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not in UTF-8 (byte {error.start + 1:,}): save it as UTF-8") from None
    except _DAMAGED as error:
        raise UserError(f"{file}: not readable as {kind[1:]} ({error})") from None
    except RecursionError:
        raise UserError(f"{file}: not readable as {kind[1:]} (lists or mappings hundreds of levels deep)") from None


def _delimiter(text: str) -> str:
    """Return what separates a CSV's cells: a comma, or the semicolon or tab of a header without commas.

    Spreadsheets write semicolons where the comma is in decimals.
    """
    header = text.split("\n", 1)[0]
    return next((mark for mark in ",;\t" if mark in header), ",")


def listed(numbers: Sequence[int], name: str = "row") -> str:
    """Return "row 3", or "rows 3, 5, 8 and 4 more"."""
    first = ", ".join(map(str, numbers[:3]))
    more = f" and {len(numbers) - 3:,} more" if len(numbers) > 3 else ""
    return f"{name}{'s'[: len(numbers) > 1]} {first}{more}"


def _json(file: Path, text: str) -> Any:
    """Parse a .json file: a list of rows, a mapping with one list among its values, or JSON lines."""
    try:
        content = json.loads(text)
    except ValueError as error:
        if str(error).startswith("Extra data"):  # a second value behind the first: one a line
            return _json_lines(file, text)
        raise
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if not lists and not any(isinstance(value, dict) for value in content.values()):
            return [content]  # JSON lines of a single line
        return lists[0] if len(lists) == 1 else content
    return content


def _json_lines(file: Path, text: str) -> list[Any]:
    """Parse a file with one JSON value a line. UserError naming the lines that are not JSON."""
    values, broken, why = [], [], ""
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a text may hold other line ends
        if line.strip():
            try:
                values.append(json.loads(line))
            except ValueError as error:
                broken.append(number)
                why = why or str(error).replace("line 1 ", "")
    if broken:
        raise UserError(f"{file}: {listed(broken, 'line')}: not readable as JSON ({why})")
    return values


def _list_of_rows(file: Path, rows: Any) -> list[Row]:
    """Return the rows. UserError unless they are a list of mappings."""
    if not isinstance(rows, list):
        raise UserError(f"{file}: not a list of rows")
    if others := [number for number, row in enumerate(rows, 1) if not isinstance(row, dict)]:
        raise UserError(f"{file}: {listed(others)}: not a list of rows: each must map columns to values")
    return rows


def _table(file: Path, text: str, delimiter: str) -> list[Row]:
    """Read the rows of a CSV or TSV. A blank cell becomes a null, because the format can't tell it from an empty text.

    UserError for two columns of the same name, and for rows with more or fewer cells than the header: their values
    would shift.
    """
    lines = _cells(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    _, header = next(lines, (0, []))
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise UserError(f"{file}: several columns are named {', '.join(map(repr, twice))}")
    rows, broken = [], []
    for number, (line, cells) in enumerate(lines, 1):
        if len(cells) != len(header):
            broken.append(f"row {number} (line {line}) has {len(cells)}")
        rows.append({name: cell or None for name, cell in zip(header, cells, strict=False)})
    if broken:
        more = f" and {len(broken) - 3:,} more rows" if len(broken) > 3 else ""
        raise UserError(
            f"{file}: the header has {len(header)} cells, {', '.join(broken[:3])}{more}: their values would shift "
            "(a text with separators must be quoted)"
        )
    return rows


def _cells(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, cells) of each row that is not blank; a cell may span several lines."""
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise csv.Error(f"line {line}: {error}") from None
        if cells is None:
            return
        if cells:
            yield line, cells
        line = reader.line_num + 1
