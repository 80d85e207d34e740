"""Make rows of results, one for each cell, benchmark and metric, and write those of all sweeps to results.csv."""

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from d2lora import stats
from d2lora.errors import UserError
from d2lora.outputs import Outputs, write_text
from d2lora.records import Manifest, ManifestCell, Record, Records, Score
from d2lora.report import axes, tuning
from d2lora.report.axes import Axes, general
from d2lora.report.manifest import read_manifest, sweeps
from d2lora.report.points import arm_name, interval_of, varies_of
from d2lora.report.rows import Row, csv_of_rows
from d2lora.scoring import is_graded
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.evaluate import EvaluateSpec
from d2lora.stages.flips import FlipsSpec
from d2lora.stages.prepare import PrepareSpec
from d2lora.stages.warmup import WarmupSpec

COLUMNS = [
    *("cell_id", "sweep", "model", "task", "method", "init", "warmup", "recipe", "lr", "reference", "m", "n", "seed"),
    *("benchmark", "metric", "value", "stderr", "items", "cut", "empty", "eval_batch", "train_seconds", "eval_seconds"),
    *("peak_memory_mb", "stage_key", "misfits", "left_out", "batch_flips", "batch_difference"),
    *("arm", "low", "high", "samples", "n_asked", "m_asked", "control", "data_seed", "rank", "batch", "epochs"),
    *("warmup_epochs", "limit", "adapter_key", "warmup_key", "tuned"),
]


class CellResults:
    """A cell of a manifest with the records of its stages."""

    def __init__(self, sweep: str, cell: ManifestCell, records: Records) -> None:
        self.sweep, self.cell, self.records = sweep, cell, records

    @cached_property
    def settings(self) -> Axes:
        """Return the settings that the cell's result depends on."""
        return axes.settings_of(self.cell)

    @cached_property
    def trained(self) -> list[Record]:
        """Return the finished records of its preparation and trainings."""
        keys = self.cell.stages.trained().items()
        return [record for kind, key in keys if (record := self.records.get(kind, key))]

    @property
    def is_finished(self) -> bool:
        """Tell whether all its evaluations have records; in a tuned sweep those of most candidates are on validation alone."""
        return all(self.records.get(EvaluateSpec.KIND, key) for key in self.cell.stages.evaluations.values())

    def rows(self, keys: Iterable[str] | None, role: str | None) -> Iterator[Row]:
        """Yield a row for each benchmark and metric, with its values of the settings `keys`; all that matter if None."""
        common = self._shape() | self._training() | {"tuned": role}
        for benchmark, key in self.cell.stages.evaluations.items():
            record = self.records.get(EvaluateSpec.KIND, key)
            flips = self.records.get(FlipsSpec.KIND, self.cell.stages.flips.get(benchmark))
            measured = common | self._measured(benchmark, key, record) | self._axes(benchmark, keys)
            for metric, score in (record.scores if record else {"": None}).items():
                interval = self._interval(benchmark, record, metric, score)
                yield measured | {"metric": metric} | _score(score, interval) | _batch(flips, metric)

    def _interval(
        self, benchmark: str, record: Record | None, metric: str, score: Score | None
    ) -> tuple[float, float] | None:
        """Return a score's 95 % interval: from its standard error, or, of items that belong together, from the items."""
        if record is None or score is None:
            return None
        varies = varies_of(self.cell.config, benchmark)
        if varies or (record.spec.get("benchmark") or {}).get("cluster"):
            return interval_of(self.records, record.key, metric, varies)
        return stats.interval_of_mean(score.value, score.stderr, score.items, is_graded(metric))

    def _shape(self) -> Row:
        """Return what the cell is: the names of its parts, its sizes, its arm."""
        c = self.cell.config
        names = {part: c[part]["name"] for part in ("model", "task", "method", "init", "recipe")}
        sizes = {"m": self.size("m"), "n": self.size("n"), "m_asked": c["m"], "n_asked": c["n"]}
        control = axes.control(c)
        seeds = {"seed": c["seed"], "data_seed": c["data_seed"]}
        origin = {"cell_id": self.cell.id, "sweep": self.sweep, "warmup": c["warmup"]["name"] if general(c) else None}
        return origin | names | sizes | seeds | {"arm": arm_name(c["m"], control), "control": control}

    def size(self, name: str) -> int | None:
        """Return how many rows n or m are; of "all" as many as the training's record says, None while there is none."""
        size = self.cell.config[name]
        if size != "all":
            return size
        counts = {record.stage: record.data for record in self.trained}
        adapted = counts.get(AdaptSpec.KIND)
        # A control arm without a warm-up has its general rows in the adaptation.
        general = counts.get(WarmupSpec.KIND) or (adapted.general if adapted else None)
        rows = adapted if name == "n" else general
        return rows.samples if rows else None

    def _training(self) -> Row:
        """Return the settings of its trainings that readers ask for most, and what they took."""
        c, stages = self.cell.config, self.cell.stages
        rates, trained = c["recipe"]["lr"], bool(self.cell.stages.adapt or self.cell.stages.warmup)
        adapter = next((key for key in reversed(list(stages.trained().values())) if key), None)
        counts = next((r.data for r in self.trained if r.stage == AdaptSpec.KIND and r.data), None)
        return {
            "lr": rates[c["method"]["name"]] if stages.adapt else rates["warmup"] if stages.warmup else None,
            "reference": c["method"].get("reference") or None,
            "rank": c["recipe"]["lora"]["r"] if trained else None,
            "batch": c["recipe"]["batch"] if trained else None,
            "epochs": c["method"]["epochs"] if stages.adapt else None,
            "warmup_epochs": c["warmup"]["epochs"] if stages.warmup else None,
            "samples": counts.samples if counts else None,
            "train_seconds": round(sum(r.seconds for r in self.trained if r.stage != PrepareSpec.KIND), 3),
            "adapter_key": adapter,
            "warmup_key": stages.warmup,
            **unused(self.trained),
        }

    def _measured(self, benchmark: str, key: str, record: Record | None) -> Row:
        """Return what an evaluation took, and what is to be known of its items and answers."""
        known = self.cell.config["task"]
        settings = known["benchmark"].get(benchmark) or (known.get("validation") or {}).get(benchmark) or {}
        return {
            "benchmark": benchmark,
            "limit": settings.get("limit"),
            "eval_seconds": record.seconds if record else None,
            "peak_memory_mb": max((r.peak_memory_mb for r in [*self.trained, record] if r), default=None),
            "stage_key": key,
            "eval_batch": record.eval_batch if record else None,
            **{name: record.counts.get(name) if record else None for name in ("cut", "empty")},
        }

    def _axes(self, benchmark: str, keys: Iterable[str] | None) -> Row:
        """Return the settings `keys` as text, or all that the benchmark's result depends on, numbers as numbers."""
        if keys is not None:
            return dict(axes.of_benchmark(self.settings, self.cell, benchmark, keys))
        own, prefix = f"task.benchmark.{benchmark}.", "task.benchmark."
        named = {key.replace(own, "benchmark."): value for key, value in self.settings.items()}
        return {key: _typed(value) for key, value in named.items() if not key.startswith(prefix)}


