"""Check whole test sets against whole training sets, whatever n and m are: the stage of an overlap check."""

from dataclasses import dataclass
from typing import ClassVar

from d2lora import data
from d2lora.data import overlap, wording
from d2lora.keys import Identity
from d2lora.records import Result, RowCounts
from d2lora.settings import Benchmark, Config, Data, Task, fields
from d2lora.stages import prepare
from d2lora.stages.run import Run
from d2lora.stages.stage import Spec, Stage


@dataclass(frozen=True)
class ContaminationSpec(Spec):
    """Both data sets, and how their rows become texts."""

    test: Identity
    train: Identity
    ngram: int = wording.NGRAM

    KIND: ClassVar[str] = "contamination"
    VERSION: ClassVar[int] = 2

    def content(self) -> Identity:
        return {"test": self.test, "train": self.train, "ngram": self.ngram}

    def cost(self, samples: int) -> float:
        return 0.0


@dataclass(frozen=True)
class Training:
    """A training set of either phase, with the columns to read and the templates by which its rows become texts."""

    name: str
    source: Data
    columns: tuple[str, ...]
    templates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """A test set, `test` being its benchmark's name, and a training set."""

    test: str
    benchmark: Benchmark
    training: Training
    split_seed: int

    @property
    def name(self) -> str:
        """Return the pair's name, for display: "training set / benchmark"."""
        return f"{self.training.name} / {self.test}"

    @property
    def question(self) -> list[str]:
        return sorted(set().union(*map(fields, self.benchmark.prompts)))

    @property
    def prompt(self) -> str:
        """Return the template of what a test item asks: of turns, the last one."""
        return self.benchmark.prompts[-1]

    @property
    def answer(self) -> list[str]:
        return sorted(fields(self.benchmark.gold))

    @property
    def spec(self) -> ContaminationSpec:
        test = {
            "data": data.identity(self.benchmark.data, self.split_seed),
            "question": self.question,
            "answer": self.answer,
            "prompt": self.prompt,
            "gold": self.benchmark.gold,
        }
        train = {
            "data": data.identity(self.training.source, self.split_seed),
            "columns": list(self.training.columns),
            "templates": list(self.training.templates),
        }
        return ContaminationSpec(test, train)


def stages(config: Config) -> tuple[Stage[ContaminationSpec], ...]:
    """Return a cell's overlap checks."""
    return tuple(Stage(pair.spec, label=f"contamination of {pair.name}", subject=pair.name) for pair in pairs(config))


def pairs(config: Config) -> list[Pair]:
    """Return each data set that a cell trains on, or is prepared with, with each of its benchmarks.

    Tasks of lm-evaluation-harness are not among them, because their rows are not read here.
    """
    sources, task, warmup = prepare.sources(config), config.task, config.warmup
    training_sets = []
    if "warmup.data" in sources:
        training_sets.append(Training(warmup.name, warmup.data, (warmup.messages,)))
    if "task.data" in sources:
        training_sets.append(Training(task.name, task.data, tuple(data.columns(task)), _templates(task)))
    return [
        Pair(test, benchmark, training, config.split_seed)
        for training in training_sets
        for test, benchmark in config.benchmarks.items()
    ]


def _templates(task: Task) -> tuple[str, ...]:
    """Return the templates of the texts that a task teaches: its prompt (each turn), and whole answers with the prefix."""
    answers = (task.full_chosen or task.chosen, task.full_rejected or task.rejected)
    turns = [turn.content for turn in task.prompt] if isinstance(task.prompt, list) else [task.prompt or ""]
    return (*filter(None, turns), *(f"{task.prefix} {answer}".strip() for answer in answers if answer))


def work(run: Run[ContaminationSpec]) -> Result:
    """Find the test items that the training set contains, and write them to items.jsonl."""
    pair = next(pair for pair in pairs(run.config) if pair.spec == run.stage.spec)
    tests, rows = (run.rows(source) for source in (pair.benchmark.data, pair.training.source))
    hits = overlap.overlap(
        overlap.TestSet(tests, pair.question, pair.answer, pair.prompt, pair.benchmark.gold),
        overlap.TrainingSet(rows, list(pair.training.columns), pair.training.templates),
        run.progress,
    )
    run.write_items(hits)
    return Result(pair=pair.name, metrics=dict(overlap.shares(hits, len(tests))), data=RowCounts(rows=len(rows)))
