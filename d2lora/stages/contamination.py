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
class Pair:
    """A test set, and a training set of either phase. `name` is for display: "training set / benchmark"."""

    benchmark: Benchmark
    rows: Data
    columns: tuple[str, ...]  # of the training set
    templates: tuple[str, ...]  # by which the training set's rows become texts
    split_seed: int
    name: str

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
            "data": data.identity(self.rows, self.split_seed),
            "columns": list(self.columns),
            "templates": list(self.templates),
        }
        return ContaminationSpec(test, train)


def stages(config: Config) -> tuple[Stage[ContaminationSpec], ...]:
    """Return a cell's overlap checks."""
    return tuple(Stage(pair.spec, label=f"contamination of {pair.name}", subject=pair.name) for pair in pairs(config))


def pairs(config: Config) -> list[Pair]:
    """Return each data set that a cell trains on, or is prepared with, with each of its benchmarks.

    Tasks of lm-evaluation-harness are not among them, because their rows are not read here.
    """
    training_sets: list[tuple[str, Data, tuple[str, ...], tuple[str, ...]]] = []
    sources = prepare.sources(config)
    if "warmup.data" in sources:
        training_sets.append((config.warmup.name, config.warmup.data, (config.warmup.messages,), ()))
    if "task.data" in sources:
        training_sets.append(
            (config.task.name, config.task.data, tuple(data.columns(config.task)), _trained(config.task))
        )
    return [
        Pair(benchmark, rows, columns, templates, config.split_seed, f"{name} / {test}")
        for name, rows, columns, templates in training_sets
        for test, benchmark in config.benchmarks.items()
    ]


def _trained(task: Task) -> tuple[str, ...]:
    """Return the templates of the texts that a task teaches: its prompt (each turn), and whole answers with the prefix."""
    answers = (task.full_chosen or task.chosen, task.full_rejected or task.rejected)
    turns = [turn.content for turn in task.prompt] if isinstance(task.prompt, list) else [task.prompt or ""]
    return (*filter(None, turns), *(f"{task.prefix} {answer}".strip() for answer in answers if answer))


def work(run: Run[ContaminationSpec]) -> Result:
    """Find the test items that the training set contains, and write them to items.jsonl."""
    pair = next(pair for pair in pairs(run.config) if pair.spec == run.stage.spec)
    tests, rows = (run.rows(source) for source in (pair.benchmark.data, pair.rows))
    items = overlap.overlap(
        tests,
        pair.question,
        pair.answer,
        rows,
        list(pair.columns),
        run.progress,
        prompt=pair.prompt,
        gold=pair.benchmark.gold,
        trained=pair.templates,
    )
    run.write_items(items)
    return Result(pair=pair.name, metrics=dict(overlap.shares(items, len(tests))), data=RowCounts(rows=len(rows)))
