import errno
import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from d2lora.command import upkeep
from d2lora.errors import UserError
from d2lora.outputs import cached, write_json
from d2lora.records import Record
from d2lora.stages import Spec, Stage
from d2lora.store import Store, check, garbage


@dataclass(frozen=True)
class AdaptSpec(Spec):
    """The least that a spec can be."""

    n: int
    KIND: ClassVar[str] = "adapt"
    VERSION: ClassVar[int] = 1

    def content(self) -> dict:
        return {"n": self.n}


class EvaluateSpec(AdaptSpec):
    KIND: ClassVar[str] = "evaluate"


STAGE = Stage(AdaptSpec(1))


def about(stage: Stage, **facts: object) -> Record:
    """The least that a record says."""
    content = {"key": stage.key, "stage": stage.kind, "spec": stage.spec.content(), "metrics": {}}
    content |= {"parent": stage.parent and stage.parent.key, "seconds": 1.0, "peak_memory_mb": 1.0}
    return Record.model_validate(content | facts)


def record(folder: Path, **metrics: object) -> Record:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_text("w")
    return about(STAGE, metrics=metrics)


def test_a_record_is_made_once(tmp_path: Path) -> None:
    store, calls = Store(tmp_path), []

    def work(folder: Path) -> Record:
        calls.append(folder)
        return record(folder)

    assert not store.done(STAGE)
    assert store.ensure(STAGE, work) == store.ensure(STAGE, work)
    assert len(calls) == 1
    assert store.done(STAGE)
    assert (store.folder(STAGE) / "adapter" / "weights").read_text() == "w"


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(3)])
def test_a_stage_that_fails_publishes_nothing(tmp_path: Path, error: BaseException) -> None:
    def work(folder: Path) -> Record:
        (folder / "half").write_text("half")
        raise error

    store = Store(tmp_path)
    with pytest.raises(type(error)):
        store.ensure(STAGE, work)
    assert not store.done(STAGE)
    assert [f for f in store.folder(STAGE).parent.iterdir() if not f.name.startswith(".locks")] == []


def test_who_comes_second_takes_the_published_record(tmp_path: Path) -> None:
    """Without a lock two workers may both do a stage: the first rename counts, the second drops its own."""
    store = Store(tmp_path)

    def work(folder: Path) -> Record:
        Store(tmp_path)._publish(STAGE, lambda other: record(other, by="first"))
        return record(folder, by="second")

    assert store._publish(STAGE, work).metrics == {"by": "first"}
    assert len(list(store.folder(STAGE).parent.iterdir())) == 1


@pytest.mark.parametrize(("umask", "folders", "files"), [(0o022, 0o755, 0o644), (0o007, 0o770, 0o660)])
def test_who_may_read_an_output_folder_is_the_umask_s_to_say(
    tmp_path: Path, umask: int, folders: int, files: int
) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    def work(folder: Path) -> Record:
        found = record(folder)
        save_file({"a": np.zeros(2)}, folder / "adapter" / "adapter_model.safetensors")
        return found

    before = os.umask(umask)
    try:
        Store(tmp_path).ensure(STAGE, work)
        write_json(tmp_path / "manifests" / "mine.json", {})
    finally:
        os.umask(before)
    place = Store(tmp_path).folder(STAGE)
    made = [place, *place.rglob("*"), *(tmp_path / "manifests").rglob("*")]
    assert len(made) == 6
    assert {f.name: f.stat().st_mode & 0o777 for f in made} == {f.name: folders if f.is_dir() else files for f in made}


def _ensure_slowly(folder: Path, results) -> None:
    import time

    def work(place: Path) -> Record:
        time.sleep(0.3)
        return record(place, pid=multiprocessing.current_process().pid)

    results.put(Store(folder).ensure(STAGE, work).metrics["pid"])


