"""Records of finished stages on disk: published whole or not at all, and never made twice.

    <output>/store/<stage>/<key>/   record.json, items.jsonl (evaluations), adapter/ (trainings)

Correctness rests on one rename; the lock only saves waste. A file system without locks costs double work, never damage.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from d2lora.errors import UserError
from d2lora.plan import Stage


class Store:
    """The records under one output folder."""

    def __init__(self, output: Path) -> None:
        self.folder = output / "store"

    def place(self, stage: Stage) -> Path:
        """The folder of a stage's record."""
        return self.folder / stage.name / stage.key

    def done(self, stage: Stage) -> bool:
        """Whether the stage's record is published."""
        return (self.place(stage) / "record.json").is_file()

    def record(self, stage: Stage) -> dict | None:
        """A finished stage's record; None if it is not finished. UserError if it is not readable or not this stage's."""
        return read_record(self.place(stage))

    def ensure(self, stage: Stage, work: Callable[[Path], dict]) -> dict:
        """The stage's record; made by `work(folder)`, which fills the folder and returns the record, if there is none."""
        if found := self.record(stage):
            return found
        with self._lock(stage):
            return self.record(stage) or self._publish(stage, work)

    def _publish(self, stage: Stage, work: Callable[[Path], dict]) -> dict:
        place = self.place(stage)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{stage.key}-", dir=place.parent))
        try:
            record = work(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            (temporary / "record.json").write_text(json.dumps(record, indent=1, allow_nan=False))
            _sync(temporary / "record.json")
            _sync(temporary)
            try:
                temporary.rename(place)
            except OSError:
                if not self.done(stage):
                    raise
            _sync(place.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        found = self.record(stage)
        assert found is not None, "renamed into place above"
        return found

    @contextlib.contextmanager
    def _lock(self, stage: Stage) -> Iterator[None]:
        from filelock import FileLock

        folder = self.folder / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{stage.key}.lock")
        try:
            lock.acquire()
        except (NotImplementedError, OSError):
            yield  # a file system without locks: the rename decides
            return
        try:
            yield
        finally:
            lock.release()


def read_record(place: Path) -> dict | None:
    """The record in a stage's folder, which is named by its key; None if there is none.

    UserError if it is not readable or another stage's.
    """
    file = place / "record.json"
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{file}: the record is damaged ({error}); move its folder away to have the stage done again"
        ) from None
    if found.get("key") != place.name:
        raise UserError(f"{file}: the record of another stage ({found.get('key')}); move its folder away")
    return found


def cached(file: Path, make: Callable[[], Any]) -> Any:
    """The value in a JSON file, made and written if there is none that can be read. For what is cheap to make again."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(file.read_text())
    value = make()
    write_json(file, value)
    return value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object) -> None:
    """A JSON file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(handle, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(name, path)
