"""A bfloat16 base at two batch sizes: what is counted, its stage, and what a user sees of it."""

import csv
import json
import re
from pathlib import Path

import made
import pytest
from doing import do, only

from d2lora import plan, report
from d2lora.command import summary
from d2lora.outputs import Outputs
from d2lora.records import Result
from d2lora.stages import flips
from d2lora.store import Store, garbage

BF16 = ["model.dtype=bfloat16", "recipe.eval_batch=8"]


def item(index: int, answer: str, **scores: float) -> dict:
    return {"index": index, "prompt": f"{index}?", "answer": answer, **scores}


def test_answers_scores_and_their_difference_are_counted() -> None:
    alone = [item(0, "4", accuracy=1.0), item(1, "5", accuracy=0.0), item(2, "6", accuracy=1.0), item(3, "7", accuracy=0.0)]  # fmt: skip
    together = [alone[0], item(1, "50", accuracy=0.0), item(2, "7", accuracy=0.0), alone[3]]
    found, differing = flips.compare(alone, together, ["accuracy"])
    assert {name: f.value for name, f in found.items()} == {
        "answers_flipped": 0.5,
        "accuracy_flipped": 0.25,
        "accuracy_difference": -0.25,
    }
    assert {f.items for f in found.values()} == {4}
    assert found["accuracy_flipped"].stderr == pytest.approx(0.25)
    assert differing == [
        {"index": 1, "prompt": "1?", "answer": ["5", "50"], "accuracy": [0.0, 0.0]},
        {"index": 2, "prompt": "2?", "answer": ["6", "7"], "accuracy": [1.0, 0.0]},
    ]
    record = Result(benchmark="mine", base="small", batches=[1, 64], metrics=found)
    assert flips.text(record) == (
        "mine of the base small in bfloat16, batch 1 against 64: 50.0 % of 4 answers differ, "
        "accuracy by -25.0 points (in 25.0 % of items)"
    )


def test_a_score_may_move_where_it_falls_and_rises_alike() -> None:
    alone = [item(0, "a", rouge1=0.2), item(1, "b", rouge1=0.6)]
    together = [item(0, "c", rouge1=0.4), item(1, "d", rouge1=0.4)]
    found, differing = flips.compare(alone, together, ["rouge1"])
    assert (found["rouge1_flipped"].value, found["rouge1_difference"].value) == (1.0, pytest.approx(0))
    assert len(differing) == 2


def test_only_a_bfloat16_model_has_it_and_one_serves_the_grid(cell) -> None:
    grid = [
        cell(f"method={method}", f"m={m}", f"n={n}", f"seed={seed}", *BF16)
        for method, seed in (("sft", 0), ("orpo", 1))
        for m in (0, 8)
        for n in (0, 8)
    ]
    stages = [s for s in plan.stages(grid) if s.kind == "flips"]
    assert [s.label for s in stages] == [f"{b} of base lab at batch 1 and 8" for b in ("lab_math", "lab_facts")]
    assert all(s.parent is None for s in stages)
    assert not cell("m=8", "n=8").chain.flips


def test_its_key_has_model_benchmark_and_batches_and_no_other_has_it(cell) -> None:
    def keys(*overrides: str) -> set[str]:
        return {s.key for s in cell("m=8", "n=8", *BF16, *overrides).chain.flips}

    assert keys() == keys("seed=3", "m=0", "n=0", "init=gaussian", "recipe.micro_batch=4", "recipe.lr.sft=1e-5")
    assert not keys() & keys("recipe.eval_batch=16")
    assert len(keys() & keys("task.benchmark.lab_math.max_new_tokens=8")) == 1
    assert len(keys() & keys("task.benchmark.lab_math.limit=8")) == 1
    one, other = (cell("m=8", "n=8", "model.dtype=bfloat16", f"recipe.eval_batch={b}") for b in (8, 16))
    assert one.id == other.id
    assert [s.key for s in one.chain.results] == [s.key for s in other.chain.results]


def test_an_eval_batch_of_one_is_held_against_two(cell) -> None:
    found = cell("n=0", "model.dtype=bfloat16", "recipe.eval_batch=1").chain.flips
    assert [s.spec.batches for s in found] == [(1, 2)] * 2


def test_it_stands_in_the_first_batch_with_the_base_s_evaluations(cell) -> None:
    grid = [cell(f"m={m}", f"n={n}", *BF16) for m in (8, 0) for n in (0, 8)]
    where = {s.key: number for number, jobs in enumerate(plan.batches(grid, set())) for job in jobs for s in job.stages}
    base = next(c for c in grid if (c.config.m, c.config.n) == (0, 0))
    assert {where[s.key] for s in (*base.chain.flips, *base.chain.evaluations)} == {1}
    jobs = [job.stages for batch in plan.batches(grid, set()) for job in batch]
    assert [{s.kind for s in stages} for stages in jobs if any(s.kind == "flips" for s in stages)] == [{"flips"}]


