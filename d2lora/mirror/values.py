"""Say what runs of stages and of cells both show: results by flat names, and settings without paths of this machine."""

from pathlib import Path
from typing import Any

from d2lora import data
from d2lora.errors import UserError
from d2lora.records import CLUSTER, Item, Record, Score
from d2lora.scoring import is_graded
from d2lora.stages.evaluate import EvaluateSpec


def arm(m: int | str) -> str:
    """Return the arm's name by its m."""
    return "LoRA" if m == 0 else "D2LoRA"


def flat_results(record: Record, items: list[Item]) -> dict[str, object]:
    """Return metrics by flat names: a benchmark's with its number of items and the 95 % interval that the report has."""
    name = record.benchmark or record.pair or record.stage
    flat: dict[str, object] = {}
    for metric, value in record.metrics.items():
        if isinstance(value, Score):
            flat |= {f"{name}/{metric}": value.value, f"{name}/{metric}_items": value.items}
            # A check's items are no scores, but hits.
            if record.stage == EvaluateSpec.KIND and len(items) == value.items:
                low, high = _interval(metric, items)
                flat |= {f"{name}/{metric}_low": low, f"{name}/{metric}_high": high}
        elif metric != "log":
            flat[metric] = value
    return flat


def _interval(metric: str, items: list[Item]) -> tuple[float, float]:
    """Return the 95 % interval of a metric's mean over items, or over clusters of items that belong together."""
    import numpy as np  # late, as stats: planning a grid needs neither

    from d2lora import stats

    clusters = None
    if CLUSTER in items[0]:
        clusters = np.unique([str(item[CLUSTER]) for item in items], return_inverse=True)[1]
    return stats.interval(np.array([[float(item[metric]) for item in items]]), is_graded(metric), clusters)


_PATHS = ("path", "lm_eval_path", "engine_python")  # settings that may name a file or folder of this machine


def public(value: Any, key: str = "") -> Any:
    """Return a config without paths of this machine: a local path becomes that below the project's folder, or its last
    name.
    """
    if isinstance(value, dict):
        return {k: public(v, k) for k, v in value.items()}
    return public_path(value) if key in _PATHS and isinstance(value, str) else value


def public_path(value: str) -> str:
    """Return a path or the name of a Hub repository as others may read it."""
    try:
        path = data.local(value)
    except UserError:  # weights that come with a package have no file of that name
        return Path(value).name
    if path is None:
        return value
    return str(path.relative_to(data.ROOT)) if path.is_relative_to(data.ROOT) else path.name
