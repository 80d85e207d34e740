"""Make a model repository of a cell: its adapter, a card with data, settings and scores, and `.eval_results`.

Nothing of the machine is in it: no path, no host name, no hardware.
"""

import json
import re
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from d2lora.errors import UserError
from d2lora.outputs import ROOT
from d2lora.records import Manifest, ManifestCell, Record, Records, Score
from d2lora.report import axes, formats, table2, tuning
from d2lora.report.compare import Comparison
from d2lora.report.content import Sweep
from d2lora.report.manifest import read_manifest, sweeps
from d2lora.report.points import arm_name, interval_of, varies_of
from d2lora.report.results import CellResults
from d2lora.scoring import shown_metrics, unit_of
from d2lora.scoring.kinds import PERCENT
from d2lora.settings import amount
from d2lora.stages.evaluate import EvaluateSpec

_TAGS = ("lora", "transformers", "d2lora")  # the first two are PEFT's own
_CONFIG = "adapter_config.json"
_CARD = "README.md"
_QUANTIZATION = "quantization_config.json"  # of an adapter that belongs on a quantized base


@dataclass(frozen=True)
class Score95:
    """A score of the cell with the ends of its 95 % interval, as fractions."""

    benchmark: str
    metric: str
    score: Score
    low: float
    high: float

    @property
    def text(self) -> str:
        unit = unit_of(self.metric)
        return f"{unit.value(self.score.value)} {unit.bounds((self.low, self.high))} {unit.name}"


@dataclass(frozen=True)
class Repository:
    """A cell that is published: where its records are, and the sweep whose tables compare it."""

    cell: ManifestCell
    manifest: Manifest
    records: Records

    @property
    def adapter(self) -> tuple[Record, Path]:
        """Return the record of the stage that made the cell's adapter, and the folder of it. UserError without one."""
        for kind, key in reversed(self.cell.stages.trained().items()):
            if record := self.records.get(kind, key):
                return record, self.records.outputs.record(kind, record.key) / "adapter"
            if key:
                raise UserError(f"{self.cell.id}: its {kind} {key} is not finished, so there is no adapter yet")
        raise UserError(f"{self.cell.id}: this is the base itself: there is no adapter to publish")

    @property
    def scores(self) -> Iterator[Score95]:
        """Yield the scores of finished evaluations, in the metrics that tables show."""
        for benchmark, key in self.cell.stages.evaluate.items():
            if record := self.records.get(EvaluateSpec.KIND, key):
                varies = varies_of(self.cell.config, benchmark)
                for metric in shown_metrics(list(record.scores)):
                    yield Score95(
                        benchmark, metric, record.scores[metric], *interval_of(self.records, key, metric, varies)
                    )

    def source(self, benchmark: str) -> dict[str, Any]:
        """Return where a benchmark's rows are from, as its record says; empty of a local file or a task of the harness."""
        record = self.records.get(EvaluateSpec.KIND, self.cell.stages.evaluate[benchmark])
        data = (record.spec.get("benchmark") or {}).get("data", {}) if record else {}
        return data if "path" in data else {}


def find(output: Path, id: str) -> Repository:
    """Return the cell with this id. UserError if no sweep has it; one that is damaged does not hide those of others."""
    names, damaged = sweeps(output), []
    for name in names:
        try:
            manifest = read_manifest(output, name)
        except UserError as error:
            damaged.append(str(error))
            continue
        for cell in (*manifest.cells, *manifest.earlier):
            if cell.id == id:
                return Repository(cell, manifest, Records(output))
    advice = "; ".join(["results.csv lists them as cell_id", *damaged])
    raise UserError(f"{id}: no cell of a sweep here ({', '.join(names) or 'none'}); {advice}")


def files(repository: Repository) -> dict[str, bytes]:
    """Return the repository's files by their paths in it. UserError if one of them names this machine."""
    record, adapter = repository.adapter
    texts = {_CONFIG: _adapter_config(adapter, record, repository), _CARD: str(card(repository))}
    texts |= {f".eval_results/{name}.yaml": text for name, text in eval_results(repository).items()}
    for path, text in texts.items():
        check_private(path, text, repository)
    copied = [file for file in adapter.iterdir() if file.suffix == ".safetensors" or file.name == _QUANTIZATION]
    return {path: text.encode() for path, text in texts.items()} | {file.name: file.read_bytes() for file in copied}


def check_private(path: str, text: str, repository: Repository) -> None:
    """Raise UserError if a text has a path of this machine, one of the cell's own settings among them, or its host name."""
    values = [value for _, value in axes.flat(repository.cell.config)]
    paths = (ROOT, Path.home(), repository.records.outputs.root, *(Path(v) for v in values if Path(v).is_absolute()))
    host = socket.gethostname()
    named = next((str(folder) for folder in paths if _has_path(text, folder)), None)
    if named is None and _has_host(text, host, is_word=host.isalpha() or host in values):
        named = host
    if named:
        raise UserError(
            f"{path}: it would say {named}, which is of this machine: name the data or model by its Hub name"
        )


