"""Tuned sweeps: who meets the test and when, what is chosen, and what the report says of it. Records are made up."""

import csv
import json
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import composing
import made
import pytest

from d2lora import data, plan, report
from d2lora.command import job, launch, launchers, summary
from d2lora.command.tuning import Tuner
from d2lora.errors import UserError
from d2lora.evaluate.vllm import installed
from d2lora.plan import Cell, Job
from d2lora.records import Candidate, Manifest, TunedArm
from d2lora.report import choice, manifest, table2
from d2lora.settings import Data
from d2lora.stages import Stage
from d2lora.store import Store

GRID = [
    "sweep=tuned",
    "tune=[recipe.lr]",
    "method=sft,dpo",
    "m=0,8",
    "n=0,16",
    "recipe.lr_factor=0.5,1,2",
    "replicate=0,1",
]


pytestmark = pytest.mark.usefixtures("undrawn")


def likes_fast(cell: Cell) -> float:
    """Return the chance to solve an item: a higher rate is better for D2LoRA, the middle one for LoRA."""
    rate = cell.config.recipe.rate(cell.config.method.name)
    usual = {"sft": 2e-3, "dpo": 1e-4}[cell.config.method.name]
    if cell.config.m == 0:
        return 0.7 if rate == usual else 0.3
    return 0.3 + 0.25 * rate / usual


class Typed:
    """A sweep as it is typed: its jobs leave records with made-up scores; `batches` are the jobs that were handed out."""

    def __init__(
        self,
        output: Path,
        *grid: str,
        ability: Callable[[Cell], float] = likes_fast,
        more: Callable[[Stage], dict] = lambda stage: {},
        fails: Callable[[Cell, Stage], bool] = lambda cell, stage: False,
    ) -> None:
        self.output, self.store, self.more, self.ability, self.fails = output, Store(output), more, ability, fails
        self.cells, compose = composing.sweep(*grid, f"output={output}")
        self.tuner = Tuner(self.cells, compose, self.store)
        self.phases: list[list[Job]] = []

    def run(self) -> "Typed":
        self.after, self.new = launch.train_tuned(self._train, self.tuner)
        return self

    def _train(self, cells: list[Cell]) -> bool:
        self.phases.append([])
        launch.launch_batches(self._launch, cells, self.store, launchers.Launcher())
        return bool(self.phases[-1])

    def _launch(self, jobs: list[Job]) -> None:
        self.phases[-1] += jobs
        owners = {s.key: cell for cell in self.cells for s in cell.chain.stages}
        for one in jobs:
            if one.shared:
                for stage in one.stages:
                    made.do(self.store, owners[stage.key], [stage], self.ability, self.more)
                continue
            failed = next((i for i, s in enumerate(one.stages) if self.fails(one.cell, s)), len(one.stages))
            made.do(self.store, one.cell, one.stages[:failed], self.ability, self.more)

    @cached_property
    def manifest(self) -> Manifest:
        return manifest.read_manifest(self.output, "tuned")

    def arm(self, label: str) -> TunedArm:
        assert self.manifest.tuning is not None
        return next(arm for arm in self.manifest.tuning.arms if arm.label == label)


def on_the_test(jobs: Iterable[Job]) -> list[tuple[Cell, Stage]]:
    """Return the evaluations on a test among jobs."""
    return [
        (j.cell, s) for j in jobs for s in j.stages if s.kind == "evaluate" and s.subject in ("lab_math", "lab_facts")
    ]


def rate(cell: Cell) -> float:
    return cell.config.recipe.rate(cell.config.method.name)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Typed:
    return Typed(tmp_path_factory.mktemp("tuned"), *GRID).run()


def test_no_candidate_meets_the_test_before_the_choice(tuned: Typed) -> None:
    first, second = tuned.phases
    usual = {"sft": 2e-3, "dpo": 1e-4}
    early = on_the_test(first)
    assert early, "cells at the recipe's own rate, and those that no rate matters for"
    assert all(c.config.n == 0 or rate(c) == usual[c.config.method.name] for c, _ in early)
    assert {s.subject for j in first for s in j.stages if s.kind == "evaluate"} >= {"lab_math_validation"}
    late = on_the_test(second)
    assert late == [(j.cell, s) for j in second for s in j.stages], "and nothing else is left for then"
    assert {(c.config.method.name, c.config.m, rate(c)) for c, _ in late} == {("sft", 8, 4e-3), ("dpo", 8, 2e-4)}
    assert len(late) == 2 * 2 * 2, "two arms, replicates and benchmarks; LoRA's best is the recipe's own rate"


