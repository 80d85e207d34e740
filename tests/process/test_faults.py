"""Killed, out of memory, cut short: what is finished is kept, and what goes on ends as if nothing had happened."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from doing import adapter, alone, do

from d2lora import data, worker
from d2lora.base import Base, load_base
from d2lora.layouts import packing
from d2lora.outputs import Outputs
from d2lora.plan import Cell
from d2lora.settings import METHOD_NAMES
from d2lora.store import Store

SMALL = ["n=48", "method.epochs=2", "recipe.checkpoint_minutes=0", "task.benchmark.lab_math.limit=4", "task.benchmark.lab_facts.limit=4"]  # fmt: skip


@pytest.fixture
def make(cell, tiny: Path, tmp_path: Path):
    """make("out", "n=8", ...) -> an adaptation alone, its output in tmp_path/out."""

    def adaptation(output: str, *overrides: str) -> Cell:
        return alone(cell(f"model.path={tiny}", f"output={tmp_path / output}", *SMALL, *overrides))

    return adaptation


def assert_equal(one: Cell, other: Cell) -> None:
    weights = adapter(other)
    assert all(torch.equal(weight, weights[name]) for name, weight in adapter(one).items())


@pytest.mark.filterwarnings("error:Unable to fetch remote file")  # nobody is asked when a checkpoint is saved
@pytest.mark.parametrize(
    ("method", "init"),
    [*((method, "lora") for method in METHOD_NAMES), ("sft", "pissa"), ("sft", "multilora"), ("sft", "dora")],
)
def test_an_interrupted_training_ends_with_the_same_adapter_bit_for_bit(make, method: str, init: str) -> None:
    def interrupt(done: int, total: int) -> None:
        if (done, total) == (7, 12):
            raise KeyboardInterrupt

    calm, broken = (make(output, f"method={method}", f"init={init}") for output in ("calm", "broken"))
    do(calm)
    with pytest.raises(KeyboardInterrupt):
        do(broken, interrupt)
    store = do(broken)
    metrics = store.record(broken.chain.adapt).metrics
    assert metrics["resumed"]["step"] == 6
    assert metrics["steps"] == 12
    assert metrics["first_loss"] == Store(Outputs.of(calm.config).root).record(calm.chain.adapt).metrics["first_loss"]
    assert_equal(calm, broken)
    assert not list((Outputs.of(broken.config).root / "checkpoints").iterdir()), "no longer needed"


def test_a_checkpoint_cut_short_is_not_taken_up(make) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    calm, broken = make("calm"), make("broken")
    do(calm)
    with pytest.raises(KeyboardInterrupt):
        do(broken, interrupt)
    latest = Outputs.of(broken.config).root / "checkpoints" / broken.chain.adapt.key / "checkpoint-6"
    (latest / "whole.json").unlink()
    (latest / "adapter_model.safetensors").write_bytes(b"cut")
    assert do(broken).record(broken.chain.adapt).metrics["resumed"]["step"] == 5
    assert_equal(calm, broken)


def test_another_process_publishes_the_same_files(make, tiny: Path, tmp_path: Path) -> None:
    found = []
    for seed in ("1", "2"):  # of Python's hashes: sets of texts have another order
        this = make(seed, "n=8", "method.epochs=1")
        command = [sys.executable, str(data.ROOT / "run.py"), f"model.path={tiny}", f"output={tmp_path / seed}"]
        keys = f"job={this.config.job}"
        subprocess.run(
            [*command, *SMALL, "n=8", "method.epochs=1", keys], env=os.environ | {"PYTHONHASHSEED": seed}, check=True
        )
        found.append(Store(Outputs.of(this.config).root).record(this.chain.adapt).files)
    assert found[0] == found[1]


def test_kill_9_in_the_middle_of_a_training(make, tiny: Path, tmp_path: Path) -> None:
    calm, killed = make("calm", "method=orpo"), make("killed", "method=orpo")
    do(calm)
    command = [
        sys.executable,
        str(data.ROOT / "run.py"),
        f"model.path={tiny}",
        f"output={tmp_path / 'killed'}",
        "method=orpo",
        *SMALL,
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        marks = Outputs.of(killed.config).root / "checkpoints"
        deadline = time.monotonic() + 120
        while not list(marks.glob("*/checkpoint-3/whole.json")) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    store = Store(Outputs.of(killed.config).root)
    assert not store.done(killed.chain.adapt)
    assert do(killed).record(killed.chain.adapt).metrics["resumed"]["step"] >= 3
    assert_equal(calm, killed)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_effective_batch(make, method, monkeypatch, capsys) -> None:
    calm, full = make("calm", f"method={method}"), make("full", f"method={method}")
    do(calm)
    plain = packing.pack

    def pack(examples, *args):
        if len(examples) > 3:
            raise torch.OutOfMemoryError("simulated")
        return plain(examples, *args)

    monkeypatch.setattr(packing, "pack", pack)
    record = do(full).record(full.chain.adapt)
    assert record.metrics["micro_batch"] == 2
    assert record.metrics["steps"] == 12
    assert "again with recipe.micro_batch=4" in capsys.readouterr().err
    for name, weight in adapter(full).items():
        assert torch.allclose(weight, adapter(calm)[name], atol=1e-3), name


def test_memory_that_ends_at_a_step_loses_no_step_and_the_next_cell_begins_with_what_fits(
    make, monkeypatch, capsys
) -> None:
    """It ends in the backward pass, where some gradients are added already."""
    calm, full, after = (make(out, "method=dpo", "recipe.micro_batch=auto", more) for out, more in (("calm", "seed=0"), ("full", "seed=0"), ("full", "seed=1")))  # fmt: skip
    do(calm)
    steps: list[int] = []
    plain = torch.Tensor.backward

    def backward(loss, *args, **kwargs):
        plain(loss, *args, **kwargs)
        if steps and steps[-1] == 7 and not capsys.readouterr().err.count("again with"):
            steps.append(0)
            raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    record = do(full, lambda done, total: steps.append(done)).record(full.chain.adapt)
    assert steps == [*range(1, 8), 0, *range(8, 13)]
    assert record.metrics["micro_batch"] == "auto"
    tokens = record.metrics["pass_tokens"]
    assert 100 < tokens < 600
    for name, weight in adapter(full).items():
        assert torch.allclose(weight, adapter(calm)[name], atol=1e-5), name
    log = Store(Outputs.of(calm.config).root).record(calm.chain.adapt).metrics["log"]
    for entry, expected in zip(record.metrics["log"], log, strict=True):
        assert entry["rewards/margins"] == pytest.approx(expected["rewards/margins"], abs=1e-4)
    monkeypatch.undo()
    assert do(after).record(after.chain.adapt).metrics["pass_tokens"] == tokens


def test_what_a_smaller_micro_batch_had_reached_outlives_a_kill(make, monkeypatch) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    plain, cell = packing.pack, make("full")

    def pack(examples, *args):
        if len(examples) > 4:
            raise torch.OutOfMemoryError("simulated")
        return plain(examples, *args)

    monkeypatch.setattr(packing, "pack", pack)
    with pytest.raises(KeyboardInterrupt):
        do(cell, interrupt)
    metrics = do(cell).record(cell.chain.adapt).metrics  # begins with 8 again
    assert metrics["resumed"]["step"] == 6
    assert metrics["micro_batch"] == 4


def test_out_of_memory_at_micro_batch_1_fails_with_advice(make, monkeypatch) -> None:
    def pack(examples, *args):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(packing, "pack", pack)
    cell = make("full")
    store = Store(Outputs.of(cell.config).root)
    lost = worker.do(cell.config, cell, store, lambda stage: lambda done, total: None)
    assert [s.kind for s in lost] == ["adapt"]
    told = json.loads((Outputs.of(cell.config).root / "failed" / f"{lost[0].key}.json").read_text())["error"]
    assert "recipe.micro_batch=1: out of memory: try recipe.gradient_checkpointing=true" in told


def test_a_data_set_that_changed_under_its_name_stops_with_an_explanation(make, monkeypatch) -> None:
    """The Hub's part is played by a function: everything behind it is real."""
    rows = [{"prompt": f"{i} + 1?", "initial_reason_steps": "", "chosen": f"{i + 1}", "rejected": "0", "full_chosen": f"{i + 1}",
             "full_rejected": "0"} for i in range(60)]  # fmt: skip
    monkeypatch.setattr(data.sources, "_hub_rows", lambda *_: rows)
    hub = ["task.data.path=someone/pairs", "+task.data.revision=main"]
    do(make("out", *hub))
    do(make("out", *hub, "seed=1"))
    rows[3]["chosen"] = "moved"
    cell = make("out", *hub, "seed=2")
    lost = worker.do(cell.config, cell, Store(Outputs.of(cell.config).root), lambda stage: lambda done, total: None)
    told = json.loads((Outputs.of(cell.config).root / "failed" / f"{lost[0].key}.json").read_text())["error"]
    assert "data.path=someone/pairs: revision main has 60 rows that are not the 60 that records in" in told
    assert "pin data.revision to a commit" in told