def test_two_processes_do_a_stage_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_ensure_slowly, args=(tmp_path, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    pids = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(pids) == 1


def _compute(file: Path, counted: Path) -> None:
    def make() -> list[float]:
        with counted.open("a") as lines:
            lines.write("once\n")
        time.sleep(0.3)
        return [1.5]

    assert cached(file, make) == [1.5]


def test_two_processes_compute_what_is_cached_once(tmp_path: Path) -> None:
    work = (tmp_path / "value.json", tmp_path / "counted")
    workers = [multiprocessing.Process(target=_compute, args=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "counted").read_text() == "once\n"


def test_a_foreign_folder_in_a_record_s_place_is_named_before_the_work(tmp_path: Path) -> None:
    store, calls = Store(tmp_path), []
    (store.folder(STAGE) / "notes").mkdir(parents=True)
    with pytest.raises(UserError, match="not a record's folder"):
        store.ensure(STAGE, lambda folder: calls.append(folder) or record(folder))
    assert calls == []


def test_upkeep_of_a_damaged_output_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "lab.json").write_text("{")
    command = [sys.executable, "-m", "d2lora.store", "gc", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"{tmp_path / 'manifests' / 'lab.json'}: damaged" in done.stderr


@pytest.mark.parametrize("action", ["check", "gc"])
def test_upkeep_of_a_folder_that_is_not_there_is_no_clean_bill(tmp_path: Path, action: str, capsys) -> None:
    assert {"check": upkeep.check, "gc": lambda folder: upkeep.gc(folder, False)}[action](tmp_path / "nope") == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nope'}: no such folder")


def test_a_file_system_without_locks_waits_for_nobody(tmp_path: Path, monkeypatch) -> None:
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    stage, store = STAGE, Store(tmp_path)
    lock = tmp_path / "store" / ".locks" / f"{stage.key}.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("4711\nanother-node\n")  # of a job that was killed there
    assert store.ensure(stage, lambda folder: about(stage)).key == stage.key


def test_damaged_or_foreign_records_are_named_and_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    file = store.folder(STAGE) / "record.json"
    file.parent.mkdir(parents=True)
    for text, word in (("{", "damaged"), (json.dumps({"key": "other"}), "not the record of this stage")):
        file.write_text(text)
        with pytest.raises(UserError, match=word):
            store.ensure(STAGE, record)
        assert file.read_text() == text


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A store with a parent and its child, both named by a manifest, and a third that no manifest names."""
    import hashlib

    child, other = Stage(EvaluateSpec(1), STAGE), Stage(AdaptSpec(2))
    for stage in (STAGE, child, other):

        def work(folder: Path, stage=stage) -> dict:
            (folder / "weights").write_text("w")
            files = {"weights": hashlib.sha256(b"w").hexdigest()}
            return about(stage, files=files, metrics={"value": 0.5})

        Store(tmp_path).ensure(stage, work)
    cells = [{"stages": {"warmup": None, "adapt": STAGE.key, "evaluate": {"math": child.key}}}]
    write_json(tmp_path / "manifests" / "grid.json", {"cells": cells})
    return tmp_path


def test_a_sound_store_has_no_faults(output: Path) -> None:
    assert list(check(output)) == []


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda place: (place / "weights").write_text("v"), "not what was published"),
        (lambda place: (place / "weights").unlink(), "missing"),
        (lambda place: (place / "record.json").write_text((place / "record.json").read_text()[:40]), "damaged"),
        (
            lambda place: (place / "record.json").write_text((place / "record.json").read_text().replace("0.5", "0.9")),
            "changed after it was published",
        ),
        (lambda place: (place.parent / "notes.txt").write_text("mine"), "foreign"),
        (lambda place: (place.parent / f".{'0' * 20}-abc").mkdir(), "unfinished"),
        (lambda place: place.rename(place.parent.parent.parent / "away"), "its parent"),
    ],
)
def test_check_names_what_is_wrong(output: Path, harm, told: str) -> None:
    harm(Store(output).folder(STAGE))
    faults = list(check(output))
    assert len(faults) == 1, faults
    assert told in faults[0]


def test_gc_lists_what_nothing_needs_before_it_frees_it(output: Path) -> None:
    import subprocess
    import sys

    (output / "store" / "adapt" / f".{'0' * 20}-abc").mkdir()
    (output / "checkpoints" / STAGE.key).mkdir(parents=True)
    loose = Store(output).folder(Stage(AdaptSpec(2)))
    assert {why for _, why in garbage(output)} == {
        "in no sweep's manifest",
        "left by a worker that was stopped",
        "checkpoint of a finished stage",
    }

    def gc(*more: str) -> str:
        command = [sys.executable, "-m", "d2lora.store", "gc", "--output", str(output), *more]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout

    assert "3 entries could be freed" in gc()
    assert loose.exists()
    assert "freed 3 entries" in gc("--yes")
    assert not loose.exists()
    assert list(check(output)) == []
    assert Store(output).done(STAGE)