def test_with_an_engine_too_validation_comes_first_and_each_phase_is_handed_out_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = {"name": "vllm", "version": "0.32.0", "dtype": "float32"}
    monkeypatch.setattr(installed, "identity", lambda config: identity)
    few = [o for o in GRID if not o.startswith(("method", "n=", "replicate"))]
    tuned = Typed(tmp_path, *few, "method=sft", "n=16", "recipe.engine=vllm").run()
    first, second = tuned.phases
    assert not any(s.kind == "evaluate" for j in first if not j.shared for s in j.stages)
    (asked,) = [j for j in first if j.shared]
    assert {s.subject for s in asked.stages} == {"lab_math_validation", "lab_math", "lab_facts"}
    own = {s.parent.key for s in asked.stages if s.subject == "lab_math"}
    assert len(own) == 2 < len({s.parent.key for s in asked.stages}) == 6, "the test meets the recipe's own rates alone"
    (chosen,) = second
    assert chosen.shared
    assert {s.subject for s in chosen.stages} == {"lab_math", "lab_facts"}
    assert len({s.parent.key for s in chosen.stages}) == 1, "LoRA's best is the recipe's own"


def test_what_is_done_at_the_end_is_the_chosen_and_the_fixed(tuned: Typed) -> None:
    store = tuned.store
    for cell in tuned.cells:
        done = all(store.done(s) for s in cell.chain.evaluations)
        own = rate(cell) in (2e-3, 1e-4)
        best = rate(cell) in (4e-3, 2e-4) and cell.config.m == 8
        assert done == (cell.config.n == 0 or own or best), cell.id
    assert all(store.done(s) for s in plan.stages(tuned.after)), "nothing that is planned is missing"


def test_the_manifest_keeps_every_candidate_s_score_and_the_choice(tuned: Typed) -> None:
    assert tuned.manifest.tuning is not None
    assert [a.label for a in tuned.manifest.tuning.arms] == [
        *("SFT LoRA n=16", "SFT D2LoRA(8, 16)", "DPO LoRA n=16", "DPO D2LoRA(8, 16)"),
    ]
    arm = tuned.arm("SFT D2LoRA(8, 16)")
    assert (arm.benchmark, arm.metric) == ("lab_math_validation", "accuracy")
    assert [c.values for c in arm.candidates] == [{"recipe.lr": v} for v in ("0.001", "0.002", "0.004")]
    assert [c.chosen for c in arm.candidates] == [False, False, True]
    assert [c.own for c in arm.candidates] == [False, True, False]
    by_id = {cell.id: cell for cell in tuned.cells}
    for candidate in arm.candidates:
        assert len(candidate.scores) == 2, "two replicates"
        for id, score in candidate.scores.items():
            assert score == tuned.store.record(by_id[id].chain.validations[0]).scores["accuracy"].value
        assert candidate.mean == pytest.approx(sum(candidate.scores.values()) / 2)
    cells = {c.id: c for c in tuned.manifest.cells}
    assert all(set(cells[id].stages.evaluate) == {"lab_math", "lab_facts"} for id in arm.candidates[2].scores)
    assert all(not cells[id].stages.evaluate for id in arm.candidates[0].scores)


def test_the_report_has_both_comparisons_with_a_verdict_each_and_all_candidates(tuned: Typed) -> None:
    text = report.write(tuned.output, ["tuned"])
    head, fixed = text.split("== fixed ==")
    assert head.count("D2LoRA beats LoRA in") == fixed.count("D2LoRA beats LoRA in") == 2, "one a benchmark"
    assert "recipe.lr is the largest tried: widen, in 2 of 4 arms: SFT D2LoRA(8, 16) (0.004); DPO" in head.replace(
        "best ", ""
    )
    assert "[lr=0.004: " in fixed
    assert "lr=0.004" not in head.split("note:")[0], "the tuned table's rows are arms"
    folder = tuned.output / "report" / "tuned"
    with (folder / "table.csv").open() as file:
        rows = {(r["method"], r["m"], r["n"]): r for r in csv.DictReader(file) if r["benchmark"] == "lab_math"}
    assert rows["sft", "8", "16"]["recipe.lr"] == "0.004"
    assert rows["sft", "0", "16"]["recipe.lr"] == "0.002"
    assert rows["sft", "8", "0"]["recipe.lr"] == ""
    with (folder / "table_fixed.csv").open() as file:
        fixed_rows = {(r["method"], r["m"], r["n"]): r for r in csv.DictReader(file) if r["benchmark"] == "lab_math"}
    assert rows.keys() == fixed_rows.keys()
    assert fixed_rows["sft", "0", "16"]["evaluations"] == rows["sft", "0", "16"]["evaluations"], "its best is the own"
    assert fixed_rows["sft", "8", "16"]["evaluations"] != rows["sft", "8", "16"]["evaluations"]
    with (folder / "candidates.csv").open() as file:
        candidates = list(csv.DictReader(file))
    assert len(candidates) == 12
    assert [c["what it is"] for c in candidates[3:6]] == ["candidate", "candidate, fixed", "chosen"]
    assert "candidate, fixed" in (folder / "candidates.tex").read_text()
    page = (tuned.output / "report" / "index.html").read_text()
    assert "At the recipe's own values" in page
    assert "candidate, fixed" in page