def _has_path(text: str, folder: Path) -> bool:
    """Tell whether a text has this path, or one below it, and not only its letters: of /root not in a Hub name's owner/root."""
    whole = rf"(?<![\w.~/-]){re.escape(str(folder))}(?![\w-])"
    return folder != Path(folder.anchor) and re.search(whole, text) is not None


def _has_host(text: str, host: str, is_word: bool) -> bool:
    """Tell whether a text has this host name. One that is an ordinary word or a setting's value (lab) must stand as a host: after // or @."""
    before = r"(?://|\\\\|@)" if is_word else r"(?<![\w.-])"
    return bool(host) and re.search(rf"{before}{re.escape(host)}(?![\w-])", text) is not None


def _hub_base(record: Record) -> dict[str, Any]:
    """Return the base's Hub name and revision; empty for a local model."""
    model = record.spec.get("model") or {}
    return model if "path" in model else {}


def _adapter_config(adapter: Path, record: Record, repository: Repository) -> str:
    """Return PEFT's configuration of the adapter, with the base's Hub name and revision instead of what it is called here."""
    base = _hub_base(record)
    content = json.loads((adapter / _CONFIG).read_text())
    content["base_model_name_or_path"] = base.get("path", repository.cell.config["model"]["name"])
    content["revision"] = base.get("revision")
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


# --- the card ------------------------------------------------------------------------------------------------------


def card(repository: Repository) -> ModelCard:
    """Return the model card: PEFT's fields, the data sets, and scores; below them what was trained and what it shows."""
    record, adapter = repository.adapter
    base = _hub_base(record).get("path")
    tags = [*_TAGS, *([f"base_model:adapter:{base}"] if base else [])]
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=sorted(tags),
        datasets=_datasets(repository) or None,
        model_name=repository.cell.id,
        eval_results=[_eval_result(repository, score) for score in repository.scores] or None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(repository, record, (adapter / _QUANTIZATION).exists())}")


def _datasets(repository: Repository) -> list[str]:
    """Return the Hub names of the data sets that the adapter was trained on."""
    trained = CellResults(repository.manifest.sweep, repository.cell, repository.records).trained
    paths = [(record.spec.get("data") or {}).get("path") for record in trained]
    return list(dict.fromkeys(path for path in paths if path))


def _eval_result(repository: Repository, score: Score95) -> EvalResult:
    source, unit = repository.source(score.benchmark), unit_of(score.metric)
    return EvalResult(
        task_type="text-generation",
        dataset_type=source.get("path", score.benchmark),
        dataset_name=score.benchmark,
        dataset_config=source.get("name"),
        dataset_split=source.get("split"),
        dataset_revision=source.get("revision"),
        metric_type=score.metric,
        metric_name=f"{score.metric} in {unit.name}, 95 % interval {unit.bounds((score.low, score.high))}",
        metric_value=float(unit.value(score.score.value)),
    )


def _text(repository: Repository, record: Record, quantized: bool) -> str:
    config = repository.cell.config
    arm = arm_name(config["m"], axes.control(config)).replace(" n)", f" {amount(config['n'])})")
    scores = [[s.benchmark, s.metric, s.text, f"{s.score.items:,}"] for s in repository.scores]
    settings = [row for row in table2.table([repository.cell]).rows if row[1] != table2.UNUSED]
    parts = [
        f"# {repository.cell.id}",
        f"A LoRA adapter of {_hub_base(record).get('path', config['model']['name'])}, trained with "
        f"d2lora: {arm}, {config['method']['name'].upper()} on {config['task']['name']}.",
        *(
            [f"It belongs on the base in 4 bits, as {_QUANTIZATION} says, and answers wrongly on the base itself."]
            * quantized
        ),
        "## Scores",
        formats.markdown_rows(["benchmark", "metric", "value [95 % interval]", "items"], scores)
        if scores
        else "None yet.",
        *_verdicts(repository),
        "## Settings",
        formats.markdown_rows(["setting", "value"], settings),
        "## Training procedure",
        "\n".join(_trainings(repository)),
        "### Framework versions",
        "\n".join(f"- {_package(name)} {version}" for name, version in record.provenance.packages.items() if version),
    ]
    return "\n\n".join(parts) + "\n"


def _package(name: str) -> str:
    return name.upper() if name in ("peft", "trl") else name  # as PEFT and TRL write them in their cards


def _trainings(repository: Repository) -> Iterator[str]:
    """Yield a line for each training: its samples, steps, losses and what it read."""
    for record in CellResults(repository.manifest.sweep, repository.cell, repository.records).trained:
        numbers = {
            name: record.metrics[name]
            for name in ("steps", "samples_seen", "first_loss", "last_loss")
            if name in record.metrics
        }
        metrics = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items()]
        source = record.spec.get("data") or {}
        read = f"{source['path']} at {source.get('revision')}" if "path" in source else "local rows"
        yield f"- {record.stage}: {'; '.join(filter(None, [record.label, read, ', '.join(metrics)]))}"


