"""W&B mirrors the records: a run a stage, a light run a cell, one report run a sweep. It is never the source of a number.

Run ids come from keys, so a stage taken up again continues its run. How runs are sent, and that nobody waits for a server, is
wandb_runs.py's.
"""

import contextlib
import csv
import functools
import html
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from d2lora import data
from d2lora.errors import UserError
from d2lora.keys import digest
from d2lora.mirror.sender import Run, disabled, flush, hush, is_offline
from d2lora.outputs import cached, write_json
from d2lora.plan import Cell
from d2lora.settings import Config, amount
from d2lora.stages import Stage
from d2lora.store import Store

_at_work: ContextVar[Run | None] = ContextVar("at_work", default=None)  # the run of the stage at work

# --- stages --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stage(config: Config, stage: Stage, store: Store) -> Iterator[None]:
    """The run of a stage that does work. At the end it gets what the published record says, or is marked as failed."""
    if disabled(config):
        yield
        return
    about = _about(config, stage)
    run = Run(config, store.folder.parent, id=stage.key, job_type=stage.kind, **about)
    run.do(_define_axes)
    token = _at_work.set(run)
    try:
        yield
        record, place = store.record(stage), store.place(stage)
        assert record is not None, "the caller published it"
        run.do(lambda r: _mirror(r, record, place))
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
    """Log a training's values of now to the run of the stage at work, if it has one."""
    if run := _at_work.get():
        now = {f"train/{k}": v for k, v in values.items()} | {"samples_seen": samples_seen, "_timestamp": time.time()}
        run.do(lambda r: r.log(now))


def _about(config: Config, stage: Stage) -> dict:
    """Name, tags and config of a stage's run: from what the stage depends on, for it may serve many cells."""
    trained = stage if stage.kind in ("prepare", "warmup", "adapt") else stage.parent
    name, tags = _who(config, trained)
    if stage.kind == "evaluate":
        name.insert(0, stage.subject)
    elif stage is not trained:
        name, tags = [stage.label], []
    facts = {"stage": stage.kind, "key": stage.key, "parent": stage.parent and stage.parent.key, "label": stage.label}
    return {"name": " · ".join(name), "tags": tags, "config": stage.spec.content() | facts}


def _who(config: Config, trained: Stage | None) -> tuple[list[str], list[str]]:
    """How an adapter is called, in parts, and its tags. None is the base itself."""
    if trained is None:
        return [f"base {config.model.name}"], ["base"]
    m, n = config.m, config.n if trained.kind == "adapt" else 0
    what = {"adapt": config.method.name, "warmup": "warm-up"}.get(trained.kind, trained.kind)
    return [what, f"D2LoRA({amount(m)}, {amount(n)})", f"s{config.seed}"], [what, config.init.name, _arm(m)]


def _arm(m: int | str) -> str:
    return "LoRA" if m == 0 else "D2LoRA"


def _define_axes(run: Any) -> None:
    run.define_metric("samples_seen", hidden=True)
    run.define_metric("train/*", step_metric="samples_seen")


def _mirror(run: Any, record: dict, place: Path) -> None:
    """A record's provenance as config, its metrics as summary, its items as a Table."""
    import wandb

    run.config.update({k: record[k] for k in ("provenance", "data") if k in record}, allow_val_change=True)
    items = _items(place)
    run.summary.update(_results(record, items))
    run.summary.update({k: record[k] for k in ("seconds", "peak_memory_mb")})
    if items:  # last, for it asks the server
        columns = list(dict.fromkeys(k for item in items for k in item))
        rows = [[_plain(item.get(c)) for c in columns] for item in items]
        run.log({"items": wandb.Table(columns, rows, allow_mixed_types=True)})


def _items(place: Path) -> list[dict]:
    file = place / "items.jsonl"
    if not file.exists():
        return []
    with file.open() as lines:  # not splitlines(), which cuts at U+2028 and the like inside a text
        return [json.loads(line) for line in lines]