def test_table_2_has_a_column_a_rate_that_met_the_test_and_none_a_replicate(tuned: Typed) -> None:
    shown = table2.table(c for c in tuned.manifest.cells if c.stages.evaluate)
    table = {row[0]: row[1:] for row in shown.rows}
    assert shown.head[1:] == ["SFT"] * 3 + ["DPO"] * 3, "the base and D2LoRA(8, 0) stand with each"
    assert set(table["order of samples (data_seed)"]) == {"the seed"}
    assert table["seeds"][1] == "0, 1"


def test_results_csv_tells_candidates_from_chosen_cells(tuned: Typed) -> None:
    report.finish(tuned.output, "tuned", draw=False)
    with (tuned.output / "report" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["tuned"] for r in rows if r["n"] == "0"} == {""}
    chosen = [r for r in rows if r["tuned"] == "chosen"]
    assert {(r["benchmark"], r["recipe.lr"]) for r in chosen if r["method"] == "sft"} == {
        (b, "0.004") for b in ("lab_math_validation", "lab_math", "lab_facts")
    }
    assert {r["benchmark"] for r in rows if r["tuned"] == "candidate"} == {"lab_math_validation"}
    assert all(r["value"] for r in rows)


def test_typed_again_nothing_is_done_and_the_choice_is_the_same(tuned: Typed) -> None:
    again = Typed(tuned.output, *GRID).run()
    assert again.phases == [[], []]
    assert not again.new
    assert again.manifest.tuning == tuned.manifest.tuning


@pytest.mark.thorough
def test_a_sweep_that_was_stopped_before_the_choice_goes_on(tuned: Typed, tmp_path: Path) -> None:
    stopped = Typed(tmp_path, *GRID)
    begun, standing = stopped.tuner.begin()
    manifest.write_manifest(tmp_path, begun, standing)
    launch.launch_batches(lambda jobs: None, begun, stopped.store, launchers.Launcher())
    assert "no table: nothing is chosen" not in report.finish(tmp_path, "tuned", draw=False), "the base has its row"
    after = Typed(tmp_path, *GRID).run()
    assert after.manifest.tuning == tuned.manifest.tuning


def test_a_candidate_that_failed_is_left_out_and_said(tmp_path: Path) -> None:
    def fails(cell: Cell, stage: Stage) -> bool:
        return stage.kind == "adapt" and (rate(cell), cell.config.m, cell.config.seed) == (4e-3, 8, 1)

    typed = Typed(tmp_path, *GRID, fails=fails).run()
    arm = typed.arm("SFT D2LoRA(8, 16)")
    assert [c.missing for c in arm.candidates] == [[], [], ["seed 1"]]
    assert [c.chosen for c in arm.candidates] == [False, True, False]
    assert len(typed.phases[1]) == 2, (
        "of DPO's arm alone, a job a replicate; the failed training is not tried after the choice"
    )
    lost = [s for s in plan.stages(typed.after) if not typed.store.done(s)]
    assert [s.kind for s in lost] == ["adapt", "evaluate"], "it is missing, and its validation"
    text = report.finish(tmp_path, "tuned", draw=False)
    assert "SFT D2LoRA(8, 16), lr=0.004: not among the candidates: no result on lab_math_validation of seed 1." in text


@pytest.mark.thorough
def test_a_candidate_more_may_move_the_choice(tmp_path: Path) -> None:
    few = [o.replace("0.5,1,2", "0.5,1") for o in GRID]
    before = Typed(tmp_path, *few).run()
    assert before.arm("SFT D2LoRA(8, 16)").chosen.values == {"recipe.lr": "0.002"}
    half = [o.replace("0.5,1,2", "0.5,0.75") for o in GRID]
    Typed(tmp_path, *half).run()
    after = Typed(tmp_path, *(o.replace("0.5,1,2", "0.5,0.75,2") for o in GRID)).run()
    arm = after.arm("SFT D2LoRA(8, 16)")
    assert [(c.values["recipe.lr"], c.chosen, c.chosen_before) for c in arm.candidates] == [
        *(("0.001", False, False), ("0.0015", False, True), ("0.004", True, False)),
    ]
    assert not [c for _, c in enumerate(arm.candidates) if c.own], "the recipe's own is none of them"
    entries = {c.id: c for c in after.manifest.cells}
    assert all(entries[id].stages.evaluate for id in arm.candidates[1].scores), (
        "it had met the test, and still names it"
    )
    text = report.finish(tmp_path, "tuned", draw=False)
    assert "SFT D2LoRA(8, 16): lr=0.0015 was chosen before, with fewer candidates or results; now lr=0.004 is." in text
    assert "== fixed ==" not in text


