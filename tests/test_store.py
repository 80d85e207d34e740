import json
import multiprocessing
from pathlib import Path

import pytest

from d2lora.errors import UserError
from d2lora.plan import Stage
from d2lora.store import Store

STAGE = Stage("adapt", {"n": 1})


def record(folder: Path) -> dict:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_text("w")
    return {"key": STAGE.key, "metrics": {}}


def test_a_record_is_made_once(tmp_path: Path) -> None:
    store, calls = Store(tmp_path), []

    def work(folder: Path) -> dict:
        calls.append(folder)
        return record(folder)

    assert not store.done(STAGE)
    assert store.ensure(STAGE, work) == store.ensure(STAGE, work)
    assert len(calls) == 1
    assert store.done(STAGE)
    assert (store.place(STAGE) / "adapter" / "weights").read_text() == "w"


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(3)])
def test_a_stage_that_fails_publishes_nothing(tmp_path: Path, error: BaseException) -> None:
    def work(folder: Path) -> dict:
        (folder / "half").write_text("half")
        raise error

    store = Store(tmp_path)
    with pytest.raises(type(error)):
        store.ensure(STAGE, work)
    assert not store.done(STAGE)
    assert [f for f in store.place(STAGE).parent.iterdir() if not f.name.startswith(".locks")] == []


def test_who_comes_second_takes_the_published_record(tmp_path: Path) -> None:
    """Without a lock two workers may both do a stage: the first rename counts, the second drops its own."""
    store = Store(tmp_path)

    def work(folder: Path) -> dict:
        Store(tmp_path)._publish(STAGE, lambda other: record(other) | {"metrics": {"by": "first"}})
        return record(folder) | {"metrics": {"by": "second"}}

    assert store._publish(STAGE, work)["metrics"] == {"by": "first"}
    assert len(list(store.place(STAGE).parent.iterdir())) == 1


def _ensure_slowly(folder: Path, results) -> None:
    import time

    def work(place: Path) -> dict:
        time.sleep(0.3)
        return record(place) | {"metrics": {"pid": multiprocessing.current_process().pid}}

    results.put(Store(folder).ensure(STAGE, work)["metrics"]["pid"])


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


def test_damaged_or_foreign_records_are_named_and_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    file = store.place(STAGE) / "record.json"
    file.parent.mkdir(parents=True)
    for text, word in (("{", "damaged"), (json.dumps({"key": "other"}), "another stage")):
        file.write_text(text)
        with pytest.raises(UserError, match=word):
            store.ensure(STAGE, record)
        assert file.read_text() == text
