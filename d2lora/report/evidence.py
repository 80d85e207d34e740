"""Report what a table's numbers are based on: how its records were made, where they disagree, and test items seen in
training.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from d2lora.keys import canonical
from d2lora.records import ManifestCell, Provenance, Record, Records, Score
from d2lora.report.content import Content, Rows, Sweep
from d2lora.report.points import Point, by_benchmark
from d2lora.scoring import is_graded
from d2lora.stages import flips
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.contamination import ContaminationSpec
from d2lora.stages.evaluate import EvaluateSpec
from d2lora.stages.prepare import PrepareSpec
from d2lora.stages.warmup import WarmupSpec


def records_of(points: Iterable[Point], records: Records) -> dict[str, tuple[Record, str]]:
    """Return the finished records of points by key, each with the config's name of its data set."""
    by_key = {}
    for point in points:
        for run in point.runs.values():
            stages = (
                (EvaluateSpec.KIND, run.evaluate, point.benchmark),
                (AdaptSpec.KIND, run.adapt, point.task),
                (WarmupSpec.KIND, run.warmup, point.warmup),
                (PrepareSpec.KIND, run.prepare, point.init),
            )
            for kind, key, name in stages:
                if record := records.get(kind, key):
                    by_key[record.key] = record, name
    return by_key


def notes(points: Iterable[Point], records: Records) -> list[str]:
    """Return the notes under a table, a line each.

    They are about rows and items left out, ROUGE's words, the batch size of a bfloat16 model, adapters too small to
    matter, answers that were cut, engines other than the model in memory, and records that may not be comparable
    (package versions, hardware, other data under the same name, uncommitted code).
    """
    points = list(points)
    named_records = list(records_of(points, records).values())
    origins = [record.provenance for record, _ in named_records]
    checks = (_unused, _left_out, _scripts, _rounded, _counts, _engines, _fingerprints)
    of_records = (note for check in checks for note in check(named_records))
    of_machines = (note for check in (_versions, _hardware, _code) for note in check(origins))
    return [*_zeros(points), *_flips(points, records), *of_records, *of_machines]


def _zeros(points: Iterable[Point]) -> Iterator[str]:
    """Yield a line for each graded metric in which no item of any cell scores: neither the scores nor their differences say
    anything then.
    """
    for name, group in by_benchmark(p for p in points if p.scores and is_graded(p.metric)).items():
        if not any(p.table.any() for p in group):
            yield f"{name}: no answer scores above 0, in any cell, so nothing is known of differences."


def _unused(named_records: list[tuple[Record, str]]) -> Iterator[str]:
    """Yield how many rows trainings left out, too long or for another reason; the most of each data set."""
    most: dict[tuple[str, str], int] = {}
    for record, name in named_records:
        if record.stage in (WarmupSpec.KIND, AdaptSpec.KIND):
            reasons = {"too long (recipe.max_length)": record.misfits} | record.passed_over
            for reason, count in reasons.items():
                if count:
                    most[name, reason] = max(count, most.get((name, reason), 0))
    for (name, reason), count in sorted(most.items()):
        yield f"Rows of {name} were passed over and others taken: {count:,} at most in a training: {reason}."


def _left_out(named_records: list[tuple[Record, str]]) -> Iterator[str]:
    """Yield how many test items evaluations left out; the most of each benchmark."""
    most: dict[tuple[str, str], int] = {}
    for record, name in named_records:
        for reason, count in record.passed_over.items() if record.stage == EvaluateSpec.KIND else ():
            most[name, reason] = max(count, most.get((name, reason), 0))
    for (name, reason), count in sorted(most.items()):
        yield f"Items of {name} were left out of the scores: {count:,} at most in an evaluation: {reason}."


def _scripts(named_records: list[tuple[Record, str]]) -> Iterator[str]:
    """Yield the benchmarks whose ROUGE has words of any script."""
    benchmarks = {name: record.spec.get("benchmark") for record, name in named_records}
    if names := sorted(name for name, content in benchmarks.items() if content and content.get("script") == "any"):
        yield (
            f"ROUGE of {', '.join(names)} has words of every script, in scripts without spaces between words its characters; "
            "its numbers do not compare with those of rouge-score's own words (a-z and digits)."
        )


def _flips(points: Iterable[Point], records: Records) -> Iterator[str]:
    """Yield a line for each evaluation of a bfloat16 base at two batch sizes, with the metrics that are shown."""
    metrics_of: dict[str, dict[str, None]] = defaultdict(dict)
    for point in points:
        for run in point.runs.values():
            if run.flips:
                metrics_of[run.flips][point.metric] = None
    for key, metrics in metrics_of.items():
        if record := records.get(flips.FlipsSpec.KIND, key):
            yield f"{flips.text(record, metrics)}."


def _rounded(named_records: list[tuple[Record, str]]) -> Iterator[str]:
    """Yield a line if trainings changed their adapters so little (at 1e-7, say) that a bfloat16 base rounds the change
    away.
    """
    tested = [record for record, _ in named_records if record.adapter_changes_logits is not None]
    if away := sum(not record.adapter_changes_logits for record in tested):
        yield (
            f"In {away} of {len(tested)} evaluations of adapters the adapter was too small to change a logit of a probe: the base's "
            "dtype rounds it away (more steps, a larger recipe.lr, or model.dtype=float32)."
        )


_COUNTS = {"cut": "stopped at max_new_tokens, before an end of their own", "empty": "are empty"}