def test_a_model_whose_revision_has_moved_is_refused(make, monkeypatch) -> None:
    """The Hub's answer is simulated: the commit that transformers notes in the config of a model from there."""

    load = load_base

    def from_hub(*given) -> Base:
        found = load(*given)
        found.model.config._commit_hash = commit
        return found

    monkeypatch.setattr("d2lora.base.load_base", from_hub)
    commit = "a" * 40
    do(make("out"))
    do(make("out", "seed=1"))
    commit = "b" * 40
    cell = make("out", "seed=2")
    lost = worker.do(cell.config, cell, Store(Outputs.of(cell.config).root), lambda stage: lambda done, total: None)
    told = json.loads((Outputs.of(cell.config).root / "failed" / f"{lost[0].key}.json").read_text())["error"]
    assert f"is {'b' * 40} now, and records in" in told
    assert f"were made with {'a' * 40}" in told


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_is_one_line_and_loses_nothing(make, monkeypatch, number: int) -> None:
    cell = make("out")

    def fail(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        store = Store(Outputs.of(cell.config).root)
        with pytest.raises(OSError, match=os.strerror(number)):  # not even the failure could be written
            worker.do(cell.config, cell, store, lambda stage: lambda done, total: None)
    assert not store.done(cell.chain.adapt)
    assert do(cell).done(cell.chain.adapt)


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    command = [sys.executable, str(data.ROOT / "run.py"), "-m", "n=4", f"output={tmp_path / 'file' / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: output={tmp_path / 'file' / 'out'}: {tmp_path / 'file'} is not a folder"
    assert (tmp_path / "file").read_text() == "in the way"
