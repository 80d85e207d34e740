"""Define records and manifests as types, validated when they are read.

A record is the result of a finished stage (record.json). A manifest lists a sweep's cells with the keys of their
stages. Unknown keys are kept, and fields that older records lack have defaults. This module only reads the store;
store.py writes it.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from d2lora.errors import UserError
from d2lora.keys import digest
from d2lora.outputs import Outputs

if TYPE_CHECKING:
    import numpy as np

Number = int | float  # as JSON has it: 1 stays 1
Item: TypeAlias = dict[str, Any]  # a line of items.jsonl: of an evaluation index, prompt, answer, gold, and its metrics

CLUSTER = "cluster"  # of an item: what its row has in the benchmark's cluster column
RECORD, ITEMS = "record.json", "items.jsonl"  # in a stage's folder


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    def as_read(self) -> dict[str, Any]:
        """Return what was in the file, without the defaults."""
        return self.model_dump(exclude_unset=True)


class Score(_Read):
    """A metric over the items of an evaluation: a fraction with its standard error."""

    value: Number
    stderr: Number | None = None
    items: int


class Engine(_Read):
    """Who answered an evaluation that asked an engine other than the model in memory.

    `instead_of` is the engine that was asked, and is in the evaluation's key, where it failed; `reason` says how.
    """

    name: str
    version: str | None = None
    dtype: str | None = None
    instead_of: str | None = None
    reason: str | None = None


class Git(_Read):
    """The commit that a stage ran from, and whether the code had uncommitted changes."""

    commit: str
    dirty: bool


class Provenance(_Read):
    """Where a record's numbers come from: versions, code, processor, time."""

    packages: dict[str, str | None] = Field(default_factory=dict)
    python: str | None = None
    git: Git | None = None
    hardware: dict[str, Any] = Field(default_factory=dict)
    started: str = ""
    threads: int | None = None


class _Header(_Read):
    """What identifies a stage: its kind, version, spec, parent and label."""

    key: str
    stage: str
    label: str = ""
    version: int | None = None
    spec: dict[str, Any]
    parent: str | None = None


class RowCounts(_Read):
    """How many rows of a data set a stage used and left out."""

    samples: int | None = None  # that a training or a preparation used
    misfits: int = 0  # too long
    rows_sha256: str | None = None  # of the indices of those that were used
    left_out: dict[str, int] = Field(default_factory=dict)  # by reason, without those that are too long
    general: "RowCounts | None" = None  # of a control arm without a warm-up: the general rows that it accounts for
    rows: int | None = None  # of an overlap check: in the training set


class Coverage(_Read):
    """What an adapter reaches of its base (adapters/coverage.py)."""

    share: Number  # of the weights of all matrices
    adapted: list[str]  # kinds of layers
    left_out: dict[str, Number]  # the share of each other kind


class Result(_Read):
    """What a stage's work returns, beside the files that it writes.

    `metrics` of an evaluation, an overlap check or flips are Scores; of a training they are losses, counts and the log.
    """

    benchmark: str | None = None  # its name in the config
    pair: str | None = None  # "<training set> / <benchmark>" of an overlap check
    base: str | None = None  # of flips, its name in the config
    batches: list[int] | None = None  # of flips
    metrics: dict[str, Any]
    data: RowCounts | None = None
    counts: dict[str, int] = Field(default_factory=dict)  # answers by what is wrong with them: cut, empty
    eval_batch: int | None = None
    engine: Engine | None = None  # None where the model in memory was asked
    adapter_changes_logits: bool | None = None  # None where there is no adapter to test
    coverage: Coverage | None = None

    @field_validator("metrics")
    @classmethod
    def _scores(cls, metrics: dict[str, Any]) -> dict[str, Any]:
        return {k: Score.model_validate(v) if isinstance(v, dict) and "items" in v else v for k, v in metrics.items()}

    @property
    def scores(self) -> dict[str, Score]:
        """Return the metrics that are Scores."""
        return {name: metric for name, metric in self.metrics.items() if isinstance(metric, Score)}

    @property
    def items(self) -> int:
        """Return how many items were scored."""
        return max(score.items for score in self.scores.values())

    @property
    def log(self) -> list[dict[str, Any]]:
        """Return what a training logged: an entry for each logged step, with its `step`, `epoch`, `loss` and so on."""
        return self.metrics.get("log", [])

    @property
    def passed_over(self) -> dict[str, int]:
        """Return how many rows or items a stage left out, by reason, except those that are too long (`misfits`)."""
        return self.data.left_out if self.data else {}

    @property
    def misfits(self) -> int:
        """Return how many rows a training left out as too long."""
        return self.data.misfits if self.data else 0


