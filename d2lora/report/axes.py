"""Find the settings that a sweep's cells differ in, beside method, m, n, seeds and the named parts of a config."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from d2lora.records import ManifestCell
from d2lora.settings import RATE, Machine
from d2lora.settings.controls import NO_CONTROL, control_of, in_effect
from d2lora.settings.recipe import LAYOUT

# The named parts of a config: shown by their names where cells differ in them.
LABELS = ("model", "task", "init", "warmup", "recipe")
# Decides which units dropout drops, and is in a key then.
_LAYOUT = tuple(f"recipe.{name}" for name in LAYOUT)
# In no stage's key, so no axis; of the layout without dropout only.
MACHINE = tuple(f"recipe.{name}" for name in Machine.model_fields if name not in ("packing", "engine"))
# Not settings of a cell's result, or shown otherwise: n and m as columns and arms, seeds folded into each number.
_NOT_SETTINGS = ("n", "m", "seed", "replicate", "sweep", "report", "tune")
# Where a setting's value comes from beside the part that it stands in: conf takes epochs from the recipe's.
_ORIGINS = {"method.epochs": {"method", "recipe"}, "warmup.epochs": {"warmup", "recipe"}, RATE: {"method", "recipe"}}

Axes = dict[str, str]  # a setting's dotted key -> its value as text; only those that matter for the result


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted keys of nested mappings with their values as text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, str(value)


def general(config: dict[str, Any]) -> bool:
    """Tell whether a cell uses general data: in a warm-up, or to start its adapter."""
    return config["m"] != 0 or config["init"].get("data") == "general"


def control(config: dict[str, Any]) -> str:
    """Return the name of the control arm that a cell is of; older manifests have none."""
    name = config.get("control", {}).get("name", NO_CONTROL)
    return in_effect(name, config["m"], config["n"])


def settings_of(cell: ManifestCell) -> Axes:
    """Return the settings that the cell's result depends on."""
    config = cell.config
    own_rate = f"{RATE}.{config['method']['name']}"
    parts = _Parts(
        arm=control(config),
        adapted=cell.stages.adapt is not None,
        warmed=cell.stages.warmup is not None,
        prepared=cell.stages.prepare is not None,
        general=general(config),
        dropout=bool(config["recipe"]["lora"]["dropout"]),
    )
    named = ((RATE if key == own_rate else key, value) for key, value in flat(config))
    return {key: value for key, value in named if _matters(key, parts)}


@dataclass(frozen=True)
class _Parts:
    """What a cell is made of, as far as it decides which settings matter: its control arm and its trainings."""

    arm: str
    adapted: bool
    warmed: bool
    prepared: bool
    general: bool  # whether it uses general data
    dropout: bool

    @property
    def trained(self) -> bool:
        return self.adapted or self.warmed or self.prepared


def _matters(key: str, cell: _Parts) -> bool:
    """Tell whether a cell's result depends on a setting: not if its phase has no training, or if only the machine
    differs.
    """
    part = key.partition(".")[0]
    if key in _LAYOUT:
        return cell.trained and cell.dropout
    if key in MACHINE or part in _NOT_SETTINGS or key.startswith(("recipe.epochs", "task.validation")):
        return False
    if key.startswith("task.benchmark") and key.endswith(".varies"):  # read by the report alone
        return False
    if key == RATE or key.startswith(f"{RATE}."):
        return {RATE: cell.adapted, f"{RATE}.warmup": cell.warmed}.get(key, False)
    if part == "control":
        return cell.arm != NO_CONTROL and key != "control.name"
    if part == "warmup":  # a control arm without a warm-up has as many epochs of general rows, or tokens
        return cell.general and (cell.warmed or not control_of(cell.arm).warms_up or key != "warmup.epochs")
    if key.startswith("task.benchmark") or key == "recipe.engine":
        return True
    needs = {"method": cell.adapted, "task": cell.adapted, "recipe": cell.trained, "init": cell.trained}
    return (needs | {"data_seed": cell.trained}).get(part, True)


def differing_settings(cells: Iterable[ManifestCell]) -> tuple[list[str], list[str]]:
    """Return the named parts that cells differ in, and the settings that they differ in beside them.

    A setting that follows from the names of where it is from is shown by these: DPO's epochs by the method and the recipe. A
    `data_seed` that follows from the seed is another draw for each training (replicate=0,1,2), and is folded like the seeds.
    """
    cells = list(cells)
    names = [{k: c.config[k]["name"] for k in (*LABELS, "method")} for c in cells]
    labels = [k for k in LABELS if len({n[k] for n in names}) > 1]
    values: dict[str, dict[tuple[str, ...], set[str]]] = defaultdict(lambda: defaultdict(set))
    for cell, name in zip(cells, names, strict=True):
        for key, value in settings_of(cell).items():
            origins = _ORIGINS.get(key, {key.split(".")[0]})
            texts = [name[k] for k in (*labels, "method") if k in origins]
            texts += [str(cell.config["seed"])] * (key == "data_seed")
            values[key][tuple(texts)].add(value)
    return labels, [key for key, groups in values.items() if any(len(v) > 1 for v in groups.values())]


def axes_of(cell: ManifestCell, benchmark: str, keys: Iterable[str]) -> Axes:
    """Return the cell's values of the settings `keys`, of those that a benchmark's result depends on."""
    return of_benchmark(settings_of(cell), cell, benchmark, keys)


def of_benchmark(settings: Axes, cell: ManifestCell, benchmark: str, keys: Iterable[str]) -> Axes:
    """Return those of a cell's `settings` that are among `keys` and that a benchmark's result depends on."""
    others = [f"task.benchmark.{name}." for name in cell.config["task"]["benchmark"] if name != benchmark]
    return {k: settings[k] for k in keys if k in settings and not any(k.startswith(other) for other in others)}


def compatible(general_axes: Axes, axes: Axes) -> bool:
    """Tell whether a result with `general_axes` stands for `axes` too: it has their values, or does not depend on them."""
    return all(axes.get(key, value) == value for key, value in general_axes.items())


def number(value: str) -> float | None:
    """Return a setting's value as a number; None if it is none."""
    try:
        return float(value)
    except ValueError:
        return None


def order_of(value: int | str) -> tuple[float, str]:
    """Sort values of a setting: numbers by size, then texts, all last."""
    by_size = number(str(value))
    return (math.inf if by_size is None else by_size), str(value)


def short_name(key: str) -> str:
    """Return a setting's name for a row's label: beta for method.beta, lr.warmup for recipe.lr.warmup."""
    parts = key.split(".")
    return ".".join(parts[-2:]) if parts[-1] in (*LABELS, "name", "data", "path") else parts[-1]


def text(key: str, value: str) -> str:
    """Return a setting as in a row's label: lr=0.001."""
    return f"{short_name(key)}={value}"
