"""Write the report as one HTML file: page.html with its style, script and data, and nothing from the network.

Texts of records (prompts, answers) are not trusted: they are JSON that can't close its element, and the script only
ever sets them as text.
"""

import base64
import dataclasses
import json
import random
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from d2lora.keys import canonical, digest
from d2lora.records import Item, ManifestCell, Record, Records, Score
from d2lora.report import axes, differences, evidence, figures, formats, paper
from d2lora.report.compare import Comparison
from d2lora.report.content import Rows, Sweep
from d2lora.report.figures import Curve, Panel
from d2lora.report.looks import COLOURS, MARKS, METHODS, NAMES, outline
from d2lora.report.points import Point, size
from d2lora.report.results import CellResults
from d2lora.report.sweep_report import Loaded, Shown
from d2lora.report.tables import Table, column_name
from d2lora.scoring import unit_of
from d2lora.settings import amount
from d2lora.settings.controls import NO_CONTROL

_ANSWER, _PROMPT = 600, 2000  # characters kept of a text
_COUNTS = "right: both / D2LoRA alone / LoRA alone / neither"  # the column of the counts behind McNemar's test
_BUDGET, _FEWEST, _MOST = 5_000_000, 4, 24  # characters of all answers; sampled items a benchmark

JSON = dict[str, Any]


def page(sweeps: list[Loaded], records: Records) -> str:
    """Return the page's HTML; the sweep with the latest record comes first."""
    data = _Data(records)
    content: JSON = {"sweeps": [data.sweep(s) for s in sweeps]} | data.tables()
    content["sweeps"].sort(key=lambda sweep: sweep["date"], reverse=True)
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    folder = files("d2lora.report")
    html = (folder / "page.html").read_text()
    for name in ("page.css", "page.js"):
        html = html.replace(f"/* {name} */", (folder / name).read_text())
    return html.replace("/* data */", text)