def _verdicts(repository: Repository) -> list[str]:
    """Return what the sweep's tables say of the cell's arm, over all seeds that they fold."""
    planned = repository.manifest
    points, fixed = tuning.points(planned, repository.records)
    sweep = Sweep(planned.sweep, planned.cells, points, repository.records, planned.tuning, fixed)
    lines = []
    for table in sweep.own_tables:
        unit = f" in {table.unit.name}"
        for comparison in table.unique_pairs:
            sides = (comparison.lora, comparison.d2lora)
            if any(run.cell == repository.cell.id for point in sides for run in point.runs.values()):
                lines.append(f"- {table.title.removesuffix(unit)}: {_verdict(comparison)}")
    return (
        ["D2LoRA minus LoRA on the same items, in the sweep that this adapter is from:", "\n".join(lines)]
        if lines
        else []
    )


def _verdict(c: Comparison) -> str:
    seeds = ", ".join(map(str, c.seeds))
    difference = f"{c.unit.value(c.difference, '+')} {c.unit.several} {c.unit.bounds(c.interval, '+')}"
    return f"{c.label}: {difference}, p {formats.p_text(c.adjusted)} (Holm), seeds {seeds}: D2LoRA is {c.decision}"


# --- .eval_results -------------------------------------------------------------------------------------------------


def eval_results(repository: Repository) -> dict[str, str]:
    """Return YAML by benchmark for the Hub's leaderboards (huggingface.co/docs/hub/eval-results), of benchmarks on the Hub.

    The Hub shows them where it knows the data set as a benchmark, by its task: the data set's configuration. Likelihoods and
    scores on validation rows have no place there: they would stand as the benchmark's accuracy.
    """
    tests = repository.cell.config["task"]["benchmark"]
    scores = [s for s in repository.scores if s.benchmark in tests and unit_of(s.metric) == PERCENT]
    first = {score.benchmark: score for score in reversed(scores)}
    entries = {b: _entry(repository, s, source) for b, s in first.items() if (source := repository.source(b))}
    return {b: yaml.safe_dump(eval_result_entries_to_yaml([e]), sort_keys=False) for b, e in entries.items()}


def _entry(repository: Repository, score: Score95, source: dict[str, Any]) -> EvalResultEntry:
    record = repository.records.get(EvaluateSpec.KIND, repository.cell.stages.evaluate[score.benchmark])
    interval = PERCENT.bounds((score.low, score.high))
    return EvalResultEntry(
        dataset_id=source["path"],
        task_id=source.get("name") or "default",
        value=float(PERCENT.value(score.score.value)),
        dataset_revision=source.get("revision"),
        date=record.provenance.started if record else None,
        notes=f"{score.metric} in %, zero-shot, {score.score.items} items, 95 % interval {interval}",
    )


# --- writing and uploading -----------------------------------------------------------------------------------------


def write(content: dict[str, bytes], folder: Path) -> None:
    """Write a repository's files into a new folder, or over those that an earlier call wrote. UserError for another folder.

    The folder is whole at each moment, or not there: nothing of it is half an upload.
    """
    if folder.exists() and not _is_ours(folder):
        raise UserError(f"{folder}: not a published cell's folder: name a new one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        whole = Path(temporary) / "new"
        for path, data in content.items():
            file = whole / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        whole.rename(folder)


def _is_ours(folder: Path) -> bool:
    """Tell whether a folder is empty, or has nothing but what `write` writes, its card among it.

    PEFT's own folders, the store's adapters among them, have no such card, and a clone of a repository has more.
    """
    if not folder.is_dir():
        return False
    paths = {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}
    if not paths:
        return True
    known = all(
        path in (_CONFIG, _QUANTIZATION, _CARD) or path.endswith(".safetensors") or path.startswith(".eval_results/")
        for path in paths
    )
    return known and _CARD in paths and f"- {_TAGS[-1]}\n" in (folder / _CARD).read_text()


def upload(folder: Path, to: str, public: bool) -> str:
    """Upload a folder into the model repository `to` (owner/name) with the user's login, and return its address.

    UserError in one line if the Hub refuses or can't be reached.
    """
    from d2lora.data.hub import hub, hub_problem

    try:
        api = hub().HfApi()
        address = api.create_repo(to, private=not public, exist_ok=True)
        api.upload_folder(repo_id=to, folder_path=folder, commit_message="Adapter, card and scores")
    except Exception as error:  # whatever a Hub's client raises ends in one line
        raise UserError(
            f"nothing more is uploaded (the folder stays: {folder}): {hub_problem('to', to, error)}"
        ) from error
    return str(address)


def publish(output: Path, id: str, folder: Path | None, to: str | None, public: bool) -> str:
    """Return what a cell's repository consists of. Write it where `folder` or `to` says so; upload it where `to` does."""
    repository = find(output, id)
    content = files(repository)
    lines = [f"{len(data):>10,} bytes  {path}" for path, data in sorted(content.items())]
    target = folder or output / "hub" / id
    if not folder and not to:
        shown = content[_CARD].decode()
        advice = "dry run: nothing is written or uploaded; --folder FOLDER writes it, --to OWNER/NAME uploads it too"
        return "\n".join([*lines, "", shown, advice])
    write(content, target)
    lines.append(f"written: {target}")
    if to:
        lines.append(f"uploaded: {upload(target, to, public)}")
    return "\n".join(lines)
