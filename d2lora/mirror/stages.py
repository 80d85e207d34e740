"""Mirror a stage: a run around its work, with its training's curves and, at the end, the record's values."""

import contextlib
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d2lora.mirror.artifacts import lineage
from d2lora.mirror.sender import About, Run, disabled, hush
from d2lora.mirror.values import arm, flat_results, varies_of
from d2lora.progress import logged_by
from d2lora.records import Record, read_items
from d2lora.settings import Config, amount
from d2lora.stages import Stage
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.evaluate import EvaluateSpec
from d2lora.stages.merge import MergeSpec
from d2lora.stages.prepare import PrepareSpec
from d2lora.stages.run import AfterOthers
from d2lora.stages.training import TrainingSpec
from d2lora.stages.warmup import WarmupSpec
from d2lora.store import Store


@contextlib.contextmanager
def stage(config: Config, stage: Stage, store: Store, may_wait: bool = False) -> Iterator[None]:
    """Open a run around a stage's work. At its end it gets the published record's values, or is marked as failed.

    `may_wait`: the work may raise AfterOthers, and be done later. Its run is then opened only after the work, and not if it waits.
    """
    if disabled(config):
        yield
        return
    run = Run(config, store.outputs, _about(config, stage))
    run.do(_define_axes)
    if not may_wait:
        run.begin()
    try:
        with logged_by(functools.partial(_log, run)):
            yield
        run.begin()
        record, folder = store.record(stage), store.folder(stage)
        assert record is not None, "the caller published it"
        run.do(lambda r: _mirror(r, record, folder, varies_of(config, stage)))
        if config.wandb.artifacts:
            run.do(lambda r: lineage(r, config, stage, store))
        run.end()
    except AfterOthers:
        raise
    except KeyboardInterrupt:
        run.end(code=1)
        hush()
        raise
    except BaseException:
        run.begin()
        run.end(code=1)
        raise


def _log(run: Run, values: dict[str, float], samples_seen: int) -> None:
    """Log a training's current values to its stage's run."""
    curves = {f"train/{name}": value for name, value in values.items()}
    logged = curves | {"samples_seen": samples_seen, "_timestamp": time.time()}
    run.do(lambda r: r.log(logged))


def _about(config: Config, stage: Stage) -> About:
    """Return a run's config: what the stage depends on and nothing else, because the stage may serve many cells."""
    trained = stage if isinstance(stage.spec, PrepareSpec | TrainingSpec | MergeSpec) else stage.parent
    name, tags = _who(config, trained)
    if stage.kind == EvaluateSpec.KIND:
        name.insert(0, stage.subject)
    elif stage is not trained:
        name, tags = [stage.label], []
    facts = {"stage": stage.kind, "key": stage.key, "parent": stage.parent and stage.parent.key, "label": stage.label}
    flat: dict[str, object] = {"model": config.model.name}
    if stage is trained or stage.kind == EvaluateSpec.KIND:
        flat |= _flat_training(config, trained)
    return About(stage.key, stage.kind, " · ".join(name), tags, {"spec": stage.spec.content()} | facts | flat)


def _flat_training(config: Config, trained: Stage | None) -> dict[str, object]:
    """Return what an adapter depends on, under the names that cells' runs have for it; of the base itself m and n of 0.

    A warm-up serves cells of several methods, tasks and n, so it has none of them.
    """
    m = _warmed(config, trained)
    flat: dict[str, object] = {"m": m, "arm": arm(m), "n": 0}
    if trained is None:
        return flat
    flat |= {"init": config.init.name, "recipe": config.recipe.name, "seed": config.seed}
    if isinstance(trained.spec, AdaptSpec | MergeSpec):
        method = config.method.name
        flat |= {"method": method, "task": config.task.name, "n": config.n, "lr": config.recipe.rate(method)}
    return flat


def _warmed(config: Config, trained: Stage | None) -> int | str:
    """Return the m of an adapter: of the warm-up that it had, or of the control arm that stands in for one."""
    if trained is None or trained.kind == PrepareSpec.KIND:
        return 0
    if isinstance(trained.spec, AdaptSpec) and trained.spec.control is None:
        return _warmed(config, trained.parent)
    return config.m


def _who(config: Config, trained: Stage | None) -> tuple[list[str], list[str]]:
    """Return the parts of an adapter's name, and its tags. None is the base itself."""
    if trained is None:
        return [f"base {config.model.name}"], ["base"]
    m, n = config.m, config.n if isinstance(trained.spec, AdaptSpec | MergeSpec) else 0
    what = {AdaptSpec.KIND: config.method.name, MergeSpec.KIND: config.method.name, WarmupSpec.KIND: "warm-up"}.get(
        trained.kind, trained.kind
    )
    return [what, config.effective_control.label.format(m=amount(m), n=amount(n)), f"s{config.seed}"], [
        what,
        config.init.name,
        arm(m),
    ]


def _define_axes(run: Any) -> None:
    run.define_metric("samples_seen", hidden=True)
    run.define_metric("train/*", step_metric="samples_seen")


def _mirror(run: Any, record: Record, folder: Path, varies: str | None) -> None:
    """Show a record's provenance as config, its metrics as summary, its items as a Table."""
    import wandb

    content = record.as_read()
    run.config.update({k: content[k] for k in ("provenance", "data") if k in content}, allow_val_change=True)
    items = read_items(folder)
    run.summary.update(flat_results(record, items, varies))
    run.summary.update({"seconds": record.seconds, "peak_memory_mb": record.peak_memory_mb})
    if items:  # last, for it asks the server
        columns = list(dict.fromkeys(k for item in items for k in item))
        rows = [[_plain(item.get(c)) for c in columns] for item in items]
        run.log({"items": wandb.Table([*columns], rows, allow_mixed_types=True)})


def _plain(value: object) -> str | int | float | None:
    """Return a value for a W&B Table, whose columns have one type each: lists and the like as JSON."""
    return value if isinstance(value, str | int | float | None) else json.dumps(value, ensure_ascii=False)