class _Data:
    """The page's data. Points, comparisons and environments are in lists, each once, and referred to by their index."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.points: dict[Point, int] = {}
        self.sweeps: list[str] = []  # of each point
        self.comparisons: dict[Comparison, int] = {}
        self.environments: dict[str, int] = {}
        self.markers: dict[str, str] = {}  # matplotlib's letter -> path

    def tables(self) -> JSON:
        samples = _samples(self.points, self.records)
        return {
            "points": [_point(p) | {"sweep": s} for p, s in zip(self.points, self.sweeps, strict=True)],
            "comparisons": [_comparison(c) for c in self.comparisons],
            "records": self._records(),
            "environments": [json.loads(e) for e in self.environments],
            "markers": self.markers,
            "arms": {"lora": figures.LORA, "d2lora": figures.D2LORA},
            "units": {p.metric: dataclasses.asdict(unit_of(p.metric)) for p in self.points},
            "methods": [{"name": name, "label": NAMES[name]} for name in METHODS],  # in the order of tables
        } | samples

    def sweep(self, loaded: Loaded) -> JSON:
        for point in loaded.sweep.points:
            self._index(point)
        sweep = loaded.sweep
        contents = [self._shown(s, sweep.name) for s in loaded.shown]
        self.sweeps += [sweep.name] * (len(self.points) - len(self.sweeps))
        return {
            "name": sweep.name,
            "problem": loaded.problem,
            "shown": contents,
            "date": _latest(sweep),
            "holds": contents_of(sweep.cells),
            "cells": len(sweep.cells),
            "finished": sum(CellResults(sweep.name, cell, self.records).is_finished for cell in sweep.cells),
        }

    def _shown(self, shown: Shown, sweep: str) -> JSON:
        artefact, content = shown.artefact, shown.content
        stems = {artefact.name, artefact.figure or artefact.name} if artefact.files else set()
        folder = self.records.outputs.artefacts(sweep)
        return {
            "title": artefact.title or artefact.caption,
            "files": sorted(f"{sweep}/{file.name}" for file in folder.glob("*.*") if file.stem in stems),
            "folded": artefact.folded,
            "notes": [*(formats.footnotes(content.tables) if content.tables else []), *content.notes],
            "verdicts": [*content.sentences, *(table.verdict for table in content.verdicts if table.pairs)],
            "tables": [self._table(table) for table in content.tables],
            "panels": [*map(self._panel, content.panels), *map(self._differences, content.differences)],
            "image": _image(folder / f"{artefact.figure or artefact.name}.svg") if content.draw else None,
            "rows": _rows(content.rows) if content.rows else None,
        }

    def _table(self, table: Table) -> JSON:
        counted = any(c.outcomes for c in table.unique_pairs)
        return {
            "pair_head": [*formats.PAIR_HEAD, *([_COUNTS] if counted else [])],
            "title": table.title,
            "unit": table.unit.several,
            "columns": [column_name(table, n) for n in table.columns],
            "verdict": table.verdict,
            "remarks": table.remarks,
            "pairs": [
                {
                    "points": [self._index(p) for p, own in table.pairs.items() if own is c],
                    "row": [*row, *([_counts(c)] if counted else [])],
                }
                for c, row in zip(table.unique_pairs, formats.pair_rows(table), strict=True)
            ],
            "lines": [
                {"label": line.label, "cells": [self._cell(table, line.points.get(n)) for n in table.columns]}
                for line in table.lines
            ],
        }

    def _cell(self, table: Table, point: Point | None) -> JSON | None:
        if point is None:
            return None
        pair = table.pairs.get(point)
        return {
            "p": self._index(point),
            "c": self._pair(pair) if pair else None,
        }

    def _panel(self, panel: Panel) -> JSON:
        return _placed(panel) | {"curves": [self._curve(curve, panel) for curve in panel.curves]}

    def _differences(self, panel: differences.Panel) -> JSON:
        """Return a panel of differences: it has a margin, and each point its comparison."""
        curves = [
            self._look(COLOURS[curve.method], MARKS[curve.method])
            | {"label": curve.label, "lora": False, "paper": []}
            | {"points": [[x, self._index(point), self._pair(comparison)] for x, point, comparison in curve.points]}
            for curve in panel.curves
        ]
        margin = {"margin": panel.margin / 100, "band": differences.margin_label(panel)}
        return _placed(panel) | margin | {"curves": curves}

    def _look(self, colour: str, marker: str) -> JSON:
        if marker not in self.markers:
            self.markers[marker] = outline(marker)
        return {"colour": colour, "marker": marker}

    def _curve(self, curve: Curve, panel: Panel) -> JSON:
        return self._look(*figures.look(curve, panel)) | {
            "label": curve.label,
            "lora": curve.m == 0,
            "points": [[x, self._index(point)] for x, point in curve.points],
            "paper": curve.paper,
        }

    def _pair(self, comparison: Comparison) -> int:
        return self.comparisons.setdefault(comparison, len(self.comparisons))

    def _index(self, point: Point) -> int:
        return self.points.setdefault(point, len(self.points))

    def _records(self) -> dict[str, JSON]:
        return {key: self._record(r) for key, (r, _) in evidence.records_of(self.points, self.records).items()}

    def _record(self, record: Record) -> JSON:
        environment = record.provenance.as_read()
        environment.pop("started", None)
        spec = {k: fingerprint(v) if k == "model" else v for k, v in record.spec.items()}
        metrics = {k: v.as_read() if isinstance(v, Score) else v for k, v in record.metrics.items() if k != "log"}
        losses = [[entry["step"], float(f"{entry['loss']:.5g}")] for entry in record.log]
        return {
            "stage": record.stage,
            "label": record.label,
            "version": record.version,
            "started": record.provenance.started,
            "seconds": record.seconds,
            "peak_memory_mb": record.peak_memory_mb,
            "data": record.data.as_read() if record.data else None,
            "metrics": metrics,
            "spec": spec,
            "losses": losses,
            "environment": self.environments.setdefault(canonical(environment), len(self.environments)),
        }


def _image(file: Path) -> str | None:
    """Return a drawn figure as an address that has all of it; None where it is not written."""
    return f"data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()}" if file.exists() else None


def _placed(panel: figures.Placed) -> JSON:
    x = {"label": figures.x_label(panel), "logarithmic": figures.is_logarithmic(panel), "even": panel.even}
    return {"title": panel.title, "unit": panel.unit, "x": x}


def fingerprint(value: object) -> str:
    """Return twelve hex digits that tell one value from another."""
    return digest(value, 12)


def _point(p: Point) -> JSON:
    low, high = p.interval or (None, None)
    plain = ("model", "task", "method", "init", "warmup", "recipe", "m", "n", "samples", "benchmark", "metric", "value")
    return {k: getattr(p, k) for k in plain} | {
        "arm": p.arm,
        "low": low,
        "high": high,
        "paper": paper.value(p),
        "chosen": formats.chosen(p),
        "items": p.table.shape[1] if p.scores else 0,
        "runs": [{"seed": seed, "done": seed in p.scores, **vars(run)} for seed, run in sorted(p.runs.items())],
    }


def _latest(sweep: Sweep) -> str:
    """Return the minute (UTC) of the sweep's latest record; empty while it has none."""
    named = evidence.records_of(sweep.points, sweep.records).values()
    return max((record.provenance.started for record, _ in named), default="")[:16].replace("T", " ")


