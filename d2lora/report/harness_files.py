"""Write results as lm-evaluation-harness 0.4 does, for programs that read its files: results_*.json and samples_*.jsonl."""

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from d2lora.outputs import Outputs, write_json, write_text
from d2lora.records import Item, ManifestCell, Record, Records, Score, read_items
from d2lora.report.manifest import read_manifest, sweeps
from d2lora.scoring.likelihood import LIKELIHOOD
from d2lora.stages.evaluate import EvaluateSpec

_FILTER = "none"  # the harness names what it did to an answer before scoring; ours are scored as they are
JSON = dict[str, Any]


def export(output: Path, names: Iterable[str], folder: Path | None = None) -> Path:
    """Write each finished cell of the named sweeps, or of all, as a model of the harness. Return the folder.

        <folder>/<cell>/results_<date>.json, samples_<benchmark>_<date>.jsonl

    `folder` is <output>/report/lm-eval without one. The date is the latest evaluation's, so the same records give the same
    files. UserError for a sweep that was never started or is damaged.
    """
    target = folder or Outputs(output).report / "lm-eval"
    records = Records(output)
    for name in names or sweeps(output):
        for cell in read_manifest(output, name).cells:
            evaluations = {
                b: r for b, key in cell.stages.evaluate.items() if (r := records.get(EvaluateSpec.KIND, key))
            }
            if evaluations:
                _write_cell(target / cell.id, cell, evaluations, records)
    return target


