"""Say how large the work of a plan is: the model, rows in tokens, benchmarks in items. Nothing is loaded, no torch.

What is not on this machine is taken from its name or assumed, and says so.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from d2lora import data
from d2lora.keys import digest
from d2lora.outputs import Outputs
from d2lora.settings import Benchmark, Config, Data, Model, fields
from d2lora.stages.base_facts import shape_file

# Characters a token: about 4 of English in vocabularies of 32,000 and more (the lab's of 1,024 has 2.3, its templates counted).
_CHARACTERS, _CHARACTERS_SMALL, _SMALL = 4.0, 2.3, 16_000
_LOOKED_AT = 200  # rows whose texts are measured
_KNOWN_ROWS = {  # of sets on the Hub at the revisions in conf/ (docs/paper.md)
    ("openai/gsm8k", "test"): 1_319,
    ("allenai/ai2_arc", "test"): 2_376,
    ("mlabonne/orpo-dpo-mix-40k", "train"): 44_245,
}
PROMPT = 150  # tokens of a benchmark's prompt that can't be read here
_ROWS = 10_000  # of a data set that can't be read here, where all of them are trained on
_ASSUMED = 8e9  # parameters of a model that nothing is known of
_BILLIONS = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Shape:
    """What time and memory depend on: parameters, layers, widths (hidden, of keys and values), vocabulary."""

    parameters: float
    layers: int
    hidden: int
    kv: int
    vocabulary: int
    assumed: str = ""  # where the numbers come from if not from the model itself


def shape_of(config: Config) -> Shape:
    """Return the shape of a cell's base: remembered by a dry run, from its files, from its name, or assumed."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return _shape(json.loads(shape_file(config).read_text()))
    folder = data.model_files(config.model)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if folder is not None and folder.is_dir():
            return _from_files(folder)
    return _from_name(config.model)


def _shape(remembered: Mapping[str, Any]) -> Shape:
    return Shape(**{name: remembered[name] for name in ("parameters", "layers", "hidden", "kv", "vocabulary")})


def _from_files(folder: Path) -> Shape:
    """Return the shape by a folder's config.json and the headers of its safetensors."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv = config.get("num_key_value_heads", heads) * config.get("head_dim", hidden // heads)
    count = sum(math.prod(shape) for file in folder.glob("*.safetensors") for shape in _shapes(file))
    if not count:
        raise ValueError("no safetensors")
    return Shape(count, config["num_hidden_layers"], hidden, kv, config["vocab_size"])


def _shapes(file: Path) -> list[list[int]]:
    """Return the shapes of a safetensors file's weights, from its header."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return [entry["shape"] for name, entry in header.items() if name != "__metadata__"]


def _from_name(model: Model) -> Shape:
    """Return the shape of a model of so many parameters: as its name says ("8B", "135M"), or 8 billion."""
    match = _BILLIONS.search(f"{model.path} {model.name}".replace("-", " ").replace("_", " ").replace("/", " "))
    count = float(match[1]) * {"b": 1e9, "m": 1e6}[match[2].lower()] if match else _ASSUMED
    layers = max(
        2, round((count / (12 * 128**2)) ** (1 / 3))
    )  # of usual models: width = 128 x layers, 12 width² a layer
    hidden = 128 * layers
    source = "by its name" if match else "assumed"
    return Shape(count, layers, hidden, hidden // 4, 128_000, assumed=f"{size_text(count)} parameters {source}")


def size_text(parameters: float) -> str:
    """Return 8.0 B or 135 M."""
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{max(parameters, 1e6) / 1e6:.0f} M"


# --- rows and items -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Tokens of a row as a training reads it, and how that is known."""

    count: float
    origin: str


def training_tokens(config: Config, source: Data, columns: Iterable[str], max_length: int) -> Tokens:
    """Return the tokens of a row by the lengths of its texts; of rows that are not here, a quarter of the longest allowed."""
    rows = rows_here(source, config.split_seed)
    if rows is None:
        return Tokens(max_length / 4, f"{max_length // 4} tokens a row assumed, a quarter of max_length")
    names = list(columns)
    lengths = [sum(len(_text(row.get(column))) for column in names) for row in islice(rows, _LOOKED_AT)]
    count = min(sum(lengths) / len(lengths) / characters(config), max_length)
    return Tokens(count, f"{count:.0f} tokens a row by its characters")


def prompt_tokens(config: Config, benchmark: Benchmark) -> Tokens:
    """Return the tokens of a benchmark's prompt, by the lengths of its texts or assumed."""
    rows = rows_here(benchmark.data, config.split_seed)
    if rows is None:
        return Tokens(PROMPT, f"prompts of {PROMPT} tokens assumed")
    columns = set().union(*map(fields, benchmark.prompts))
    lengths = [sum(len(_text(row.get(column))) for column in columns) for row in islice(rows, _LOOKED_AT)]
    count = (sum(map(len, benchmark.prompts)) + sum(lengths) / len(lengths)) / characters(config)
    return Tokens(count, f"prompts of {count:.0f} tokens by their characters")


def characters(config: Config) -> float:
    """Return how many characters of text a token of the cell's base stands for."""
    return _CHARACTERS_SMALL if shape_of(config).vocabulary < _SMALL else _CHARACTERS


def _text(value: object) -> str:
    """Return a column's text; of a conversation that of its turns."""
    if isinstance(value, list):
        turns = (turn.get("content", turn.get("value")) if isinstance(turn, dict) else turn for turn in value)
        return " ".join(map(str, turns))
    return "" if value is None else str(value)


def rows_here(source: Data, split_seed: int) -> list[data.Row] | None:
    """Return the rows of a local data set; None of one on the Hub, which a plan does not read."""
    return data.rows(source, split_seed) if data.local(source.path) else None


def items_of(config: Config, benchmark: Benchmark) -> int | None:
    """Return how many items of a benchmark are evaluated; None of a data set that was never read here."""
    rows = row_count(config, benchmark.data)
    if rows is None:
        return benchmark.limit
    return min(rows, benchmark.limit or rows)


def row_count(config: Config, source: Data) -> int | None:
    """Return the number of rows of a data set that is here, or was read for an earlier record; None of others."""
    if data.local(source.path):
        return len(data.rows(source, config.split_seed))
    file = Outputs.of(config).fingerprint(digest(data.identity(source, config.split_seed)))
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(json.loads(file.read_text())["rows"])
    if source.part == "held_out":
        return source.hold_out
    return None if source.where or source.hold_out else _KNOWN_ROWS.get((source.path, source.split))


def trained_rows(config: Config, source: Data) -> Tokens:
    """Return how many rows `all` of a data set are, and where that is assumed a word about it (else an empty one)."""
    rows = row_count(config, source)
    return Tokens(rows, "") if rows is not None else Tokens(_ROWS, f"{_ROWS:,} rows assumed where all are meant")