def test_of_equal_means_the_smaller_value_is_taken_and_both_are_named(tmp_path: Path) -> None:
    def level(stage: Stage) -> dict:
        accuracy = {"value": 0.5, "stderr": 0.1, "items": 40}
        return {"metrics": {"accuracy": accuracy}} if stage.subject == "lab_math_validation" else {}

    typed = Typed(tmp_path, *GRID, more=level).run()
    assert typed.arm("DPO LoRA n=16").chosen.values == {"recipe.lr": "5e-05"}
    text = report.finish(tmp_path, "tuned", draw=False)
    assert "DPO LoRA n=16: lr=5e-05, lr=0.0001, lr=0.0002 tie on lab_math_validation; the smaller is taken." in text
    assert "The best recipe.lr is the smallest tried: widen, in 4 of 4 arms" in text


def test_values_are_in_the_order_of_numbers_and_the_middle_one_is_no_edge() -> None:
    values = ("2e-05", "0.0001", "0.003")
    candidates = [
        Candidate(values={"recipe.lr": v}, scores={v: 0.5}, mean=0.5, chosen=i == 1) for i, v in enumerate(values)
    ]
    arm = TunedArm(label="SFT", benchmark="b", candidates=candidates)
    assert choice.edges(arm) == {}
    only = arm.model_copy(update={"candidates": candidates[1:2]})
    assert choice.edges(only) == {}, "of a single one nothing is to be widened"


