"""What a sweep says of itself, from a store with made-up records."""

import dataclasses
import re
from pathlib import Path

import made
import pytest

from d2lora.command import summary
from d2lora.outputs import Outputs, write_json
from d2lora.plan import Cell, Chain
from d2lora.stages import Stage
from d2lora.store import Store


@pytest.fixture
def grid(cell, tmp_path: Path):
    return made.cells(cell(f"output={tmp_path}", "method=sft", "sweep=mine").config, n=[0, 10, 20])


def test_the_sweep_s_line_counts_done_running_left_and_failed(grid, tmp_path: Path) -> None:
    store, (base, ten, twenty) = Store(tmp_path), grid
    made.publish(tmp_path, [base])
    mine = len(base.chain.stages)
    total = mine + 3 + 3 + 2  # adaptation and two evaluations of each; the contamination checks are shared
    assert summary.progress_text(grid, store) == f"mine: {mine} of {total} stages done, 0 running, 8 left, 0 failed"
    for stage in (ten.chain.adapt, twenty.chain.adapt):
        (store.folder(stage).parent).mkdir(exist_ok=True)
        (store.folder(stage).parent / f".{stage.key}-abc").mkdir()
    assert summary.progress_text(grid, store) == f"mine: {mine} of {total} stages done, 2 running, 6 left, 0 failed"
    write_json(Outputs.of(ten.config).failed(ten.chain.adapt.key), {"error": "x"})
    assert summary.progress_text(grid, store) == f"mine: {mine} of {total} stages done, 1 running, 6 left, 1 failed"


def test_what_a_killed_worker_left_beside_a_done_stage_is_not_running(grid, tmp_path: Path) -> None:
    store, base = Store(tmp_path), grid[0]
    made.publish(tmp_path, [base])
    for stage in base.chain.stages:
        (store.folder(stage).parent / f".{stage.key}-abc").mkdir()
    count = len(base.chain.stages)
    assert summary.progress_text([base], store) == f"mine: {count} of {count} stages done, 0 running, 0 left, 0 failed"


def told(text: str) -> str:
    return text.splitlines()[-1].strip()


def test_how_long_is_said_from_what_was_measured_before(grid, tmp_path: Path) -> None:
    """Made-up records took a second each; n=20 sees twice the rows of n=10, whose time is not doubled with its fixed seconds."""
    store, (base, ten, twenty) = Store(tmp_path), grid
    text = summary.plan_text(grid, store)
    assert "  adapt         " in text
    assert "from a processor's 80 GFLOP/s a thread, 1 M parameters" in text
    assert told(text).startswith("about ")
    made.publish(tmp_path, [base, ten])
    text = summary.plan_text(grid, store)
    assert re.search(r"\n  adapt         [1-4] s, peak 0\.1 GB: measured here on 1 record\n", text)
    seconds = [int(told(summary.plan_text(grid, store, workers=w)).split()[1]) for w in (1, 2)]
    assert 15 < seconds[0] < 40, "three stages of about a second, and a process's start and the report"
    assert told(summary.plan_text(grid, store, workers=2)).endswith("s with 2 workers")
    hundredfold = made.cells(twenty.config, n=[2000])
    assert told(summary.plan_text(hundredfold, store)) != told(text)
    made.publish(tmp_path, [twenty])
    assert "about" not in told(summary.plan_text(grid, store)), "nothing is left"


def test_all_of_a_data_set_on_the_hub_has_a_time_too(grid, tmp_path: Path) -> None:
    store, ten = Store(tmp_path), grid[1]
    made.publish(tmp_path, [ten])
    adapt = Stage(dataclasses.replace(ten.chain.adapt.spec, n="all"), samples=None)
    every = Cell(ten.config, Chain(adapt=adapt, evaluations=ten.chain.evaluations))
    assert re.match(r"about \d", told(summary.plan_text([every], store)))


def test_a_dry_run_s_duration_knows_the_workers(run) -> None:
    text = run("-m", "n=0", "dry_run=true", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2").stdout
    assert re.fullmatch(r"about \d+ s with 2 workers", told(text))
