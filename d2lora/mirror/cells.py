"""Mirror cells, each in a short run, and a sweep in its report run; each once for the same content."""

import csv
import functools
import html
import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d2lora.keys import digest
from d2lora.mirror.sender import About, Run, Trial, address, disabled, fit, flush, folder, is_offline, trial
from d2lora.mirror.values import arm, flat_results, public, varies_of
from d2lora.outputs import Outputs, cached, write_json
from d2lora.plan import Cell
from d2lora.records import read_items
from d2lora.settings import Config, amount
from d2lora.stages.evaluate import EvaluateSpec
from d2lora.store import Store


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
            results |= flat_results(record, read_items(store.folder(stage)), varies_of(cell.config, stage))
    results |= seconds
    c = cell.config
    about = About(
        id=_cell_run(cell, this),
        job_type="cell",
        name=f"{c.method.name} · D2LoRA({amount(c.m)}, {amount(c.n)}) · s{c.seed}",
        tags=[c.method.name, c.init.name, arm(c.m)],
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
    names = {k: getattr(c, k).name for k in ("method", "task", "model", "init", "warmup", "recipe")}
    sizes = {"m": c.m, "n": c.n, "seed": c.seed, "arm": arm(c.m), "lr": c.recipe.rate(c.method.name)}
    evaluations = {s.subject: s.key for s in cell.chain.evaluations}
    trained = {s.kind: s.key for s in (cell.chain.warmup, cell.chain.adapt) if s}
    settings = c.model_dump(exclude={"output", "data_root", "dry_run", "skip_invalid", "job"})
    stages = {**trained, EvaluateSpec.KIND: evaluations}
    return {**names, **sizes, "cell": cell.id, "stages": stages, "config": public(settings)}


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

    text = "\n".join(line for line in tables.splitlines() if not re.match(r"(report|curves): ", line))
    run.log({"tables": wandb.Html(f"<pre>{html.escape(text.strip())}</pre>")})
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
        path = os.path.relpath(folder(outputs))
        return f"W&B: runs in {path}; to upload them: wandb sync --include-online {path}/*run-*"
    url = address(run_id)
    return "W&B: the runs are online" + (f": {url}" if url else "")


def _log_once(
    about: About, content: object, config: Config, outputs: Outputs, fill: Callable[[Any], None], code: int = 0
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

    run = Run(config, outputs, about)
    run.begin()
    run.do(fill_and_note)
    run.end(code)


def _digest(*parts: object) -> str:
    return digest(list(parts))
