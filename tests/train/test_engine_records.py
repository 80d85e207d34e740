"""What a record says where an engine was asked and did not answer, and in which order a job does what it can't do."""

import json
import sys
from pathlib import Path

import composing
import pytest
from doing import do, only
from wandb_runs import runs

from d2lora import mirror
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


def write_tasks(folder: Path) -> None:
    """Write two tasks of the harness: one whose answers are sampled, which is the model's in memory, and a greedy one."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"q": f"{i} + {i} ="}) + "\n" for i in range(2)))
    lines = {
        "dataset_path": "json", "dataset_kwargs": f"{{data_files: {{test: {folder}/rows.jsonl}}}}", "test_split": "test",
        "output_type": "generate_until", "doc_to_text": '"{{q}}"', "doc_to_target": '"4"', "metric_list": "[{metric: exact_match}]",
    }  # fmt: skip
    for name, sampled, temperature in (("drawn", "true", 1.0), ("greedy", "false", 0.0)):
        kwargs = f"{{until: [], max_gen_toks: 3, do_sample: {sampled}, temperature: {temperature}}}"
        text = lines | {"task": name, "generation_kwargs": kwargs}
        (folder / f"{name}.yaml").write_text("\n".join(f"{k}: {v}" for k, v in text.items()))


def test_what_an_engine_can_t_do_is_done_after_the_rest_and_starts_no_engine_again(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    python, worker = tmp_path / "python", Path(__file__).parents[1] / "model_vllm.py"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *-c*) echo 0.0;; *) exec "{sys.executable}" "{worker}" "{tmp_path}";; esac\n'
    )
    python.chmod(0o755)
    write_tasks(tmp_path / "tasks")
    cell = composing.cell(
        "n=0", f"model.path={tiny}", f"output={tmp_path / 'out'}", "recipe.engine=vllm",
        f"recipe.engine_python={python}", "+task.lm_eval=[drawn,greedy]", f"+task.lm_eval_path={tmp_path / 'tasks'}",
        "wandb.mode=offline",
    )  # fmt: skip
    stages = [next(s for s in cell.chain.evaluations if s.subject == name) for name in ("drawn", "greedy")]
    store = do(only(cell, *stages))
    first, second = (store.record(stage) for stage in stages)
    assert (first.engine.name, first.engine.reason) == ("memory", "the task samples answers")
    assert second.engine.name == "vllm"
    drawn, greedy = ((store.folder(stage) / "record.json").stat().st_mtime_ns for stage in stages)
    assert greedy < drawn, "memory is needed when the engine has no more to do"
    asked = [json.loads(line)["do"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert asked.count("open") == 1
    assert capsys.readouterr().err.count("evaluated in memory: the task samples answers") == 1
    mirror.flush(cell.config)
    exits = [(run["run_id"], run["exit"]) for run in runs(tmp_path / "out")]
    assert sorted(exits) == sorted((stage.key, [0]) for stage in stages), "no run of a stage that waited ends as failed"