def contents_of(cells: Iterable[ManifestCell]) -> str:
    """Say in a line what a sweep has: its models, tasks, methods, initializations, sizes and seeds."""
    configs = [cell.config for cell in cells]
    names = {part: dict.fromkeys(c[part]["name"] for c in configs) for part in ("model", "task", "method", "init")}
    named = [*names["model"], *names["task"], *(NAMES[name] for name in names["method"]), *names["init"]]
    controls = dict.fromkeys(axes.control(c) for c in configs if axes.control(c) != NO_CONTROL)
    sizes = [
        f"{key}={','.join(amount(value) for value in sorted({c[key] for c in configs}, key=size))}"
        for key in ("m", "n")
    ]
    seeds = len({c["seed"] for c in configs})
    arms = [f"control {name}" for name in controls]
    return ", ".join([*named, *arms, *sizes, f"{seeds} seed{'s'[: seeds != 1]}"]) if configs else ""


def _rows(table: Rows) -> JSON:
    filtered = [{name: getattr(point, name) for name in ("model", "task", "method", "m")} for point in table.points]
    return {"head": table.head, "rows": table.rows, "shows": filtered}


def _counts(c: Comparison) -> str:
    """Return the counts of items behind McNemar's test; nothing for other tests."""
    if (counts := c.outcomes) is None:
        return ""
    return f"{counts.both} / {counts.d2lora_only} / {counts.lora_only} / {counts.neither}"


def _comparison(c: Comparison) -> JSON:
    numbers = ("difference", "interval", "detectable", "p", "adjusted", "test", "seeds", "decision")
    outcomes = dataclasses.asdict(c.outcomes) if c.outcomes else None
    return {k: getattr(c, k) for k in numbers} | {"beyond": c.beyond_chance, "outcomes": outcomes}


# --- samples of items ----------------------------------------------------------------------------------------------


def _samples(points: Iterable[Point], records: Records) -> JSON:
    """Return {"sets": prompts and golds of the sampled items of each benchmark, "answers": those of each evaluation}.

    All evaluations of a benchmark show the same items, so that any two can be compared.
    """
    groups = _by_test_set(points)
    count = _BUDGET // (_ANSWER * max(1, sum(map(len, groups.values()))))
    sets: dict[str, list[list[Any]]] = {}
    answers: JSON = {}
    for name, evaluations in groups.items():
        firsts = [next(iter(metrics.values())) for metrics in evaluations.values()]
        lines = sample(firsts, min(_MOST, max(_FEWEST, count)))
        for key, metrics in evaluations.items():
            items = records.texts(key, lines)
            answers[key] = {"set": name, "items": [_answer(item, metrics) for item in items]}
            sets.setdefault(name, [_question(item) for item in items])
    return {"sets": sets, "answers": answers}


def _by_test_set(points: Iterable[Point]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Return the scores (items,) of each evaluation's metrics, by what was tested, evaluation and metric."""
    groups: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for point in points:
        for seed, scores in point.scores.items():
            evaluations = groups.setdefault(fingerprint(sorted(point.tested)), {})
            evaluations.setdefault(point.runs[seed].evaluate, {})[point.metric] = scores
    return groups


def _answer(item: Item, metrics: Iterable[str]) -> list[Any]:
    text = "" if item["answer"] is None else str(item["answer"])
    return [_cut(text, _ANSWER), {metric: item[metric] for metric in metrics}]


def _question(item: Item) -> list[Any]:
    return [item["index"], _cut(str(item["prompt"]), _PROMPT), _cut(str(item["gold"]), _ANSWER)]


def sample(scores: list[np.ndarray], count: int) -> list[int]:
    """Return the indices of `count` items in order: half chosen at random (seeded), half those on which evaluations
    disagree most.
    """
    table = np.stack(scores)
    count = min(count, table.shape[1])
    telling = np.argsort(-table.std(axis=0), kind="stable")[: count // 2].tolist()
    others = sorted(set(range(table.shape[1])) - set(telling))
    return sorted(telling + random.Random(0).sample(others, count - len(telling)))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} … (cut for this page)"
