"""A sweep whose evaluations ask an engine, and that is stopped while the engine answers: nothing is lost, done twice or left running.

The engine is d2lora's worker on a small model in memory (model_vllm.py), in a process of its own as vLLM would be.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests/model_vllm.py"
GRID = ["method=sft", "n=0,4,6", "method.epochs=1", "recipe.lr.sft=1e-2", "recipe.engine=memory,vllm", "sweep=both"]
LIMITS = [
    "task.benchmark.lab_math.limit=3",
    "task.benchmark.lab_facts.limit=3",
    "task.benchmark.lab_math.max_new_tokens=8",
]


@pytest.fixture
def command(tiny: Path, tmp_path: Path) -> list[str]:
    """The command of a sweep that does each evaluation in memory and by the engine."""
    python = tmp_path / "python"  # says a version as that of the engine's environment, and runs the worker
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *-c*) echo 0.0;; *) exec "{sys.executable}" "{WORKER}" "{tmp_path}";; esac\n'
    )
    python.chmod(0o755)
    settings = [f"model.path={tiny}", f"output={tmp_path / 'out'}", f"recipe.engine_python={python}"]
    return [sys.executable, str(ROOT / "run.py"), "-m", *GRID, *LIMITS, *settings]


def asked(folder: Path) -> list[dict]:
    """What the engines were asked until now."""
    file = folder / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def records(folder: Path) -> dict[str, dict]:
    return {f.parent.name: json.loads(f.read_text()) for f in (folder / "out/store").glob("*/*/record.json")}


def stop_while_it_answers(command: list[str], folder: Path, how: int) -> int:
    """Start the sweep, send it a signal while the engine generates answers, and return its exit code; the engine must be gone."""
    before = len(asked(folder))
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    with subprocess.Popen(command, **pipes, preexec_fn=listening) as process:
        try:
            deadline = time.monotonic() + 500
            while not any(a["do"] == "generate" for a in asked(folder)[before:]) and time.monotonic() < deadline:
                assert process.poll() is None, process.stderr.read().decode()
                time.sleep(0.05)
            (engine,) = [a["pid"] for a in asked(folder)[before:] if a["do"] == "open"]
            assert psutil.pid_exists(engine)
            process.send_signal(how)
            code = process.wait(60)
        finally:
            process.kill()
    gone = time.monotonic() + 20
    while psutil.pid_exists(engine) and psutil.Process(engine).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < gone, "the engine outlives its sweep"
        time.sleep(0.1)
    return code


def test_a_sweep_that_is_stopped_while_an_engine_answers_loses_nothing_and_leaves_nothing(command, tmp_path) -> None:
    (tmp_path / "hang").touch()
    assert stop_while_it_answers(command, tmp_path, signal.SIGINT) == 130
    first = records(tmp_path)
    assert (
        sorted(r["stage"] for r in first.values() if r["stage"] != "contamination") == ["adapt"] * 2 + ["evaluate"] * 6
    )
    assert not any("engine" in r for r in first.values()), "those in memory are done, none of the engine's"
    assert stop_while_it_answers(command, tmp_path, signal.SIGKILL) == -signal.SIGKILL
    assert records(tmp_path) == first, "nothing is done twice"

    (tmp_path / "hang").unlink()
    before = len(asked(tmp_path))
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vllm 0.0: 6 evaluations of 2 adapters in 1 job, when all trainings are done" in done.stdout
    after = records(tmp_path)
    assert {key: after[key] for key in first} == first
    own = [r for key, r in after.items() if key not in first and r["stage"] == "evaluate"]
    assert len(own) == 6
    assert all(
        r["engine"] == {"name": "vllm", "version": "0.0", "dtype": "float32"} == r["spec"]["engine"] for r in own
    )
    check_calls(asked(tmp_path)[before:])
    check_equal(after, tmp_path)
    assert (
        "Answers are of different engines: the model in memory (6 records), vllm 0.0 (float32) (6 records)."
        in done.stdout
    )
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ", 0 to do" in again.stdout
    assert records(tmp_path) == after


def check_calls(calls: list[dict]) -> None:
    """One engine was started, and both adapters were asked each benchmark in one call, the base in one of its own."""
    assert sum(c["do"] == "open" for c in calls) == 1
    assert sorted(c["adapters"] for c in calls if c["do"] == "generate") == [1, 2]
    assert sorted(c["requests"] for c in calls if c["do"] == "generate") == [3, 6]


def check_equal(found: dict[str, dict], folder: Path) -> None:
    """The engine's answers are those of the model in memory."""
    by_item: dict[tuple, list[str]] = {}
    for key, record in found.items():
        if record["stage"] == "evaluate":
            items = (folder / "out/store/evaluate" / key / "items.jsonl").read_text().splitlines()
            answers = [(item["answer"], item["index"]) for item in map(json.loads, items)]
            by_item.setdefault((record["parent"], record["benchmark"]), []).append(json.dumps(answers))
    assert len(by_item) == 6
    assert all(len(answers) == 2 and answers[0] == answers[1] for answers in by_item.values())