def test_several_settings_are_tuned_together(tmp_path: Path) -> None:
    typed = Typed(
        tmp_path, "sweep=tuned", "tune=[recipe.lr,method.beta]", "method=dpo", "m=0,8", "n=16", "recipe.lr_factor=1,2", "method.beta=0.05,0.1",
        ability=lambda cell: 0.5 + cell.config.method.beta + 100 * rate(cell),
    ).run()  # fmt: skip
    arm = typed.arm("DPO LoRA n=16")
    assert len(arm.candidates) == 4
    assert [c.values for c in arm.candidates if c.own] == [{"recipe.lr": "0.0001", "method.beta": "0.1"}]
    assert arm.chosen is not None
    assert len(arm.chosen.values) == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["~task.validation"], ["tune=recipe.lr", "lab-math", "no validation benchmark"]),
        (["recipe.lr_factor=1"], ["tune=recipe.lr", "same", "recipe.lr_factor=0.5,1,2"]),
        (["tune=[method.beta]", "method=sft"], ["tune=method.beta", "no result of this sweep depends on it"]),
        (["tune=[recipe.eval_batch]", "recipe.eval_batch=4,8"], ["tune=recipe.eval_batch", "no result"]),
        (["task.validation.lab_math_validation.data.split=test"], ["lab_math_validation", "the test, task.benchmark.lab_math"]),
        (["tune=[recipe.lr.sft]"], ["recipe.lr is meant"]),
        (["tune=[recipe.rl]"], ["tune=recipe.rl", "no such key"]),
        (["tune=[m]"], ["tune=m", "recipe.lr or method.beta"]),
        (["recipe.lr_factor=-1,1"], ["lr_factor=-1", "above 0"]),
        (["+task.validation.lab_math=${task.benchmark.lab_math}"], ["validation.lab_math", "a benchmark has this name too"]),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_is_refused(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    keys = {o.partition("=")[0] for o in overrides}
    grid = [o for o in GRID if o.partition("=")[0] not in keys] + overrides
    with pytest.raises(UserError) as error:
        Typed(tmp_path, *grid)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_single_cell_has_nothing_to_choose_among(cell: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tune=recipe.lr: .*add -m"):
        job.one_cell(cell("n=4", "tune=[recipe.lr]", f"output={tmp_path}"))


def test_without_tune_no_validation_set_is_evaluated_or_checked(cell: Callable, tmp_path: Path) -> None:
    plain, tuned = cell("n=4"), cell("n=4", "tune=[recipe.lr]")
    assert not plain.chain.validations
    assert {s.key for s in plain.chain.stages} == {s.key for s in tuned.chain.stages if "validation" not in s.subject}
    assert [s.subject for s in tuned.chain.contamination] == [
        *("lab-math / lab_math", "lab-math / lab_facts", "lab-math / lab_math_validation"),
    ]
    assert "validation" not in json.dumps(manifest.entry(plain).as_read()).replace('"validation": 0', "")
    assert "tune" not in manifest.entry(plain).config
    assert len([s for s in summary.plan_text([plain], Store(tmp_path)).splitlines() if "validation" in s]) == 0


def test_a_factor_of_one_changes_no_key_and_another_is_the_rate_that_results(cell: Callable) -> None:
    keys = lambda *overrides: [s.key for s in cell("method=orpo", "n=4", "m=8", *overrides).chain.stages]  # noqa: E731
    assert keys() == keys("recipe.lr_factor=1")
    assert keys("recipe.lr_factor=0.1") == keys("recipe.lr.orpo=3e-4"), (
        "0.003 * 0.1 is 0.0003, not 0.00030000000000000003"
    )
    assert cell("recipe.lr_factor=2").config.recipe.lr["warmup"] == cell().config.recipe.lr["warmup"]


def test_rows_for_validation_are_none_of_the_test_or_the_training(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"i": {i}}}\n' for i in range(50)))

    def numbers(**data_settings: object) -> list[int]:
        return [row["i"] for row in data.rows(Data(path=str(file), **data_settings), split_seed=3)]

    test, validation, rest = (numbers(hold_out=10, validation=5, part=p) for p in ("held_out", "validation", "rest"))
    assert sorted(test + validation + rest) == list(range(50))
    assert (len(test), len(validation), len(rest)) == (10, 5, 35)
    assert test == numbers(hold_out=10, part="held_out"), "the test is the one that is held out without validation"
    with pytest.raises(UserError, match=r"hold_out=40, data.validation=10: the data set has only 50 rows"):
        numbers(hold_out=40, validation=10)


@pytest.mark.thorough
def test_the_tuned_sweeps_are_what_their_names_say() -> None:
    lab, _ = composing.sweep(name="lab_tuned")
    assert len(lab) == 144
    assert {(c.config.method.name, c.config.m, c.config.n) for c in lab} == {
        (method, m, n) for method in ("sft", "dpo", "orpo") for m in (0, 4000) for n in (100, 500)
    }
    assert {c.config.seed for c in lab} == {c.config.data_seed for c in lab} == {0, 1, 2}
    assert len({rate(c) for c in lab if c.config.method.name == "sft"}) == 4
    assert all(c.config.tune == ["recipe.lr"] for c in lab)
    paper, _ = composing.sweep("replicate=0", "n=0,1000", name="table3_tuned")
    table3, _ = composing.sweep("n=0,1000", name="table3")
    names = {(c.config.method.name, c.config.m, c.config.n) for c in paper}
    assert names == {(c.config.method.name, c.config.m, c.config.n) for c in table3}
    assert {s.subject for c in paper for s in c.chain.validations} == {"gsm8k_validation"}


def test_initializations_are_compared_each_with_its_own_rate(tmp_path: Path) -> None:
    usual = {"lora": 2e-3, "milora": 4e-3}
    typed = Typed(
        tmp_path, "sweep=tuned", "tune=[recipe.lr]", "init=lora,milora", "m=0", "n=16", "recipe.lr_factor=1,2", "replicate=0,1",
        ability=lambda cell: 0.7 if rate(cell) == usual[cell.config.init.name] else 0.3,
    ).run()  # fmt: skip
    assert typed.arm("SFT LoRA n=16 lora").chosen.values == {"recipe.lr": "0.002"}
    assert typed.arm("SFT LoRA n=16 milora").chosen.values == {"recipe.lr": "0.004"}
    report.write(tmp_path, ["tuned"])
    with (tmp_path / "report" / "tuned" / "inits.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] == "lab_math accuracy"]
    assert [row["initialization"] for row in rows] == ["lora", "milora"], "a row each, of the chosen cells"
    assert [row["lr"] for row in rows] == ["0.002", "0.004"]
    assert "missing" not in str(rows)
    fixed = (tmp_path / "report" / "tuned" / "inits_fixed.md").read_text()
    assert "1 comparisons with init=lora at the same m and n an initialization is better" in fixed
    assert "| chosen | lr=0.002 |" in (tmp_path / "report" / "tuned" / "table.md").read_text()
    text = report.finish(tmp_path, "tuned", draw=False)
    assert "at the recipe's own values: lab_math accuracy: of 1 comparison" in text
