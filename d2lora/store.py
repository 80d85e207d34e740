"""Store the records of finished stages on disk: each is published atomically, and never made twice.

    <output>/store/<stage>/<key>/   record.json, items.jsonl (evaluations), adapter/ (trainings), state/ (if training
                                    goes on from other matrices than those of adapter/)

Correctness depends on one rename only; locks avoid double work. On a file system without locks a stage may be done
twice, and nothing worse.

`python -m d2lora check` verifies the store; `python -m d2lora gc` lists what no sweep's manifest names any more, and
`gc --yes` deletes it.
"""

import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from d2lora import data, records
from d2lora.errors import UserError
from d2lora.outputs import Outputs, lock, sync
from d2lora.records import RECORD, Record
from d2lora.stages import VERSIONS, Stage

Work = Callable[[Path], Record]  # fills a folder with a stage's files and returns the record, still without its digest


class Store:
    """The records under one output folder."""

    def __init__(self, output: Path) -> None:
        self.outputs = Outputs(output)

    def folder(self, stage: Stage) -> Path:
        """Return the folder of a stage's record."""
        return self.outputs.record(stage.kind, stage.key)

    def done(self, stage: Stage) -> bool:
        """Tell whether the stage's record is published."""
        return (self.folder(stage) / RECORD).is_file()

    def begun(self, stage: Stage) -> list[Path]:
        """Return the folders of workers that are doing a stage, or were killed while doing it."""
        pattern = self.outputs.unfinished(stage.kind, stage.key)
        return list(pattern.parent.glob(pattern.name))

    def record(self, stage: Stage) -> Record | None:
        """Return a finished stage's record; None if it is not finished.

        UserError if it is not readable, was edited or is not this stage's.
        """
        return records.read(self.folder(stage))

    def ensure(self, stage: Stage, work: Work) -> Record:
        """Return the stage's record; if there is none, do the work and publish it."""
        if record := self.record(stage):
            return record
        folder = self.folder(stage)
        if folder.exists() and not self.done(stage):
            raise UserError(f"{folder}: not a record's folder, and a record is to go there: move it away")
        with lock(self.outputs.lock(stage.key)):
            return self.record(stage) or self._publish(stage, work)

    def _publish(self, stage: Stage, work: Work) -> Record:
        # Not a folder of tempfile's, which only its owner may read, whatever the umask: others share the output folder.
        temporary = self.outputs.unfinished(stage.kind, stage.key, secrets.token_hex(4))
        temporary.mkdir(parents=True)
        try:
            _write(temporary, work(temporary))
            self._rename(temporary, stage)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        record = self.record(stage)
        assert record is not None, "renamed into its folder above"
        return record

    def _rename(self, temporary: Path, stage: Stage) -> None:
        """Publish a folder; if another worker has published the stage meanwhile, leave it as it is."""
        folder = self.folder(stage)
        try:
            temporary.rename(folder)
        except OSError:
            if not self.done(stage):
                raise
        sync(folder.parent)


def _write(folder: Path, record: Record) -> None:
    """Write record.json into a stage's folder, and flush everything in it to the disk."""
    content = record.as_read()
    file = folder / RECORD
    file.write_text(json.dumps(content | {"digest": records.record_digest(content)}, indent=1, allow_nan=False))
    mode = file.stat().st_mode  # as the umask has it
    for path in folder.rglob("*"):
        if path.is_file():
            if path.stat().st_mode != mode:  # safetensors makes files that only their owner may read
                path.chmod(mode)
            sync(path)
    sync(folder)


# --- upkeep --------------------------------------------------------------------------------------------------------


def check(output: Path) -> Iterator[str]:
    """Yield a line for each fault in the store under `output`: damage, edits, missing or foreign files, remains of
    killed workers.
    """
    outputs = Outputs(output)
    for path in outputs.entries():
        if _is_unfinished(path):
            yield f"{path}: unfinished: left by a worker that was stopped, or at work now"
        elif path.parent.name not in VERSIONS or not (path / RECORD).is_file():
            yield f"{path}: foreign: not a record's folder"
        else:
            yield from _faults(outputs, path)


def _is_unfinished(path: Path) -> bool:
    return path.name.startswith(".")


def _faults(outputs: Outputs, folder: Path) -> Iterator[str]:
    try:
        record = records.read(folder)
    except UserError as error:
        yield str(error)
        return
    assert record is not None, "its file is there"
    for name, content in record.files.items():
        file = folder / name
        if not file.is_file():
            yield f"{file}: missing"
        elif data.digest(file) != content:
            yield f"{file}: not what was published"
    if record.parent and not _is_published(outputs, record.parent):
        yield f"{folder}: its parent {record.parent} is missing"


def _is_published(outputs: Outputs, key: str) -> bool:
    """Tell whether a stage of any kind has a record under this key."""
    return any((outputs.record(kind, key) / RECORD).is_file() for kind in VERSIONS)


def garbage(output: Path) -> Iterator[tuple[Path, str]]:
    """Yield what can be deleted, and why: records that no manifest names, remains of killed workers, checkpoints of
    finished stages.

    UserError while there is a damaged manifest: the keys that it names are unknown.
    """
    outputs = Outputs(output)
    needed = _manifest_keys(outputs)
    for path in outputs.entries():
        if _is_unfinished(path):
            if not _is_locked(outputs, path.name[1:].split("-")[0]):
                yield path, "left by a worker that was stopped"
        elif path.parent.name in VERSIONS and path.name not in needed:
            yield path, "in no sweep's manifest"
    for path in sorted(outputs.checkpoints.glob("*")):
        if _is_published(outputs, path.name):
            yield path, "checkpoint of a finished stage"
    for path in sorted(outputs.references.glob("*")):
        of_a_stage = any(outputs.record(kind, path.name).exists() for kind in VERSIONS)
        if of_a_stage and path.name not in needed:
            yield path, "reference of a policy in no sweep's manifest"


def _manifest_keys(outputs: Outputs) -> set[str]:
    """Return all keys that manifests name; those of kinds that this version does not know, too."""
    pattern = outputs.damaged_manifest("*")
    for file in pattern.parent.glob(pattern.name):
        raise UserError(f"{file}: what only this manifest names would be freed too: remove it if that is right")
    pattern = outputs.manifest("*")
    return {key for file in pattern.parent.glob(pattern.name) for key in _keys_of(file)}


def _keys_of(manifest: Path) -> set[str]:
    """Return all keys that a manifest names. UserError if it is damaged."""
    try:
        content = json.loads(manifest.read_text())
        cells = content["cells"] + content.get("earlier", [])
        return {key for cell in cells for key in _strings(cell["stages"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{manifest}: damaged ({error}), and what only this manifest names would be freed too: start the sweep again to have it "
            "written anew, or remove it"
        ) from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, str):
        yield value


def _is_locked(outputs: Outputs, key: str) -> bool:
    from filelock import FileLock, Timeout

    try:
        with FileLock(outputs.lock(key), timeout=0, fallback_to_soft=False):
            return False
    except Timeout:
        return True


if __name__ == "__main__":  # as it was typed before `python -m d2lora check|gc`, and goes on working
    from d2lora.__main__ import old_store

    old_store()