def _results(record: dict, items: list[dict]) -> dict:
    """Metrics as flat numbers: a benchmark's with its number of items and the 95 % interval that the report has."""
    import numpy as np  # late, as stats: planning a grid needs neither

    from d2lora import stats

    name = record.get("benchmark", record.get("pair", record["stage"]))
    flat: dict[str, Any] = {}
    for metric, found in record["metrics"].items():
        if isinstance(found, dict) and "value" in found:
            flat |= {f"{name}/{metric}": found["value"], f"{name}/{metric}_items": found["items"]}
            scored = record["stage"] == "evaluate"  # a check's items are no scores, but hits
            if scored and len(items) == found["items"]:
                low, high = stats.interval(np.array([[float(item[metric]) for item in items]]))
                flat |= {f"{name}/{metric}_low": low, f"{name}/{metric}_high": high}
        elif metric != "log":
            flat[metric] = found
    return flat


def _plain(value: Any) -> Any:
    """A Table's column has one type: lists and the like are shown as their JSON."""
    return value if isinstance(value, str | int | float | None) else json.dumps(value, ensure_ascii=False)


# --- artifacts -----------------------------------------------------------------------------------------------------


def _lineage(run: Any, config: Config, stage: Stage, store: Store) -> None:
    """What the stage was given, as its inputs; its adapter, if it made one, as its output.

    An input is given by content, not by name: runs can be uploaded in any order, and W&B takes equal content for one version.
    """
    inputs = [
        _adapter(stage.parent, store) if stage.parent else None,
        _note("base", config.model.name, stage.spec.content()),
    ]
    sources = {"warmup": config.warmup.name, "adapt": config.task.name}
    inputs += [_note("dataset", sources[stage.kind], stage.spec.content())] if stage.kind in sources else []
    for artifact in filter(None, inputs):
        # run.use_artifact() waits for the server, and refuses to work offline; this is what it does otherwise.
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    if made := _adapter(stage, store):
        run.log_artifact(made)


def _adapter(stage: Stage, store: Store) -> Any:
    """A training's adapter; its files are those of the record, which never change, so they are not copied. Or None."""
    import wandb

    folder = store.place(stage) / "adapter"
    if not folder.is_dir():
        return None
    artifact = wandb.Artifact(
        f"{stage.kind}-{stage.key}", "model", description=stage.label, metadata=stage.spec.content()
    )
    for file in sorted(folder.iterdir()):
        artifact.add_file(str(file), policy="immutable")
    return artifact


def _note(kind: str, name: str, spec: dict) -> Any:
    """A base or data set: its fingerprint (content hashes, or the Hub's name and revision), not its files."""
    import wandb

    identity = spec.get({"base": "model", "dataset": "data"}[kind])
    if identity is None:
        return None
    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", f"{kind}-{name}"), kind, metadata=identity)
    with artifact.new_file("identity.json") as file:
        json.dump(identity, file, sort_keys=True)
    return artifact


# --- cells ---------------------------------------------------------------------------------------------------------


def cell(cell: Cell, store: Store) -> None:
    """The light run of a cell whose stages are all done: its config, flat, and its results. Logged once."""
    if disabled(cell.config):
        return
    records = {s: store.record(s) for s in cell.chain.results}
    if any(r is None for r in records.values()):
        return
    results: dict[str, Any] = {}
    for stage, record in records.items():
        assert record is not None
        results |= {f"{stage.kind}_seconds": results.get(f"{stage.kind}_seconds", 0.0) + record["seconds"]}
        if stage in cell.chain.evaluations:
            results |= _results(record, _items(store.place(stage)))
    c = cell.config
    name = f"{c.method.name} · D2LoRA({amount(c.m)}, {amount(c.n)}) · s{c.seed}"
    about = {"name": name, "job_type": "cell", "config": _flat(cell), "tags": [c.method.name, c.init.name, _arm(c.m)]}
    fill = functools.partial(_fill_cell, cell=cell, results=results)
    _log_once(f"cell-{_digest(cell.id, c.sweep)}", results, c, store.folder.parent, fill, **about)


def _fill_cell(run: Any, cell: Cell, results: dict) -> None:
    url = None if run.offline else run.url  # offline the ids find the stages too
    links = [(s.label or s.kind, s.key) for s in cell.chain.results]
    run.notes = "\n".join(f"- [{t}]({url.rsplit('/', 1)[0]}/{key})" if url else f"- {t}: {key}" for t, key in links)
    run.summary.update(results)


