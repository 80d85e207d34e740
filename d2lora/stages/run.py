"""Give a stage's work its inputs, and collect its outputs."""

import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from d2lora import data
from d2lora.collection import uncollected
from d2lora.errors import UserError
from d2lora.keys import digest
from d2lora.outputs import Outputs, cached
from d2lora.progress import Progress
from d2lora.records import ITEMS
from d2lora.settings import Config, Data
from d2lora.stages.stage import S, Spec, Stage

if TYPE_CHECKING:
    from d2lora.base import Base

T = TypeVar("T")


class AfterOthers(Exception):
    """The stage is to be done after those beside it: an engine that they ask has the memory that it needs."""


@dataclass
class Run(Generic[S]):
    """A stage that is being done: `folder` is where its files go. The base is loaded when it is first used.

    `beside` are further stages of its job that can be done at the same time: evaluations that ask the same engine.
    """

    config: Config
    stage: Stage[S]
    folder: Path
    progress: Progress
    load_seconds: float = 0.0
    beside: "tuple[Stage[Spec], ...]" = ()

    @property
    def outputs(self) -> Outputs:
        """Return the layout of the cell's output folder."""
        return Outputs.of(self.config)

    @property
    def parent(self) -> Path | None:
        """Return the folder of the parent's record; None if it has no parent."""
        return self.parent_of(self.stage)

    def parent_of(self, stage: "Stage[Spec]") -> Path | None:
        """Return the folder of the record that a stage of the job starts from; None if it starts from none."""
        parent = stage.parent
        return self.outputs.record(parent.kind, parent.key) if parent else None

    @property
    def others(self) -> list[Path]:
        """Return the folders of the records that the stage needs beside its parent's."""
        return [self.outputs.record(other.kind, other.key) for other in self.stage.others]

    @functools.cached_property
    def base(self) -> "Base":
        """Return the base model, loaded once a process. torch gets the recipe's number of threads."""
        start = time.monotonic()
        base = _base(self.config, self.outputs)
        self.load_seconds = time.monotonic() - start
        return base

    def rows(self, source: Data) -> list[data.Row]:
        """Return a data set's rows.

        UserError if a Hub revision has other rows than when earlier records in this output were made. Local files enter
        keys by their content. A revision like `main` can move, and records of two data sets would then be mixed.
        """
        rows, identity = data.rows(source, self.config.split_seed), data.identity(source, self.config.split_seed)
        if "content" not in identity:
            current = {"rows": len(rows), "sha256": data.fingerprint(rows)}
            recorded = cached(self.outputs.fingerprint(digest(identity)), lambda: identity | current)
            if recorded["sha256"] != current["sha256"]:
                raise UserError(
                    f"data.path={source.path}: revision {source.revision} has {current['rows']:,} rows that are not the "
                    f"{recorded['rows']:,} that records in {self.outputs.root} were made from: pin data.revision to a commit, or "
                    "give another output"
                )
        return rows

    def write_items(self, items: Iterable[Mapping[str, object]]) -> None:
        """Write items.jsonl, an item a line."""
        with (self.folder / ITEMS).open("w") as file:
            file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def _base(config: Config, outputs: Outputs) -> "Base":
    """Load the base. UserError if a Hub revision is another commit than earlier records in this output used."""
    with uncollected():
        import torch  # here, not above: it takes many seconds, and a check of the data does not need it

        from d2lora.base import load_base

        if config.recipe.threads:
            torch.set_num_threads(config.recipe.threads)
        base = load_base(config.model, outputs.models)
    if commit := getattr(base.model.config, "_commit_hash", None):
        _same_commit(config, outputs, commit)
    return base


def _same_commit(config: Config, outputs: Outputs, commit: str) -> None:
    """Raise UserError if a Hub model's revision is another commit than earlier records in this output used."""
    identity = data.model_identity(config.model)
    recorded = cached(outputs.fingerprint(digest(identity)), lambda: identity | {"commit": commit})
    if recorded["commit"] != commit:
        raise UserError(
            f"model.path={config.model.path}: revision {config.model.revision} is {commit} now, and records in {outputs.root} were "
            f"made with {recorded['commit']}: give that as model.revision, or another output"
        )


def in_memory(attempt: Callable[[int], T], smaller: Callable[[int], int], key: str, size: int) -> T:
    """Return attempt(size), with smaller sizes as long as memory runs out.

    UserError with advice if even size 1 is too much. `key` is the setting that the size comes from.
    """
    import torch

    while True:
        try:
            return attempt(size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise UserError(
                    f"{key}=1: out of memory: try recipe.gradient_checkpointing=true, a smaller recipe.max_length or a larger GPU"
                ) from None
        size = smaller(size)  # outside of except: the error's frames hold the memory
        torch.cuda.empty_cache()
        print(f"out of memory: again with {key}={size}", file=sys.stderr)
