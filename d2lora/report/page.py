"""The report as one HTML file: page.html with its style, its script and the data, and nothing from the network.

Texts of records (prompts, answers) are not trusted: they enter as JSON that can't close its element, and the script only
ever sets them as text.
"""

import json
import random
from collections.abc import Iterable
from importlib.resources import files

import numpy as np

from d2lora.keys import canonical, digest
from d2lora.records import Record, Records, Score, Tuning
from d2lora.report import evidence, formats, inits, paper, tuning
from d2lora.report.artefacts import Shown, Sweep
from d2lora.report.compare import Comparison
from d2lora.report.figures import Panel
from d2lora.report.points import Point
from d2lora.report.tables import Table, column_name

_ANSWER, _PROMPT = 600, 2000  # characters kept of a text
_BUDGET, _FEWEST, _MOST = 5_000_000, 4, 24  # characters of all answers; sampled items a benchmark


def page(sweeps: list[Sweep], records: Records) -> str:
    """The page's HTML."""
    data = _Data(records)
    content = {"sweeps": [data.sweep(s) for s in sweeps]} | data.tables()
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    folder = files("d2lora.report")
    html = (folder / "page.html").read_text()
    for name in ("page.css", "page.js"):
        html = html.replace(f"/* {name} */", (folder / name).read_text())
    return html.replace("/* data */", text)


class _Data:
    """The page's data; points, comparisons and environments stand once in lists and are named by their place."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.points: dict[Point, int] = {}
        self.sweeps: list[str] = []  # of each point
        self.comparisons: dict[Comparison, int] = {}
        self.environments: dict[str, int] = {}

    def tables(self) -> dict:
        samples = _samples(self.points, self.records)
        return {
            "points": [_point(p) | {"sweep": s} for p, s in zip(self.points, self.sweeps, strict=True)],
            "comparisons": [_comparison(c) for c in self.comparisons],
            "records": self._records(),
            "environments": [json.loads(e) for e in self.environments],
        } | samples

    def sweep(self, sweep: Sweep) -> dict:
        head, rows = sweep.settings
        shown = [self._shown(s, sweep) for s in sweep.shown]
        self.sweeps += [sweep.name] * (len(self.points) - len(self.sweeps))
        return {
            "name": sweep.name,
            "problem": sweep.problem,
            "settings": {"head": head, "rows": rows},
            "contamination": {p: {m: s.as_read() for m, s in x.items()} for p, x in sweep.contamination.items()},
            "shown": shown,
            "inits": _inits(sweep.inits),
            "tuning": _tuning(sweep.tuning) if sweep.tuning else None,
        }

    def _shown(self, shown: Shown, sweep: Sweep) -> dict:
        figure = shown.name.startswith("figure")
        said = {p for s in sweep.shown[1:] if not s.name.startswith("figure") for t in s.tables for p in t.points}
        return {
            "name": shown.name,
            "caption": shown.caption,
            "notes": [*([] if figure else formats.footnotes(shown.tables)), *shown.notes],
            "verdicts": [t.verdict for t in shown.tables if figure and not said.issuperset(t.points) and t.pairs],
            "tables": [] if figure else [self._table(t) for t in shown.tables],
            "panels": [self._panel(p) for p in shown.panels],
        }

    def _table(self, table: Table) -> dict:
        return {
            "title": table.title,
            "columns": [column_name(table, n) for n in table.columns],
            "verdict": table.verdict,
            "pairs": [
                {"points": [self._place(p) for p, own in table.pairs.items() if own is c], "row": row}
                for c, row in zip(table.unique_pairs, formats.pair_rows(table), strict=True)
            ],
            "lines": [
                {"label": line.label, "cells": [self._cell(table, line.points.get(n)) for n in table.columns]}
                for line in table.lines
            ],
        }

    def _cell(self, table: Table, point: Point | None) -> dict | None:
        if point is None:
            return None
        pair = table.pairs.get(point)
        return {
            "p": self._place(point),
            "c": self.comparisons.setdefault(pair, len(self.comparisons)) if pair else None,
        }

    def _panel(self, panel: Panel) -> dict:
        curves = [
            {
                "label": c.label,
                "method": c.method,
                "lora": c.m == 0,
                "points": [[x, self._place(p)] for x, p in c.points],
                "paper": c.paper,
            }
            for c in panel.curves
        ]
        return {"title": panel.title, "unit": panel.unit, "arms": panel.arms, "curves": curves}

    def _place(self, point: Point) -> int:
        return self.points.setdefault(point, len(self.points))

    def _records(self) -> dict[str, dict]:
        return {key: self._record(r) for key, (r, _) in evidence.records_of(self.points, self.records).items()}

    def _record(self, record: Record) -> dict:
        environment = record.provenance.as_read()
        environment.pop("started", None)
        spec = {k: fingerprint(v) if k == "model" else v for k, v in record.spec.items()}
        metrics = {k: v.as_read() if isinstance(v, Score) else v for k, v in record.metrics.items() if k != "log"}
        return {
            "stage": record.stage,
            "label": record.label,
            "version": record.version,
            "started": record.provenance.started,
            "seconds": record.seconds,
            "peak_memory_mb": record.peak_memory_mb,
            "data": record.data,
            "metrics": metrics,
            "spec": spec,
            "environment": self.environments.setdefault(canonical(environment), len(self.environments)),
        }


def fingerprint(value: object) -> str:
    """Twelve digits that tell one value from another."""
    return digest(value, 12)


def _point(p: Point) -> dict:
    low, high = p.interval or (None, None)
    plain = ("model", "task", "method", "init", "warmup", "recipe", "m", "n", "samples", "benchmark", "metric", "value")
    return {k: getattr(p, k) for k in plain} | {
        "arm": p.arm,
        "low": low,
        "high": high,
        "paper": paper.value(p),
        "items": p.table.shape[1] if p.scores else 0,
        "runs": [{"seed": seed, "done": seed in p.scores, **vars(run)} for seed, run in sorted(p.runs.items())],
    }


def _inits(rows: list[inits.Row]) -> dict | None:
    """The table of initializations; `of` is each row's method and m, by which filters narrow it."""
    if not rows:
        return None
    head, texts = inits.table(rows)
    of = [{"method": row.method, "m": row.m} for row in rows]
    return {"caption": inits.CAPTION, "head": head, "rows": texts, "of": of, "notes": inits.notes(rows)}