def _typed(text: str) -> str | float | None:
    """Return a setting's text as a number if it is one; None for what is not set."""
    if text == "None":
        return None
    number = axes.number(text)
    return text if number is None else int(number) if number.is_integer() else number


def _score(score: Score | None, interval: tuple[float, float] | None) -> Row:
    """Return a score with the ends of its 95 % interval; nothing where there is none."""
    if score is None:
        return {}
    low, high = interval or (None, None)
    return score.as_read() | {"low": low, "high": high}


def _batch(flips: Record | None, metric: str) -> Row:
    """Return the share of a bfloat16 base's answers that the batch size changes, and the difference of the metric."""
    scores = flips.scores if flips else {}
    names = {"batch_flips": "answers_flipped", "batch_difference": f"{metric}_difference"}
    return {column: scores[name].value for column, name in names.items() if name in scores}


def unused(trained: list[Record]) -> Row:
    """Return how many rows a cell's trainings left out: too long ones, and others by reason; None without a training."""
    counted = [r for r in trained if r.stage != PrepareSpec.KIND and r.data]
    reasons: Counter[str] = Counter()
    for record in counted:
        reasons.update(record.passed_over)
    left_out = "; ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
    return {"misfits": sum(r.misfits for r in counted) if counted else None, "left_out": left_out or None}


def result_rows(manifest: Manifest, records: Records, whole: bool = False) -> Iterator[Row]:
    """Yield one row for each cell, benchmark and metric; a cell without its evaluation has one row without values.

    Beside COLUMNS, rows have the settings that the sweep's cells differ in, by key, if the cell depends on them; with
    `whole` all settings that matter. Cells of earlier grids with the sweep's name have rows if they are finished.
    """
    cells = [CellResults(manifest.sweep, cell, records) for cell in manifest.cells]
    earlier = [CellResults(manifest.sweep, cell, records) for cell in manifest.earlier]
    roles = tuning.roles(manifest.tuning)
    keys = None if whole else axes.differing_settings(manifest.cells)[1]
    for each in [*cells, *(other for other in earlier if other.is_finished)]:
        yield from each.rows(keys, roles.get(each.cell.id))


def write_results(output: Path, records: Records) -> tuple[Path, list[str]]:
    """Write outputs/report/results.csv from all manifests. Return the file, and a line for each sweep that is left out
    as damaged.
    """
    file = Outputs(output).results
    rows: list[Row] = []
    damaged = []
    for sweep in sweeps(output):
        try:
            rows += list(result_rows(read_manifest(output, sweep), records))
        except UserError as error:
            damaged.append(f"sweep {sweep} is not in results.csv: {error}")
    write_text(file, csv_of_rows(rows, COLUMNS, end="\r\n"))
    return file, damaged