def _counts(named_records: list[tuple[Record, str]]) -> Iterator[str]:
    """Yield a line if answers were cut or empty: they are scored as they are, and may explain a low score."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record, name in named_records:
        if record.counts:
            groups[name].append(record)
    for name, records in sorted(groups.items()):
        for count, what in _COUNTS.items():
            shares = [(r.counts.get(count, 0), r.items) for r in records]
            count_sum, every = (sum(part) for part in zip(*shares, strict=True))
            if count_sum:
                most = f", in one evaluation {max(a / b for a, b in shares):.0%}" if len(shares) > 1 else ""
                yield f"{count_sum:,} of {every:,} answers to {name} ({count_sum / every:.1%}{most}) {what}."


def _engines(named_records: list[tuple[Record, str]]) -> Iterator[str]:
    """Yield who answered where it was not the model in memory alone, and that engines differ; how many answers fell back to it."""
    evaluations = [record for record, _ in named_records if record.stage == EvaluateSpec.KIND]
    if not any(record.engine for record in evaluations):
        return
    names = Counter(_engine_name(record) for record in evaluations)
    if len(names) == 1:
        yield f"Answers are of {next(iter(names))}."
    else:
        yield f"Answers are of different engines: {_counted(names)}."
    instead = Counter(
        f"{r.engine.instead_of}: {r.engine.reason}" for r in evaluations if r.engine and r.engine.instead_of
    )
    for failed, count in sorted(instead.items()):
        yield f"{count} of {len(evaluations)} evaluations were done in memory instead of {failed}."


def _engine_name(record: Record) -> str:
    if record.engine is None or record.engine.instead_of:
        return "the model in memory"
    return f"{record.engine.name} {record.engine.version} ({record.engine.dtype})"


def _versions(origins: list[Provenance]) -> Iterator[str]:
    counts: dict[str, Counter] = defaultdict(Counter)
    for origin in origins:
        for package, version in ({"python": origin.python} | origin.packages).items():
            counts[package][version] += 1
    for package, versions in sorted(counts.items()):
        if len(versions) > 1:
            yield f"Records were made with different versions of {package}: {_counted(versions)}."


def _hardware(origins: list[Provenance]) -> Iterator[str]:
    """Yield a line if processors or GPUs differ: they round differently, and training amplifies that by an unknown
    amount.
    """
    parts = [origin.hardware for origin in origins]
    names = Counter(h.get("gpu") or " ".join(h[k] for k in ("cpu", "simd") if h.get(k)) for h in parts)
    del names[""]  # not recorded
    if len(names) > 1:
        yield f"Records were made on different hardware: {_counted(names)}."


def _counted(counts: Counter[Any]) -> str:
    return ", ".join(f"{name} ({count} records)" for name, count in sorted(counts.items(), key=str))


def _fingerprints(named_records: list[tuple[Record, str]]) -> Iterator[str]:
    sets: dict[tuple, Counter] = defaultdict(Counter)
    for record, name in named_records:
        spec = record.spec
        source = spec.get("benchmark", spec).get("data")
        if source is not None:
            sets[record.stage, name][canonical(source)] += 1
    for (stage, name), prints in sorted(sets.items()):
        if len(prints) > 1:
            yield f"Records of {stage} on {name} read different data under that name ({len(prints)} fingerprints)."


def _code(origins: list[Provenance]) -> Iterator[str]:
    states = Counter("unknown" if not o.git else "dirty" if o.git.dirty else "clean" for o in origins)
    if states["dirty"]:
        yield f"{states['dirty']} of {len(origins)} records were made with uncommitted changes in the code."
    if states["unknown"]:
        yield f"{states['unknown']} of {len(origins)} records were made outside a git checkout: their code is not known."


# What the shares of an overlap check are of (data/overlap.py).
_MEASURES = {
    "exact": "the share of test items whose whole question is also a text of the training set",
    "ngram13": "the share of test items that have 13 words in a row in common with a row of the training set, in the question or "
    "the answer. Set phrases count too, so a large share is a reason to read these items (items.jsonl of the check), and no proof",
}


def contamination(cells: Iterable[ManifestCell], records: Records) -> dict[str, dict[str, Score]]:
    """Return test items found in a training set: {"<training set> / <benchmark>": {measure: share}}."""
    keys = {pair: key for c in cells for pair, key in c.stages.contamination.items()}
    checked = {pair: records.get(ContaminationSpec.KIND, key) for pair, key in keys.items()}
    return {pair: record.scores for pair, record in sorted(checked.items()) if record}


def contamination_content(sweep: Sweep) -> Content | None:
    """Return the same as a table; None where nothing was checked."""
    rows = [
        [pair, name, f"{100 * share.value:.2f} %", str(share.items)]
        for pair, measures in contamination(sweep.cells, sweep.records).items()
        for name, share in measures.items()
    ]
    notes = [f"{name}: {what}." for name, what in _MEASURES.items() if name in {row[1] for row in rows}]
    return (
        Content(rows=Rows(["training set / benchmark", "measure", "share", "items"], rows), notes=notes)
        if rows
        else None
    )


def contamination_text(shares: dict[str, dict[str, Score]]) -> str:
    """Return the shares as lines; empty if nothing was checked."""
    if not shares:
        return ""
    lines = [
        f"  {pair}: "
        + ", ".join(f"{name} {100 * m.value:.2f} %" for name, m in measures.items())
        + f" of {max(m.items for m in measures.values())} items"
        for pair, measures in shares.items()
    ]
    head = "test items found in a training set (exact: the whole question; ngram13: 13 words in a row)"
    return "\n".join([head, *lines])
