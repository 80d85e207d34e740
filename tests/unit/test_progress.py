"""What a person at a terminal sees of work that other processes do."""

import io
import sys
import time
from pathlib import Path

import pytest

from d2lora.command import terminal
from d2lora.stages import Stage
from d2lora.stages.evaluate import EvaluateSpec


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def stage(label: str) -> Stage:
    return Stage(EvaluateSpec(lm_eval=label), None, label=label)


def wait_for(text: str, err: io.StringIO) -> None:
    end = time.monotonic() + 10
    while text not in err.getvalue():
        assert time.monotonic() < end, err.getvalue()
        time.sleep(0.01)


def test_a_terminal_shows_the_sweep_s_line_and_how_far_each_worker_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", err := Terminal())
    one, two, silent = map(stage, ("one", "two", "silent"))
    with terminal.Note(tmp_path) as here, terminal.Note(tmp_path) as there:
        here.stage(one)(3, 10)
        there.stage(two)(1, 2)
        with terminal.board(lambda: "two at work", lambda: [one, two, silent], tmp_path, every=0.01):
            for text in ("two at work", "one:  30%", "3/10", "two:  50%"):
                wait_for(text, err)
            (tmp_path / "progress" / one.key).write_text("5 1")  # being written
            (tmp_path / "progress" / two.key).write_text("")
            (tmp_path / "progress" / one.key).write_text("7 10")
            wait_for("7/10", err)
    assert "silent" not in err.getvalue()
    assert list((tmp_path / "progress").iterdir()) == []


def test_where_nobody_looks_nothing_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    with (
        terminal.board(lambda: "line", lambda: [stage("one")], tmp_path, every=0.01),
        terminal.Note(tmp_path) as note,
        terminal.Bar() as bar,
    ):
        for watch in (note, bar):
            watch.stage(stage("one"))(3, 10)
        time.sleep(0.1)
    assert err.getvalue() == ""


def test_a_worker_whose_disk_is_full_works_on(tmp_path: Path) -> None:
    (tmp_path / "progress").write_text("a file where the folder should be")
    with terminal.Note(tmp_path) as note:
        note.stage(stage("one"))(3, 10)