def test_a_grid_does_it_once_and_says_it_under_its_table(run, tiny: Path, tmp_path: Path) -> None:
    short = ["task.benchmark.lab_math.limit=12", "task.benchmark.lab_math.max_new_tokens=8"]
    short += ["task.benchmark.lab_facts.limit=12", f"model.path={tiny}", "wandb.mode=disabled", "sweep=mine"]
    text = run("-m", "method=sft", "n=0,4", "m=0", *BF16, *short).stdout
    records = {
        record["benchmark"]: record
        for f in (tmp_path / "out" / "store" / "flips").glob("*/record.json")
        for record in [json.loads(f.read_text())]
    }
    assert set(records) == {"lab_math", "lab_facts"}
    assert len(list((tmp_path / "out" / "store" / "flips").glob("*/record.json"))) == 2
    assert all(r["batches"] == [1, 8] and r["metrics"]["answers_flipped"]["items"] == 12 for r in records.values())
    note = r"note: lab_math of the base lab in bfloat16, batch 1 against 8: \d+\.\d % of 12 answers differ, accuracy by [+-]"
    assert re.search(note, text)
    assert "lab_facts of the base lab in bfloat16, batch 1 against 8" in text
    for file in ("index.html", "mine/table.md", "mine/table.tex"):
        assert "batch 1 against 8" in (tmp_path / "out" / "report" / file).read_text()
    with (tmp_path / "out" / "report" / "results.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["metric"] == "accuracy"]
    share = records["lab_math"]["metrics"]["answers_flipped"]["value"]
    assert [float(r["batch_flips"]) for r in rows] == [share, share]


def test_the_shares_are_those_of_two_evaluations(cell, tmp_path: Path) -> None:
    """Two whole evaluations of the lab's base, in batches of 1 and of 8, differ in what the stage says."""

    def base(batch: int):
        short = ["task.benchmark.lab_math.limit=24", "task.benchmark.lab_math.max_new_tokens=24"]
        facts = ["model.dtype=bfloat16", "n=0", "m=0", f"output={tmp_path / str(batch)}"]
        return cell(f"recipe.eval_batch={batch}", "task.benchmark.lab_facts.limit=4", *short, *facts)

    def items(this, stage) -> list[dict]:
        return [json.loads(line) for line in (Store(Outputs.of(this.config).root).folder(stage) / "items.jsonl").open()]

    eight, one = base(8), base(1)
    store = do(only(eight, *eight.chain.stages))
    do(one)
    assert [store.record(s).eval_batch for s in eight.chain.evaluations] == [8, 8]
    alone, together = (items(c, c.chain.evaluations[0]) for c in (one, eight))
    found, differing = flips.compare(alone, together, ["accuracy"])
    stage = eight.chain.flips[0]
    assert store.record(stage).metrics == found
    assert items(eight, stage) == differing
    assert f"  {flips.text(store.record(stage))}" in summary.cell_text(eight, store).splitlines()


def test_only_the_first_items_are_asked(cell, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(flips, "FLIP_ITEMS", 5)
    short = ["task.benchmark.lab_math.max_new_tokens=2", "task.benchmark.lab_math.limit=3", f"model.path={tiny}"]
    this = cell("n=0", "m=0", *BF16, *short, f"output={tmp_path}")
    store = do(only(this, *this.chain.flips))
    math, facts = (store.record(s).metrics for s in this.chain.flips)
    assert {m.items for m in math.values()} == {3}, "its own limit is less"
    assert {m.items for m in facts.values()} == {5}
    assert not any(store.done(s) for s in this.chain.results)


def test_a_table_names_what_its_metrics_move_by(cell, tmp_path: Path) -> None:
    config = cell("method=sft", "task=lab_title", "sweep=mine", f"output={tmp_path}", *BF16).config
    grid = made.cells(config, n=[0, 100], m=[0, 40])
    made.publish(tmp_path, grid)
    text = report.finish(tmp_path, "mine", draw=False)
    (line,) = [line for line in text.splitlines() if "lab_title of the base lab in bfloat16" in line]
    assert line.startswith("note: ")
    assert "3.1 % of 200 answers differ, rouge1 by +0.4 points (in 3.1 % of items), rouge2 by +0.4 points" in line
    (facts,) = [line for line in text.splitlines() if "lab_facts of the base lab in bfloat16" in line]
    assert "acc by" in facts
    assert "acc_norm" not in facts, "the table does not show it"
    assert list(garbage(tmp_path)) == [], "a manifest names it"


def test_a_float32_table_says_nothing_of_it(cell, tmp_path: Path) -> None:
    grid = made.cells(cell("method=sft", "sweep=mine", f"output={tmp_path}").config, n=[0, 100])
    made.publish(tmp_path, grid)
    assert "bfloat16" not in report.finish(tmp_path, "mine", draw=False)
    with (tmp_path / "report" / "results.csv").open() as file:
        assert {(r["batch_flips"], r["batch_difference"]) for r in csv.DictReader(file)} == {("", "")}