class Record(Result, _Header):
    """The record of a finished stage: its inputs, its result and its provenance. Times are in seconds, memory in MB."""

    files: dict[str, str] = Field(default_factory=dict)  # SHA-256 by name
    provenance: Provenance = Field(default_factory=Provenance)
    seconds: Number
    load_seconds: Number | None = None
    peak_memory_mb: Number
    digest: str | None = None


class StageKeys(_Read):
    """The keys of a cell's stages by their kinds; of evaluations by benchmark, of overlap checks by pair."""

    prepare: str | None = None
    warmup: str | None = None
    adapt: str | None = None
    evaluate: dict[str, str]
    validation: dict[str, str] = Field(default_factory=dict)  # evaluations too, where settings are tuned
    contamination: dict[str, str] = Field(default_factory=dict)
    flips: dict[str, str] = Field(default_factory=dict)  # of a bfloat16 model only
    merge: str | None = None  # of the control arm that adds two adapters

    def trained(self) -> dict[str, str | None]:
        """Return the keys of preparation, warm-up and adaptation by stage."""
        return {"prepare": self.prepare, "warmup": self.warmup, "adapt": self.adapt, "merge": self.merge}

    @property
    def evaluations(self) -> dict[str, str]:
        """Return the keys of all evaluations by benchmark, those on validation benchmarks too."""
        return self.validation | self.evaluate

    def every(self) -> Iterator[tuple[str, str]]:
        """Yield the kind and key of each stage, of kinds that this version does not know too."""
        for kind, keys in self.model_dump(exclude={"validation"}, exclude_none=True).items():
            yield from ((kind, key) for key in ([keys] if isinstance(keys, str) else keys.values()))
        yield from (("evaluate", key) for key in self.validation.values())


class ManifestCell(_Read):
    """A cell as it was planned: its resolved config and the keys of its stages."""

    id: str
    config: dict[str, Any]
    stages: StageKeys


class Candidate(_Read):
    """Values of the tuned settings that one arm was trained with.

    `scores` are its cells' on the validation benchmark by their ids, one a seed or replicate, None where there is no result.
    `missing` names seeds that others of the arm have results of and it has none. `own`: the values are the recipe's own, so its
    cells are evaluated on the test whatever is chosen.
    """

    values: dict[str, str]
    scores: dict[str, Number | None]
    mean: Number | None = None  # None unless every seed has its result
    missing: list[str] = Field(default_factory=list)
    own: bool = False
    chosen: bool = False
    chosen_before: bool = False  # by candidates or results that were fewer then; its cells had met the test


class TunedArm(_Read):
    """One method, m, n and so on, with the candidates among which its tuned settings are chosen, in order of their values."""

    label: str
    benchmark: str
    metric: str | None = None  # None while there is no result
    candidates: list[Candidate]

    @property
    def chosen(self) -> Candidate | None:
        """Return the candidate that was chosen; None while none is."""
        return next((c for c in self.candidates if c.chosen), None)


class Tuning(_Read):
    """What a sweep chose on validation benchmarks: `keys` are the tuned settings."""

    keys: list[str]
    arms: list[TunedArm]


class Manifest(_Read):
    """A sweep's cells; `earlier` are others that the sweep's name once had. `tuning` is None where nothing is tuned."""

    sweep: str
    cells: list[ManifestCell]
    earlier: list[ManifestCell] = Field(default_factory=list)
    tuning: Tuning | None = None


def reason(error: ValidationError) -> str:
    """Return what does not fit, as one line: the first field and what is wrong with it."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def read(folder: Path) -> Record | None:
    """Read the record in a stage's folder, which is named by its key; None if there is none.

    UserError in one line if it is not readable, was edited, is another stage's, or does not fit.
    """
    file = folder / RECORD
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{file}: the record is damaged ({error}); move its folder away to have the stage done again"
        ) from None
    if not isinstance(content, dict) or content.get("key") != folder.name:
        raise UserError(f"{file}: not the record of this stage; move its folder away")
    if content.pop("digest", None) != (actual := record_digest(content)):
        raise UserError(
            f"{file}: the record was changed after it was published; move its folder away to have it done again"
        )
    try:
        return Record.model_validate(content | {"digest": actual})
    except ValidationError as error:
        raise UserError(f"{file}: not a record ({reason(error)}); move its folder away to have it done again") from None


def record_digest(content: object) -> str:
    """Return the SHA-256 of a record's JSON, which must be without its own digest."""
    return digest(content, 64)


def read_items(folder: Path) -> list[Item]:
    """Read the items in a stage's folder; [] for a stage without items."""
    file = folder / ITEMS
    if not file.exists():
        return []
    with file.open() as lines:  # not splitlines(), which cuts at U+2028 and the like inside a text
        return [json.loads(line) for line in lines]


