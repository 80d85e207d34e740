"""What a sweep says of itself, from a store with made-up records."""

from pathlib import Path

import made
import pytest

from d2lora import pipeline, summary
from d2lora.store import Store, write_json


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
        (store.place(stage).parent).mkdir(exist_ok=True)
        (store.place(stage).parent / f".{stage.key}-abc").mkdir()
    assert summary.progress_text(grid, store) == f"mine: {mine} of {total} stages done, 2 running, 6 left, 0 failed"
    write_json(pipeline.failure(ten.config, ten.chain.adapt), {"error": "x"})
    assert summary.progress_text(grid, store) == f"mine: {mine} of {total} stages done, 1 running, 6 left, 1 failed"


def test_what_a_killed_worker_left_beside_a_done_stage_is_not_running(grid, tmp_path: Path) -> None:
    store, base = Store(tmp_path), grid[0]
    made.publish(tmp_path, [base])
    for stage in base.chain.stages:
        (store.place(stage).parent / f".{stage.key}-abc").mkdir()
    count = len(base.chain.stages)
    assert summary.progress_text([base], store) == f"mine: {count} of {count} stages done, 0 running, 0 left, 0 failed"
