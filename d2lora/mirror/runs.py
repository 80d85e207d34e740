"""Mirror records to W&B: a run for each stage, a short run for each cell, one report run for each sweep.

W&B is never the source of a number. Run ids come from keys, so a resumed stage continues its run. sender.py sends the
runs without letting stages wait for a server.
"""

import contextlib
import csv
import functools
import html
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from d2lora import data
from d2lora.errors import UserError
from d2lora.keys import digest
from d2lora.mirror.sender import About, Run, Trial, address, disabled, fit, flush, folder, hush, is_offline, trial
from d2lora.outputs import Outputs, cached, write_json
from d2lora.plan import Cell
from d2lora.records import Item, Record, Score, clusters_of, read_items
from d2lora.scoring import is_graded
from d2lora.settings import Config, amount
from d2lora.stages import Stage
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.evaluate import EvaluateSpec
from d2lora.stages.merge import MergeSpec
from d2lora.stages.prepare import PrepareSpec
from d2lora.stages.stage import Identity
from d2lora.stages.training import TrainingSpec
from d2lora.stages.warmup import WarmupSpec
from d2lora.store import Store

_at_work: ContextVar[Run | None] = ContextVar("at_work", default=None)  # the run of the stage at work

# --- stages --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stage(config: Config, stage: Stage, store: Store) -> Iterator[None]:
    """Open a run around a stage's work. At its end it gets the published record's values, or is marked as failed."""
    if disabled(config):
        yield
        return
    run = Run(config, store.outputs, _about(config, stage))
    run.do(_define_axes)
    token = _at_work.set(run)
    try:
        yield
        record, folder = store.record(stage), store.folder(stage)
        assert record is not None, "the caller published it"
        run.do(lambda r: _mirror(r, record, folder, _varies(config, stage)))
        if config.wandb.artifacts:
            run.do(lambda r: _lineage(r, config, stage, store))
        run.end()
    except BaseException as error:
        run.end(code=1)
        if isinstance(error, KeyboardInterrupt):
            hush()
        raise
    finally:
        _at_work.reset(token)


def log(values: dict[str, float], samples_seen: int) -> None:
    """Log a training's current values to the current stage's run, if it has one."""
    if run := _at_work.get():
        shown = {f"train/{k}": v for k, v in values.items()} | {"samples_seen": samples_seen, "_timestamp": time.time()}
        run.do(lambda r: r.log(shown))


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
    flat: dict[str, object] = {"m": m, "arm": _arm(m), "n": 0}
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
        _arm(m),
    ]


def _arm(m: int | str) -> str:
    return "LoRA" if m == 0 else "D2LoRA"


def _define_axes(run: Any) -> None:
    run.define_metric("samples_seen", hidden=True)
    run.define_metric("train/*", step_metric="samples_seen")


def _varies(config: Config, stage: Stage) -> str | None:
    """Return what differs between items of one template, as the benchmark of an evaluation says."""
    benchmark = config.benchmarks.get(stage.subject)
    return benchmark.varies if benchmark else None


def _mirror(run: Any, record: Record, folder: Path, varies: str | None) -> None:
    """Show a record's provenance as config, its metrics as summary, its items as a Table."""
    import wandb

    content = record.as_read()
    run.config.update({k: content[k] for k in ("provenance", "data") if k in content}, allow_val_change=True)
    items = read_items(folder)
    run.summary.update(_results(record, items, varies))
    run.summary.update({"seconds": record.seconds, "peak_memory_mb": record.peak_memory_mb})
    if items:  # last, for it asks the server
        columns = list(dict.fromkeys(k for item in items for k in item))
        rows = [[_plain(item.get(c)) for c in columns] for item in items]
        run.log({"items": wandb.Table([*columns], rows, allow_mixed_types=True)})


