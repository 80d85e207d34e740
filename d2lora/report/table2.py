"""Make Table 2: the settings that ran, from the configs of a sweep's cells, one column for each different config."""

from collections.abc import Iterable
from typing import Any

from d2lora.records import ManifestCell
from d2lora.report.axes import MACHINE, flat
from d2lora.report.content import Rows
from d2lora.report.looks import NAMES
from d2lora.report.points import size
from d2lora.settings import amount

# What a reader of the paper's Table 2 looks for, in its order: (row, key of the config).
_ROWS = (
    ("model", "model.name"),
    ("dtype", "model.dtype"),
    ("initialization", "init.name"),
    ("LoRA rank", "recipe.lora.r"),
    ("LoRA alpha", "recipe.lora.alpha"),
    ("LoRA dropout", "recipe.lora.dropout"),
    ("LoRA targets", "recipe.lora.target_modules"),
    ("schedule", "recipe.schedule"),
    ("lr warm-up ratio", "recipe.lr_warmup_ratio"),
    ("weight decay", "recipe.weight_decay"),
    ("gradient clipping", "recipe.max_grad_norm"),
    ("effective batch", "recipe.batch"),
    ("longest row (tokens)", "recipe.max_length"),
    ("phase 1: data", "warmup.name"),
    ("phase 1: lr", "recipe.lr.warmup"),
    ("phase 1: epochs", "warmup.epochs"),
    ("phase 2: data", "task.name"),
    ("phase 2: lr", "lr"),
    ("phase 2: epochs", "method.epochs"),
    ("beta", "method.beta"),
    ("DPO's reference", "method.reference"),
    ("ORPO's NLL", "method.nll"),
    ("order of samples (data_seed)", "data_seed"),
    ("hold-outs (split_seed)", "split_seed"),
)
UNUSED = "N/A"  # a setting that a column's cells do not have
# What the columns are made of.
_APART = (
    "n",
    "m",
    "seed",
    "replicate",
    "tune",
    "sweep",
    "method.name",
    "recipe.name",
    "recipe.lr",
    "recipe.epochs",
    "model.path",
)


def table(cells: Iterable[ManifestCell]) -> Rows:
    """Return Table 2. A setting without a row in the paper's table is shown if the columns differ in it."""
    cells = list(cells)
    replicates = {(c.config["seed"], c.config["data_seed"]) for c in cells}
    follows = len(replicates) > 1 and all(seed == draw for seed, draw in replicates)  # replicate=0,1,2
    columns: dict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = {}
    for cell in cells:
        config = _values(cell.config) | ({"data_seed": "the seed"} if follows else {})
        columns.setdefault(tuple(config.items()), []).append(cell.config)
    values = [dict(column) for column in columns]
    fixed = {key for _, key in _ROWS} | {"method"}
    keys = dict.fromkeys(k for v in values for k in v if k not in fixed and len({w.get(k) for w in values}) > 1)
    rows = [[name, *(_text(v.get(key)) for v in values)] for name, key in (*_ROWS, *((k, k) for k in keys))]
    for axis, name in (("m", "m that ran"), ("n", "n that ran"), ("seed", "seeds")):
        rows.append([name, *(_ran(configs, axis) for configs in columns.values())])
    return Rows(["", *(NAMES[v["method"]] for v in values)], rows)


def _values(config: dict[str, Any]) -> dict[str, str]:
    """Return the settings of a cell that a column shows, flat."""
    method = config["method"]["name"]
    values = {k: v for k, v in flat(config) if not _apart(k)}
    return values | {
        "method": method,
        "lr": str(config["recipe"]["lr"][method]),
        "recipe.lr.warmup": str(config["recipe"]["lr"]["warmup"]),
    }


def _apart(key: str) -> bool:
    return key in MACHINE or any(key == k or key.startswith(f"{k}.") for k in _APART)


def _text(value: Any) -> str:
    return UNUSED if value in (None, "None") else str(value)


def _ran(configs: list[dict[str, Any]], axis: str) -> str:
    return ", ".join(amount(v) for v in sorted({c[axis] for c in configs}, key=size))