def _flat(cell: Cell) -> dict:
    """What one filters and groups by at the top; the resolved config below; the ids of the stages' runs."""
    c = cell.config
    named = {k: getattr(c, k).name for k in ("method", "task", "model", "init", "warmup", "recipe")}
    sizes = {"m": c.m, "n": c.n, "seed": c.seed, "arm": _arm(c.m), "lr": c.recipe.rate(c.method.name)}
    evaluations = {s.subject: s.key for s in cell.chain.evaluations}
    trained = {s.kind: s.key for s in (cell.chain.warmup, cell.chain.adapt) if s}
    whole = c.model_dump(exclude={"output", "data_root", "dry_run", "skip_invalid", "job"})
    return named | sizes | {"cell": cell.id, "stages": trained | {"evaluate": evaluations}, "config": _public(whole)}


def _public(value: Any, key: str = "") -> Any:
    """A config without this machine's paths: of a local one, what is below the project, or else its last name."""
    if isinstance(value, dict):
        return {k: _public(v, k) for k, v in value.items()}
    if key != "path" or not isinstance(value, str):
        return value
    try:
        place = data.local(value)
    except UserError:  # weights that come with a package have no file of that name
        return Path(value).name
    if place is None:
        return value
    return str(place.relative_to(data.ROOT)) if place.is_relative_to(data.ROOT) else place.name


# --- the sweep's report --------------------------------------------------------------------------------------------


def report(cells: list[Cell], store: Store, tables: str) -> str:
    """The runs of cells that no worker logged, and the report run: tables, figures and results.csv.

    Returns what to tell the user: where the runs are. Empty where W&B is disabled.
    """
    config, output = cells[0].config, store.folder.parent
    if disabled(config):
        return ""
    for each in cells:
        cell(each, store)
    folder = output / "report"
    files = [folder / "results.csv", *folder.glob(f"{config.sweep}.png"), *(folder / config.sweep).glob("*.*")]
    files = sorted(f for f in files if f.suffix in (".png", ".csv") and f.is_file())
    about = {"name": f"report · {config.sweep}", "job_type": "report", "config": {"sweep": config.sweep}}
    fill = functools.partial(_fill_report, config=config, files=files, tables=tables)
    content = [_digest(f.name, f.read_bytes().hex()) for f in files]
    _log_once(f"report-{_digest(config.sweep)}", content, config, output, fill, tags=["report"], **about)
    flush(config)
    return _where(output)


def _fill_report(run: Any, config: Config, files: list[Path], tables: str) -> None:
    import wandb

    shown = "\n".join(line for line in tables.splitlines() if not re.match(r"(report|curves): ", line))
    run.log({"tables": wandb.Html(f"<pre>{html.escape(shown.strip())}</pre>")})
    for file in files:
        if file.suffix == ".png":
            run.log({file.stem: wandb.Image(str(file))})
        else:
            run.log({file.stem: _table(file, config.sweep)})
    if config.wandb.artifacts:
        artifact = wandb.Artifact(f"report-{config.sweep}", "report")
        for file in files:
            artifact.add_file(str(file))
        run.log_artifact(artifact)


def _table(file: Path, sweep: str) -> Any:
    """A CSV file as a Table; of results.csv, which holds all sweeps, this sweep's rows."""
    import wandb

    with file.open() as lines:
        rows = [r for r in csv.DictReader(lines) if r.get("sweep", sweep) == sweep]
    columns = list(rows[0]) if rows else []
    return wandb.Table(columns, [[_number(row[c]) for c in columns] for row in rows], allow_mixed_types=True)


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _where(output: Path) -> str:
    kept = any((output / "wandb").glob("offline-run-*"))
    if kept or is_offline():
        shown = os.path.relpath(output)
        return f"W&B: runs in {shown}/wandb; to upload them: wandb sync --include-online {shown}/wandb/*run-*"
    return "W&B: the runs are online"


# --- once ----------------------------------------------------------------------------------------------------------


def _log_once(run_id: str, content: object, whose: Config, output: Path, fill: Callable[[Any], None], **about) -> None:
    """Log a run unless it was logged with this content before; <output>/wandb/logged remembers that."""
    file, now = output / "wandb" / "logged" / f"{run_id}.json", _digest(content)
    if file.exists() and cached(file, str) == now:
        return

    def fill_and_note(run: Any) -> None:  # one task: a run that could not be filled is sent again
        fill(run)
        write_json(file, now)

    run = Run(whose, output, id=run_id, **about)
    run.do(fill_and_note)
    run.end()


def _digest(*parts: object) -> str:
    return digest(list(parts))