def _results(record: Record, items: list[Item], varies: str | None) -> dict[str, object]:
    """Return metrics by flat names: a benchmark's with its number of items and the 95 % interval that the report has."""
    name = record.benchmark or record.pair or record.stage
    flat: dict[str, object] = {}
    for metric, value in record.metrics.items():
        if isinstance(value, Score):
            flat |= {f"{name}/{metric}": value.value, f"{name}/{metric}_items": value.items}
            # A check's items are no scores, but hits.
            if record.stage == EvaluateSpec.KIND and len(items) == value.items:
                low, high = _interval(metric, items, varies)
                flat |= {f"{name}/{metric}_low": low, f"{name}/{metric}_high": high}
        elif metric != "log":
            flat[metric] = value
    return flat


def _interval(metric: str, items: list[Item], varies: str | None = None) -> tuple[float, float]:
    """Return the 95 % interval of a metric's mean over items, or over clusters of items that belong together (clusters_of)."""
    import numpy as np  # late, as stats: planning a grid needs neither

    from d2lora import stats

    clusters = clusters_of(items, varies)
    return stats.interval(np.array([[float(item[metric]) for item in items]]), is_graded(metric), clusters)


def _plain(value: object) -> str | int | float | None:
    """Return a value for a W&B Table, whose columns have one type each: lists and the like as JSON."""
    return value if isinstance(value, str | int | float | None) else json.dumps(value, ensure_ascii=False)


# --- artifacts -----------------------------------------------------------------------------------------------------


def _lineage(run: Any, config: Config, stage: Stage, store: Store) -> None:
    """Declare a stage's inputs, and its adapter as output, if it has one.

    Inputs are artifacts with content, so that runs can be uploaded in any order: W&B recognizes equal content as the
    same version.
    """
    inputs = [
        _adapter(stage.parent, store) if stage.parent else None,
        _note("base", config.model.name, stage.spec.content()),
    ]
    sources = {WarmupSpec.KIND: config.warmup.name, AdaptSpec.KIND: config.task.name}
    if source := sources.get(stage.kind):
        inputs.append(_note("dataset", source, stage.spec.content()))
    for artifact in filter(None, inputs):
        # run.use_artifact() waits for the server, and refuses to work offline; this is what it does otherwise.
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    if adapter := _adapter(stage, store):
        run.log_artifact(adapter)


def _adapter(stage: Stage, store: Store) -> Any:
    """Return a training's adapter, or None. Its files are those of the record, which never change, so they are not copied.

    But for its config, which names a local base by its path.
    """
    import wandb

    folder = store.folder(stage) / "adapter"
    if not folder.is_dir():
        return None
    artifact = wandb.Artifact(
        f"{stage.kind}-{stage.key}", "model", description=stage.label, metadata=stage.spec.content()
    )
    for file in sorted(folder.iterdir()):
        if file.name == "adapter_config.json":
            content = json.loads(file.read_text())
            base = _public_path(content["base_model_name_or_path"])
            with artifact.new_file(file.name) as copy:
                json.dump(content | {"base_model_name_or_path": base}, copy, indent=2)
        else:
            artifact.add_file(str(file), policy="immutable")
    return artifact


def _note(kind: str, name: str, spec: Identity) -> Any:
    """Return a base or data set as an artifact: its fingerprint (content hashes, or the Hub's name and revision), not its files."""
    import wandb

    identity = spec.get({"base": "model", "dataset": "data"}[kind])
    if identity is None:
        return None
    artifact = wandb.Artifact(fit(f"{kind}-{name}"), kind, metadata=identity)
    with artifact.new_file("identity.json") as file:
        json.dump(identity, file, sort_keys=True)
    return artifact


# --- cells ---------------------------------------------------------------------------------------------------------


def cell(cell: Cell, store: Store) -> None:
    """Log the run of a cell whose stages are all done, once: its flat config and its results.

    Where `wandb agent` started this process it is the trial's run, also of a cell that failed.
    """
    # A share of a grid is no trial by itself: there the report's run is the trial's.
    _cell(cell, store, None if cell.config.job else trial())


