"""Records of finished stages on disk: published whole or not at all, and never made twice.

    <output>/store/<stage>/<key>/   record.json, items.jsonl (evaluations), adapter/ (trainings), state/ (where
                                    training goes on from other matrices than adapter/ has)

Correctness rests on one rename; the lock only saves waste. A file system without locks costs double work, never damage.

`python -m d2lora check` verifies the store; `python -m d2lora gc` lists what no sweep's manifest names any more, and `gc --yes` frees it.
"""

import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from d2lora import data
from d2lora.errors import UserError
from d2lora.keys import digest
from d2lora.outputs import Outputs, lock, sync
from d2lora.stages import VERSIONS, Stage


class Store:
    """The records under one output folder."""

    def __init__(self, output: Path) -> None:
        self.outputs = Outputs(output)
        self.folder = self.outputs.store

    def place(self, stage: Stage) -> Path:
        """The folder of a stage's record."""
        return self.outputs.record(stage.kind, stage.key)

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
        if self.place(stage).exists() and not self.done(stage):
            raise UserError(f"{self.place(stage)}: not a record's folder, and a record is to go there: move it away")
        with lock(self.outputs.lock(stage.key)):
            return self.record(stage) or self._publish(stage, work)

    def _publish(self, stage: Stage, work: Callable[[Path], dict]) -> dict:
        place = self.place(stage)
        place.parent.mkdir(parents=True, exist_ok=True)
        # Not one of tempfile, which only its owner may read, whatever the umask: others share the output folder.
        temporary = place.parent / f".{stage.key}-{secrets.token_hex(4)}"
        temporary.mkdir()
        try:
            record = work(temporary)
            record |= {"digest": _digest(record)}
            (temporary / "record.json").write_text(json.dumps(record, indent=1, allow_nan=False))
            mode = (temporary / "record.json").stat().st_mode  # as the umask has it
            for file in temporary.rglob("*"):
                if file.is_file():
                    if file.stat().st_mode != mode:  # safetensors makes files that only their owner may read
                        file.chmod(mode)
                    sync(file)
            sync(temporary)
            try:
                temporary.rename(place)
            except OSError:
                if not self.done(stage):
                    raise
            sync(place.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        found = self.record(stage)
        assert found is not None, "renamed into place above"
        return found


def read_record(place: Path) -> dict | None:
    """The record in a stage's folder, which is named by its key; None if there is none.

    UserError if it is not readable, was edited or is another stage's.
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
    if not isinstance(found, dict) or found.get("key") != place.name:
        raise UserError(f"{file}: not the record of this stage; move its folder away")
    if found.get("digest") != _digest(found):
        raise UserError(
            f"{file}: the record was changed after it was published; move its folder away to have it done again"
        )
    return found


def _digest(record: dict) -> str:
    """SHA-256 of a record without its own digest."""
    return digest({k: v for k, v in record.items() if k != "digest"}, 64)


# --- upkeep --------------------------------------------------------------------------------------------------------


def check(output: Path) -> Iterator[str]:
    """What is wrong in the store under `output`, a line each: damage, edits, missing or foreign files, what a kill left."""
    for place in entries(output):
        if place.name.startswith("."):
            yield f"{place}: unfinished: left by a worker that was stopped, or at work now"
        elif place.parent.name not in VERSIONS or not (place / "record.json").is_file():
            yield f"{place}: foreign: not a record's folder"
        else:
            yield from _faults(place)


def entries(output: Path) -> list[Path]:
    """What lies in the store's folders, records or not."""
    stages = (f for f in (output / "store").glob("*") if f.name != ".locks")
    return sorted(place for stage in stages for place in (stage.iterdir() if stage.is_dir() else [stage]))


def _faults(place: Path) -> Iterator[str]:
    try:
        record = read_record(place)
    except UserError as error:
        yield str(error)
        return
    assert record is not None, "its file is there"
    for name, content in record["files"].items():
        file = place / name
        if not file.is_file():
            yield f"{file}: missing"
        elif data.digest(file) != content:
            yield f"{file}: not what was published"
    parent = record["parent"]
    if parent and not any((output / parent / "record.json").is_file() for output in place.parent.parent.iterdir()):
        yield f"{place}: its parent {parent} is missing"


def garbage(output: Path) -> Iterator[tuple[Path, str]]:
    """What can be freed, and why: records that no manifest names, what kills left, checkpoints of finished stages.

    UserError while a damaged manifest was not looked at: what it names is not known.
    """
    for file in (output / "manifests").glob("*.damaged"):
        raise UserError(f"{file}: what only this manifest names would be freed too: remove it if that is right")
    manifests = [json.loads(f.read_text()) for f in (output / "manifests").glob("*.json")]
    named = {key for m in manifests for cell in m["cells"] + m.get("earlier", []) for key in _strings(cell["stages"])}
    for place in entries(output):
        if place.name.startswith("."):
            if not _locked(output, place.name[1:].split("-")[0]):
                yield place, "left by a worker that was stopped"
        elif place.parent.name in VERSIONS and place.name not in named:
            yield place, "in no sweep's manifest"
    for place in sorted((output / "checkpoints").glob("*")):
        if any((output / "store" / stage / place.name / "record.json").is_file() for stage in VERSIONS):
            yield place, "checkpoint of a finished stage"
    for place in sorted((output / "reference").glob("*")):
        made = any((output / "store" / stage / place.name).exists() for stage in VERSIONS)
        if made and place.name not in named:
            yield place, "reference of a policy in no sweep's manifest"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, str):
        yield value


def _locked(output: Path, key: str) -> bool:
    from filelock import FileLock, Timeout

    try:
        with FileLock(output / "store" / ".locks" / f"{key}.lock", timeout=0, fallback_to_soft=False):
            return False
    except Timeout:
        return True


if __name__ == "__main__":  # as it was typed before `python -m d2lora check|gc`, and goes on working
    from d2lora.__main__ import old_store

    old_store()
