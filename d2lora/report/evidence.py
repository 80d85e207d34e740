"""What stands behind a table's numbers: how its records were made, where they disagree, and tainted test items."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from d2lora.keys import canonical
from d2lora.report.rows import Point, Records
from d2lora.stages import flips


def records_of(points: Iterable[Point], records: Records) -> dict[str, tuple[dict, str]]:
    """The finished records behind points by key, each with the name that its data set goes by in the config."""
    found = {}
    for point in points:
        for run in point.runs.values():
            names = {"evaluate": point.benchmark, "adapt": point.task, "warmup": point.warmup, "prepare": point.init}
            for stage, name in names.items():
                if record := records.get(stage, getattr(run, stage)):
                    found[record["key"]] = record, name
    return found


def notes(points: Iterable[Point], records: Records) -> list[str]:
    """What to know of a table's records: rows left out, what a bfloat16 model's batch does, adapters too small to act, answers without
    an end, and why they may not be comparable (versions of packages, hardware, data under one name, uncommitted code)."""
    points = list(points)
    found = list(records_of(points, records).values())
    made = [record.get("provenance", {}) for record, _ in found]
    of_records = (note for check in (_unused, _rounded, _counts, _fingerprints) for note in check(found))
    of_machines = (note for check in (_versions, _hardware, _code) for note in check(made))
    return [*_flips(points, records), *of_records, *of_machines]


def _unused(found: list[tuple[dict, str]]) -> Iterator[str]:
    """Rows that trainings passed over: those that do not fit, and those left out, by reason; of each data set the most."""
    most: dict[tuple[str, str], int] = {}
    for record, name in found:
        if record["stage"] in ("warmup", "adapt"):
            counts = record.get("data", {})
            reasons = {"too long (recipe.max_length)": counts.get("misfits", 0)} | counts.get("left_out", {})
            for reason, count in reasons.items():
                if count:
                    most[name, reason] = max(count, most.get((name, reason), 0))
    for (name, reason), count in sorted(most.items()):
        yield f"Rows of {name} were passed over and others taken: {count:,} at most in a training: {reason}."


def _flips(points: Iterable[Point], records: Records) -> Iterator[str]:
    """A line for each evaluation of a bfloat16 base at two batch sizes, with the metrics that are shown."""
    shown: dict[str, dict[str, None]] = defaultdict(dict)
    for point in points:
        for run in point.runs.values():
            if run.flips:
                shown[run.flips][point.metric] = None
    for key, metrics in shown.items():
        if record := records.get("flips", key):
            yield f"{flips.text(record, metrics)}."


def _rounded(found: list[tuple[dict, str]]) -> Iterator[str]:
    """A learning rate of 1e-7 leaves an adapter that a bfloat16 base can round away: its result is the base's, not the method's."""
    tested = [record for record, _ in found if "adapter_changes_logits" in record]
    if away := sum(not record["adapter_changes_logits"] for record in tested):
        yield (
            f"In {away} of {len(tested)} evaluations of adapters the adapter was too small to change a logit of a probe: the base's "
            "dtype rounds it away (more steps, a larger recipe.lr, or model.dtype=float32)."
        )


_COUNTS = {"cut": "stopped at max_new_tokens, before an end of their own", "empty": "are empty"}


def _counts(found: list[tuple[dict, str]]) -> Iterator[str]:
    """Answers that were never finished or say nothing are scored as they are: a low score may be theirs."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for record, name in found:
        if record.get("counts"):
            groups[name].append(record)
    for name, records in sorted(groups.items()):
        for count, what in _COUNTS.items():
            shares = [(r["counts"].get(count, 0), max(m["items"] for m in r["metrics"].values())) for r in records]
            some, every = (sum(part) for part in zip(*shares, strict=True))
            if some:
                most = f", in one evaluation {max(a / b for a, b in shares):.0%}" if len(shares) > 1 else ""
                yield f"{some:,} of {every:,} answers to {name} ({some / every:.1%}{most}) {what}."


def _versions(made: list[dict]) -> Iterator[str]:
    counts: dict[str, Counter] = defaultdict(Counter)
    for one in made:
        for package, version in ({"python": one.get("python")} | one.get("packages", {})).items():
            counts[package][version] += 1
    for package, versions in sorted(counts.items()):
        if len(versions) > 1:
            yield f"Records were made with different versions of {package}: {_counted(versions)}."


def _hardware(made: list[dict]) -> Iterator[str]:
    """Another processor rounds otherwise, and training carries that on: noise of a size that nobody measured."""
    parts = [one.get("hardware", {}) for one in made]
    names = Counter(h.get("gpu") or " ".join(h[k] for k in ("cpu", "simd") if h.get(k)) for h in parts)
    del names[""]  # not recorded
    if len(names) > 1:
        yield f"Records were made on different hardware: {_counted(names)}."


def _counted(found: Counter) -> str:
    return ", ".join(f"{name} ({count} records)" for name, count in sorted(found.items(), key=str))


def _fingerprints(found: list[tuple[dict, str]]) -> Iterator[str]:
    sets: dict[tuple, Counter] = defaultdict(Counter)
    for record, name in found:
        spec = record["spec"]
        source = spec.get("benchmark", spec).get("data")
        if source is not None:
            sets[record["stage"], name][canonical(source)] += 1
    for (stage, name), prints in sorted(sets.items()):
        if len(prints) > 1:
            yield f"Records of {stage} on {name} read different data under that name ({len(prints)} fingerprints)."


def _code(made: list[dict]) -> Iterator[str]:
    states = Counter("unknown" if not one.get("git") else "dirty" if one["git"]["dirty"] else "clean" for one in made)
    if states["dirty"]:
        yield f"{states['dirty']} of {len(made)} records were made with uncommitted changes in the code."
    if states["unknown"]:
        yield f"{states['unknown']} of {len(made)} records were made outside a git checkout: their code is not known."


def contamination(cells: Iterable[dict], records: Records) -> dict[str, dict]:
    """Test items found in a training set: {"<training set> / <benchmark>": {measure: {"value": share, "items": N}}}."""
    keys = {pair: key for c in cells for pair, key in c["stages"].get("contamination", {}).items()}
    found = {pair: records.get("contamination", key) for pair, key in keys.items()}
    return {pair: record["metrics"] for pair, record in sorted(found.items()) if record}


def contamination_text(found: dict[str, dict]) -> str:
    """The same as lines; empty where nothing was checked."""
    if not found:
        return ""
    lines = [
        f"  {pair}: "
        + ", ".join(f"{name} {100 * m['value']:.2f} %" for name, m in measures.items())
        + f" of {max(m['items'] for m in measures.values())} items"
        for pair, measures in found.items()
    ]
    return "\n".join(["test items found in a training set", *lines])