def where_cell(cell: Cell, store: Store) -> str:
    """Say where the runs of a single cell are. Empty where W&B is disabled."""
    if disabled(cell.config):
        return ""
    return where(store.outputs, _cell_run(cell, trial()))


def _cell_run(cell: Cell, this: Trial | None) -> str:
    """Return the id of a cell's run: the trial's, if it is one."""
    return this.run if this else f"cell-{_digest(cell.id, cell.config.sweep)}"


def _cell(cell: Cell, store: Store, this: Trial | None = None) -> None:
    if disabled(cell.config):
        return
    records = {s: record for s in cell.chain.results if (record := store.record(s))}
    failed = len(records) < len(cell.chain.results)
    if failed and not this:
        return
    seconds: dict[str, float] = defaultdict(float)
    results: dict[str, object] = {}
    for stage, record in records.items():
        seconds[f"{stage.kind}_seconds"] += record.seconds
        if stage in (*cell.chain.validations, *cell.chain.evaluations):
            results |= _results(record, read_items(store.folder(stage)), _varies(cell.config, stage))
    results |= seconds
    c = cell.config
    about = About(
        id=_cell_run(cell, this),
        job_type="cell",
        name=f"{c.method.name} · D2LoRA({amount(c.m)}, {amount(c.n)}) · s{c.seed}",
        tags=[c.method.name, c.init.name, _arm(c.m)],
        config=_flat(cell),
        trial=this,
    )
    fill = functools.partial(_fill_cell, cell=cell, results=results)
    _log_once(about, results, c, store.outputs, fill, code=1 if failed else 0)


def _fill_cell(run: Any, cell: Cell, results: dict[str, object]) -> None:
    url = None if run.offline else run.url  # offline the ids find the stages too
    links = [(s.label or s.kind, s.key) for s in cell.chain.results]
    lines = [f"- [{t}]({url.rsplit('/', 1)[0]}/{key})" if url else f"- {t}: {key}" for t, key in links]
    run.notes = "\n".join([*filter(None, [run.notes]), *lines])
    run.summary.update(results)


def _flat(cell: Cell) -> dict[str, object]:
    """Return a cell's config for W&B: values to filter and group by at the top, and the ids of its stages' runs."""
    c = cell.config
    named = {k: getattr(c, k).name for k in ("method", "task", "model", "init", "warmup", "recipe")}
    sizes = {"m": c.m, "n": c.n, "seed": c.seed, "arm": _arm(c.m), "lr": c.recipe.rate(c.method.name)}
    evaluations = {s.subject: s.key for s in cell.chain.evaluations}
    trained = {s.kind: s.key for s in (cell.chain.warmup, cell.chain.adapt) if s}
    whole = c.model_dump(exclude={"output", "data_root", "dry_run", "skip_invalid", "job"})
    stages = {**trained, EvaluateSpec.KIND: evaluations}
    return {**named, **sizes, "cell": cell.id, "stages": stages, "config": _public(whole)}


_PATHS = ("path", "lm_eval_path", "engine_python")  # settings that may name a file or folder of this machine


def _public(value: Any, key: str = "") -> Any:
    """Return a config without paths of this machine: a local path becomes that below the project's folder, or its last
    name.
    """
    if isinstance(value, dict):
        return {k: _public(v, k) for k, v in value.items()}
    return _public_path(value) if key in _PATHS and isinstance(value, str) else value


def _public_path(value: str) -> str:
    try:
        path = data.local(value)
    except UserError:  # weights that come with a package have no file of that name
        return Path(value).name
    if path is None:
        return value
    return str(path.relative_to(data.ROOT)) if path.is_relative_to(data.ROOT) else path.name


# --- the sweep's report --------------------------------------------------------------------------------------------