class Records:
    """The records of a store, each read once; and the items of evaluations whose records were read."""

    def __init__(self, output: Path) -> None:
        self.outputs = Outputs(output)
        self._records: dict[str, Record] = {}
        self._scores: dict[str, dict[str, np.ndarray]] = {}
        self._prompts: dict[str, list[str]] = {}  # of an evaluation's items, by their digest: most share them
        self._prompts_of: dict[str, str] = {}  # the digest of each evaluation's
        self._templates: dict[tuple[str, str], np.ndarray | None] = {}  # clusters by digest and pattern

    def get(self, stage: str, key: str | None) -> Record | None:
        """Return the record, None if the stage is not finished. UserError if it is damaged."""
        if key is None:
            return None
        if key not in self._records:
            record = read(self.outputs.record(stage, key))
            if record is None:
                return None
            self._records[key] = record
        return self._records[key]

    def scores(self, key: str, metric: str) -> "np.ndarray":
        """Return the metric of each item (items,) of a finished evaluation; metric "index" is the items' rows in their set.

        UserError if the items are not those of the record.
        """
        return self._columns(key)[metric]

    def clusters(self, key: str, varies: str | None = None) -> "np.ndarray | None":
        """Return a number for each item (items,), the same for those that belong together; None where nothing says so.

        As of clusters_of, and each pattern is looked for once in the same prompts.
        """
        if (column := self._columns(key).get(CLUSTER)) is not None:
            return column
        prompts = self._prompts_of[key]
        if varies and (prompts, varies) not in self._templates:
            self._templates[prompts, varies] = _templates(self._prompts[prompts], varies)
        return self._templates.get((prompts, varies or ""))

    def _columns(self, key: str) -> dict[str, "np.ndarray"]:
        if key not in self._scores:
            record = self._records[key]
            self._scores[key], prompts = _read_scores(self._file(key), record.scores)
            self._prompts_of[key] = hashlib.sha256("\0".join(prompts).encode(errors="surrogatepass")).hexdigest()
            self._prompts.setdefault(self._prompts_of[key], prompts)
        return self._scores[key]

    def texts(self, key: str, lines: list[int]) -> list[Item]:
        """Read whole items of a finished evaluation by their lines in its file."""
        wanted = set(lines)
        with self._file(key).open() as file:
            items = {i: json.loads(line) for i, line in enumerate(file) if i in wanted}
        return [items[i] for i in lines]

    def _file(self, key: str) -> Path:
        return self.outputs.record(self._records[key].stage, key) / ITEMS


def clusters_of(items: list[Item], varies: str | None) -> "np.ndarray | None":
    """Return a number for each item (items,), the same for those that belong together; None where nothing says so.

    Their cluster column says it, or the pattern `varies`: prompts that are equal but for it are of one template. Where all items
    would be one cluster, nothing is said.
    """
    if items and CLUSTER in items[0]:
        return _numbered([str(item[CLUSTER]) for item in items])
    return _templates([str(item["prompt"]) for item in items], varies) if varies else None


def _templates(prompts: list[str], varies: str) -> "np.ndarray | None":
    pattern = re.compile(varies)
    return _numbered([pattern.sub("\0", prompt) for prompt in prompts])


def _numbered(texts: list[str]) -> "np.ndarray | None":
    """Return a number for each text, equal ones alike; None where all are equal."""
    import numpy as np

    numbers = np.unique(texts, return_inverse=True)[1]
    return numbers if numbers.max() > 0 else None


def _read_scores(file: Path, metrics: dict[str, Score]) -> tuple[dict[str, "np.ndarray"], list[str]]:
    """Return the columns of numbers of an evaluation's items, and their prompts."""
    import numpy as np  # late: manifests are typed here too, and planning a grid needs no numpy

    columns = ["index", *metrics]
    try:
        text = file.read_text().strip().replace("\n", ",")  # one call of the decoder a file: a third of the time
        items = json.loads(f"[{text}]")
        table = np.array([[item[c] for c in columns] for item in items], float)
        clusters = clusters_of(items, None)
        prompts = [str(item["prompt"]) for item in items]
        table = table.reshape(-1, len(columns))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{file}: not readable ({error!r}); move its folder away to have it done again") from None
    scores = {c: table[:, i].astype(np.float32) for i, c in enumerate(columns)}
    for metric, score in metrics.items():
        if len(table) != score.items or abs(float(table[:, columns.index(metric)].mean()) - score.value) > 1e-6:
            raise UserError(f"{file}: its items do not give the record's {metric}; move its folder away")
    if clusters is not None:
        scores[CLUSTER] = clusters
    return scores, prompts