def _write_cell(folder: Path, cell: ManifestCell, evaluations: dict[str, Record], records: Records) -> None:
    started = max(record.provenance.started for record in evaluations.values())
    date = started.replace(":", "-").replace("_", "-")  # programs split these names at the last "_"
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for name, record in evaluations.items():
        settings = _settings(cell, name)
        samples = [
            _sample(item, record, settings) for item in read_items(records.outputs.record(record.stage, record.key))
        ]
        hashes[name] = _hash("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))
        lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        write_text(folder / f"samples_{name}_{date}.jsonl", "".join(lines))
    write_json(folder / f"results_{date}.json", _results(cell, evaluations, started) | {"task_hashes": hashes})


def _results(cell: ManifestCell, evaluations: dict[str, Record], started: str) -> JSON:
    """Return the content of results_*.json, without the hashes of samples."""
    newest = max(evaluations.values(), key=lambda record: record.provenance.started)
    metrics = {name: list(record.scores) for name, record in evaluations.items()}
    sizes = {name: record.items for name, record in evaluations.items()}
    return {
        "results": {name: _scores(name, record.scores) for name, record in evaluations.items()},
        "group_subtasks": {name: [] for name in evaluations},
        "configs": {name: _task(name, _settings(cell, name), metrics[name]) for name in evaluations},
        "versions": {name: record.version for name, record in evaluations.items()},
        "n-shot": {name: (r.spec.get("harness") or {}).get("fewshot", 0) for name, r in evaluations.items()},
        "higher_is_better": {name: dict.fromkeys(metrics[name], True) for name in evaluations},
        "n-samples": {name: {"original": size, "effective": size} for name, size in sizes.items()},
        "config": _model(cell, newest),
        "git_hash": newest.provenance.git.commit if newest.provenance.git else None,
        "date": datetime.fromisoformat(started).replace(tzinfo=UTC).timestamp(),
        "transformers_version": newest.provenance.packages.get("transformers"),
        "lm_eval_version": newest.provenance.packages.get("lm-eval"),
        "model_source": "hf",
        "model_name": cell.id,
        "model_name_sanitized": cell.id,
        "total_evaluation_time_seconds": str(sum(record.seconds for record in evaluations.values())),
    }


def _scores(name: str, scores: dict[str, Score]) -> JSON:
    values: JSON = {"name": name, "alias": name, "sample_len": max(score.items for score in scores.values())}
    for metric, score in scores.items():
        values |= {f"{metric},{_FILTER}": score.value}
        values |= {f"{metric}_stderr,{_FILTER}": "N/A" if score.stderr is None else score.stderr}
    return values


def _model(cell: ManifestCell, record: Record) -> JSON:
    """Return what was evaluated: the base by its name, as a path would be this machine's, and the cell as its adapter."""
    adapter = {"peft": cell.id} if any(cell.stages.trained().values()) else {}
    seeds = {f"{name}_seed": cell.config["seed"] for name in ("random", "numpy", "torch", "fewshot")}
    return {
        "model": "hf",
        "model_args": {"pretrained": cell.config["model"]["name"], "dtype": cell.config["model"]["dtype"]} | adapter,
        "batch_size": str(record.eval_batch),
        "limit": None,
        **seeds,
    }


def _settings(cell: ManifestCell, benchmark: str) -> JSON:
    """Return the settings of a benchmark of ours; none of a task of the harness."""
    return cell.config["task"]["benchmark"].get(benchmark, {})


def _task(name: str, settings: JSON, metrics: list[str]) -> JSON:
    """Return a benchmark as the harness describes a task."""
    data = settings.get("data", {})
    path = Path(data.get("path", name))
    return {
        "task": name,
        "dataset_path": path.name if path.is_absolute() else str(path),
        "dataset_name": data.get("name"),
        "test_split": data.get("split"),
        "doc_to_text": settings.get("prompt"),
        "doc_to_target": settings.get("gold"),
        "output_type": _output_type(settings, metrics),
        "num_fewshot": 0,
        "repeats": 1,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        "generation_kwargs": _generation(settings),
    }


def _output_type(settings: JSON, metrics: list[str]) -> str:
    if LIKELIHOOD.metrics[0] in metrics:
        return "loglikelihood"
    return "multiple_choice" if settings.get("choices") else "generate_until"


def _generation(settings: JSON) -> JSON:
    return {"do_sample": False, "max_gen_toks": settings.get("max_new_tokens")}


def _sample(item: Item, record: Record, settings: JSON) -> JSON:
    """Return an item as a line of samples_*.jsonl: of a choice a request for each option, else one."""
    doc = {key: item[key] for key in ("prompt", "gold", "choices") if key in item}
    if LIKELIHOOD.metrics[0] in record.scores:
        requests = _solution(item)
    else:
        requests = _choices(item) if "loglikelihoods" in item else _generated(item, settings)
    target = str(item["choices"].index(item["gold"]) if item["gold"] in item.get("choices", ()) else item["gold"])
    scores = {metric: item[metric] for metric in record.scores}
    return {
        "doc_id": item["index"],
        "doc": doc,
        "target": target,
        **requests,
        "filter": _FILTER,
        "metrics": list(scores),
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(str(item["prompt"])),
        "target_hash": _hash(target),
        **scores,
    }


def _generated(item: Item, settings: JSON) -> JSON:
    """Return the one request of a generated answer."""
    answer = str(item["answer"])
    arguments = {"gen_args_0": {"arg_0": item["prompt"], "arg_1": _generation(settings)}}
    return {"arguments": arguments, "resps": [[answer]], "filtered_resps": [answer]}


def _solution(item: Item) -> JSON:
    """Return the one request of a reference solution; the record has its likelihood per byte, not that of the whole."""
    responses = [["None", "None"]]
    arguments = {"gen_args_0": {"arg_0": item["prompt"], "arg_1": f" {item['gold']}"}}
    return {"arguments": arguments, "resps": [responses], "filtered_resps": responses}


def _choices(item: Item) -> JSON:
    """Return the requests of a choice, each with its log-likelihood; whether it was the greedy answer is not known."""
    arguments = {
        f"gen_args_{i}": {"arg_0": item["prompt"], "arg_1": f" {choice}"} for i, choice in enumerate(item["choices"])
    }
    responses = [[str(likelihood), "None"] for likelihood in item["loglikelihoods"]]
    return {"arguments": arguments, "resps": [[each] for each in responses], "filtered_resps": responses}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