def report(cells: list[Cell], store: Store, tables: str) -> str:
    """Log the runs of cells that no worker logged, and the report run: tables, figures and results.csv.

    Returns what to tell the user: where the runs are. Empty where W&B is disabled.
    """
    config, outputs = cells[0].config, store.outputs
    if disabled(config):
        return ""
    for each in cells:
        _cell(each, store)
    files = [outputs.results, *outputs.artefacts(config.sweep).glob("*.*")]
    files = sorted(f for f in files if f.suffix in (".png", ".csv") and f.is_file())
    this = trial()
    about = About(
        id=this.run if this else f"report-{_digest(config.sweep)}",
        job_type="report",
        name=f"report · {config.sweep}",
        tags=["report"],
        config={"sweep": config.sweep},
        trial=this,
    )
    content = [_digest(f.name, f.read_bytes().hex()) for f in files]
    means = _means(cells, store) if this else {}
    fill = functools.partial(_fill_report, config=config, files=files, tables=tables, means=means)
    _log_once(about, content, config, outputs, fill)
    flush(config)
    return "" if disabled(config) else where(outputs, about.id)


def _means(cells: list[Cell], store: Store) -> dict[str, float]:
    """Return the mean over cells of each metric: what a W&B sweep sees of a trial that is a grid, over seeds for example."""
    values: dict[str, list[float]] = defaultdict(list)
    for stage in (s for c in cells for s in (*c.chain.validations, *c.chain.evaluations)):
        record = store.record(stage)
        for metric, score in (record.scores if record else {}).items():
            values[f"{stage.subject}/{metric}"].append(score.value)
    return {name: sum(each) / len(each) for name, each in values.items()}


def _fill_report(run: Any, config: Config, files: list[Path], tables: str, means: dict[str, float]) -> None:
    import wandb

    run.summary.update(means)

    shown = "\n".join(line for line in tables.splitlines() if not re.match(r"(report|curves): ", line))
    run.log({"tables": wandb.Html(f"<pre>{html.escape(shown.strip())}</pre>")})
    for file in files:
        if file.suffix == ".png":
            run.log({file.stem: wandb.Image(str(file))})
        else:
            run.log({file.stem: _table(file, config.sweep)})
    if config.wandb.artifacts:
        artifact = wandb.Artifact(fit(f"report-{config.sweep}"), "report")
        for file in files:
            artifact.add_file(str(file))
        run.log_artifact(artifact)


def _table(file: Path, sweep: str) -> Any:
    """Return a CSV file as a Table; of results.csv, which holds all sweeps, this sweep's rows."""
    import wandb

    with file.open() as lines:
        rows = [r for r in csv.DictReader(lines) if r.get("sweep", sweep) == sweep]
    columns = list(rows[0]) if rows else []
    return wandb.Table(columns, [[_number(row[c]) for c in columns] for row in rows], allow_mixed_types=True)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def where(outputs: Outputs, run_id: str) -> str:
    """Say where the runs are; online the address of the one that sums them up."""
    if is_offline() or any(folder(outputs).glob("offline-run-*")):
        shown = os.path.relpath(folder(outputs))
        return f"W&B: runs in {shown}; to upload them: wandb sync --include-online {shown}/*run-*"
    url = address(run_id)
    return "W&B: the runs are online" + (f": {url}" if url else "")


# --- once ----------------------------------------------------------------------------------------------------------


def _log_once(
    about: About, content: object, whose: Config, outputs: Outputs, fill: Callable[[Any], None], code: int = 0
) -> None:
    """Log a run unless it was logged with this content before; <output>/wandb/logged remembers that.

    A code other than 0 marks it as failed.
    """
    file, current = outputs.logged(about.id), _digest(content)
    if file.exists() and cached(file, str) == current:
        return

    def fill_and_note(run: Any) -> None:  # one task: a run that could not be filled is sent again
        fill(run)
        write_json(file, current)

    run = Run(whose, outputs, about)
    run.do(fill_and_note)
    run.end(code)


def _digest(*parts: object) -> str:
    return digest(list(parts))
