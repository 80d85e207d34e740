"""What a record says where an engine was asked and did not answer."""

from pathlib import Path

import composing
import pytest
from doing import do, only

from d2lora.plan import Cell
from d2lora.records import read_items

LIMITS = ["task.benchmark.lab_math.limit=2", "task.benchmark.lab_math.max_new_tokens=4"]


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of an engine that is installed, and ends as soon as it is started."""
    file = tmp_path / "python"
    file.write_text('#!/bin/sh\ncase "$*" in *-c*) echo 0.32.0;; *) exit 3;; esac\n')
    file.chmod(0o755)
    return file


def math(cell: Cell) -> Cell:
    """The cell with the evaluation on lab_math alone to do."""
    return only(cell, *(s for s in cell.chain.evaluations if s.subject == "lab_math"))


def test_an_engine_that_fails_is_answered_for_in_memory_under_its_own_key_and_the_record_says_so(
    tiny: Path, tmp_path: Path, python: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = ["n=0", f"model.path={tiny}", f"output={tmp_path / 'out'}", *LIMITS]
    plain = math(composing.cell(*settings))
    asked = math(composing.cell(*settings, "recipe.engine=vllm", f"recipe.engine_python={python}"))
    store = do(plain)
    do(asked)
    (mine,), (theirs,) = ([s for s in c.chain.evaluations if s.subject == "lab_math"] for c in (plain, asked))
    assert mine.key != theirs.key
    record = store.record(theirs)
    assert record.spec["engine"] == {"name": "vllm", "version": "0.32.0", "dtype": "float32"}
    assert record.engine.name == "memory"
    assert record.engine.instead_of == "vllm 0.32.0"
    assert record.engine.reason.startswith("the engine failed again: it ended")
    assert store.record(mine).engine is None
    assert read_items(store.folder(mine)) == read_items(store.folder(theirs))
    assert capsys.readouterr().err.count("is evaluated in memory") == 1, "one line"