def _tuning(found: Tuning) -> dict:
    """The table of a tuned sweep's candidates."""
    head, rows = tuning.table(found)
    return {"caption": tuning.caption(found), "head": head, "rows": rows}


def _comparison(c: Comparison) -> dict:
    numbers = ("difference", "interval", "detectable", "p", "adjusted", "test", "seeds")
    return {k: getattr(c, k) for k in numbers} | {"beyond": c.beyond_chance}


# --- samples of items ----------------------------------------------------------------------------------------------


def _samples(points: Iterable[Point], records: Records) -> dict:
    """{"sets": prompts and golds of the sampled items of each benchmark, "answers": those of each evaluation}.

    All evaluations of a benchmark show the same items, so that any two can be read side by side.
    """
    groups: dict[str, dict[str, dict[str, np.ndarray]]] = {}  # of what is tested: evaluation -> metric -> scores
    for point in points:
        for seed, scores in point.scores.items():
            group = groups.setdefault(fingerprint(sorted(point.tested)), {})
            group.setdefault(point.runs[seed].evaluate, {})[point.metric] = scores
    count = _BUDGET // (_ANSWER * max(1, sum(map(len, groups.values()))))
    sets, answers = {}, {}
    for name, group in groups.items():
        firsts = [next(iter(metrics.values())) for metrics in group.values()]
        places = sample(firsts, min(_MOST, max(_FEWEST, count)))
        for key, metrics in group.items():
            items = records.texts(key, places)
            texts = [[_cut(str(i["answer"]), _ANSWER), {metric: i[metric] for metric in metrics}] for i in items]
            answers[key] = {"set": name, "items": texts}
            if name not in sets:
                sets[name] = [
                    [i["index"], _cut(str(i["prompt"]), _PROMPT), _cut(str(i["gold"]), _ANSWER)] for i in items
                ]
    return {"sets": sets, "answers": answers}


def sample(scores: list[np.ndarray], count: int) -> list[int]:
    """Places of `count` items: half by chance (seeded), half those on which evaluations disagree most; in order."""
    table = np.stack(scores)
    count = min(count, table.shape[1])
    telling = np.argsort(-table.std(axis=0), kind="stable")[: count // 2].tolist()
    others = sorted(set(range(table.shape[1])) - set(telling))
    return sorted(telling + random.Random(0).sample(others, count - len(telling)))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} … (cut for this page)"
