"""What a training set contains of a test set: the check itself, its stage, and its place in a grid."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from d2lora import contamination, pipeline, plan
from d2lora.report import manifest
from d2lora.store import Store

ROOT = Path(__file__).parent.parent
QUESTION = "A train leaves Bonn at 9:30 with 120 people; how many of them are still on it in Rome, if 40 left in Genoa?"
ANSWER = "At first there are 120 people on the train, and 40 of them leave it in Genoa, so 80 are left in Rome. #### 80"
TESTS = [
    {"question": QUESTION, "answer": ANSWER},
    {"question": "What is 2 + 2?", "answer": "4"},
    {
        "question": "Which metal is liquid at room temperature and was used in many old thermometers?",
        "answer": "mercury",
    },
]


def found(*rows: object) -> list[dict]:
    """The overlapping items of TESTS with rows of one column `text`."""
    return contamination.overlap(TESTS, ["question"], ["answer"], [{"text": row} for row in rows], ["text"])


def test_a_clean_training_set_has_no_overlap() -> None:
    assert found("What is 2 + 3?", "A train leaves Bonn at 9:30, and nobody is on it.", "", "4", "mercury") == []


def test_the_same_question_is_found_whatever_its_case_and_punctuation() -> None:
    assert found("other", "what is 2 2", "What is 2 + 2?") == [
        {"index": 1, "question": "What is 2 + 2?", "exact": 1, "ngram13": None, "ngram": None}
    ]


def test_thirteen_words_in_a_row_are_found_in_question_and_answer_and_twelve_are_not() -> None:
    words = contamination.words(QUESTION)
    for start in (0, 3, len(words) - 13):
        run = " ".join(words[start : start + 13])
        (item,) = found("nothing", f"They say: {run}, or so.")
        assert (item["index"], item["exact"], item["ngram13"], item["ngram"]) == (0, None, 1, run)
        assert found(" ".join(words[start : start + 12])) == []
    (item,) = found("So: at first there are 120 people on the train and 40 of them leave.")
    assert item["ngram13"] == 0


def test_every_turn_of_a_conversation_is_read_and_none_runs_into_the_next() -> None:
    words = QUESTION.split()
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": QUESTION}]
    assert [(i["exact"], i["ngram13"]) for i in found(turns)] == [(0, 0)]
    halves = [{"role": "user", "content": " ".join(part)} for part in (words[:12], words[12:])]
    assert found(halves) == []


def test_lists_of_texts_are_read_element_by_element() -> None:
    tests = [{"options": ["sixty", QUESTION], "question": "Which is it?", "answers": ["80", ANSWER]}]

    def said(text: str) -> list[tuple]:
        items = contamination.overlap(tests, ["options", "question"], ["answers"], [{"text": text}], ["text"])
        return [(item["exact"], item["ngram13"]) for item in items]

    assert said(f"sixty {QUESTION} Which is it?") == [(0, 0)]
    assert said(f"Hear! {QUESTION}") == said(f"So: {ANSWER}") == [(None, 0)]
    assert said("Which is it?") == []
    assert [i["exact"] for i in found(["sixty", QUESTION], [{"label": "B", "text": [QUESTION]}])] == [0]
    assert [i["exact"] for i in found("other", [{"label": "B", "text": [QUESTION]}])] == [1]


def test_the_shares_are_of_all_items() -> None:
    assert contamination.shares(found("what is 2+2", QUESTION), len(TESTS)) == {
        "exact": {"value": pytest.approx(1 / 3), "stderr": 0.0, "items": 3},
        "ngram13": {"value": pytest.approx(1 / 3), "stderr": 0.0, "items": 3},
    }


# --- the stage -----------------------------------------------------------------------------------------------------


def test_one_stage_a_pair_serves_all_methods_sizes_and_seeds(cell) -> None:
    grid = [
        cell(f"method={method}", f"m={m}", f"n={n}", f"seed={seed}")
        for method, seed in (("sft", 0), ("orpo", 1))
        for m in (0, 8, 4000)
        for n in (0, 8, 1000)
    ]
    names = {
        pair.name: s.key for c in grid for pair, s in zip(plan.pairs(c.config), c.chain.contamination, strict=True)
    }
    assert set(names) == {f"{train} / {test}" for train in ("lab", "lab-math") for test in ("lab_math", "lab_facts")}
    checks = [s for s in plan.stages(grid) if s.name == "contamination"]
    assert {s.key for s in checks} == set(names.values())
    assert len(checks) == 4
    assert all(s.parent is None for s in checks)
    assert [len(cell(f"m={m}", f"n={n}").chain.contamination) for m, n in ((0, 0), (8, 0), (0, 8), (8, 8))] == [
        0,
        2,
        2,
        4,
    ]


def test_another_test_or_training_set_is_another_pair(cell) -> None:
    def keys(*overrides: str) -> set[str]:
        return {s.key for s in cell("n=8", "m=0", *overrides).chain.contamination}

    assert not keys() & keys("+task.data.hold_out=10")
    assert not keys("+task.data.hold_out=10") & keys("+task.data.hold_out=10", "split_seed=1")
    assert len(keys() & keys("task.benchmark.lab_math.data.split=validation")) == 1
    assert keys() == keys("task.benchmark.lab_math.limit=4", "recipe.lr.sft=1e-5"), "the whole set is checked"


def test_checks_end_the_first_batch_of_a_grid_and_a_finished_one_is_none(cell) -> None:
    grid = [cell(f"m={m}", f"n={n}") for m in (8, 0) for n in (0, 8, 16)]
    prepares, first, second, last = (
        [{s.name == "contamination" for s in job.stages} for job in jobs] for jobs in plan.batches(grid, set())
    )
    assert first[-2:] == [{True}, {True}]
    assert all(kind == {False} for kind in prepares + first[:-2] + second)
    assert last == []
    checks = {s.key for s in plan.stages(grid) if s.name == "contamination"}
    again = plan.batches(grid, checks)
    assert all(s.key not in checks for batch in again for job in batch for s in job.stages)


@pytest.fixture
def planted(cell, tmp_path: Path, tiny: Path):
    """A cell whose two training sets hold a question of its test set, the warm-up's inside a longer turn."""
    pair = {"prompt": QUESTION.upper(), "chosen": "80", "rejected": "60", "full_chosen": "80", "full_rejected": "60"}
    pairs = [
        pair | {"initial_reason_steps": "", "prompt": p} for p in ("Two and two?", QUESTION.upper(), "One?", "Ten?")
    ]
    talk = [[{"role": "user", "content": f"Hear! {QUESTION}"}, {"role": "assistant", "content": "80"}]] * 4
    files = {"pairs": pairs, "mix": [{"chosen": t} for t in talk], "test": TESTS[:2]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return cell(
        f"model.path={tiny}",
        f"task.data.path={tmp_path / 'pairs.jsonl'}",
        f"warmup.data.path={tmp_path / 'mix.jsonl'}",
        f"task.benchmark.lab_math.data.path={tmp_path / 'test.jsonl'}",
        "task.benchmark.lab_math.max_new_tokens=2",
        "task.benchmark.lab_facts.limit=2",
        f"output={tmp_path / 'out'}",
        "n=4",
        "m=4",
    )


def do(planted, *names: str) -> tuple[Store, list]:
    keys = [s.key for s in planted.chain.stages if s.name in names]
    config = planted.config.model_copy(update={"job": keys})
    store = Store(pipeline.output(config))
    return store, pipeline.do(config, planted, store, lambda stage: lambda done, total: None)


def test_a_record_names_what_was_found_and_where(planted) -> None:
    store, lost = do(planted, "contamination")
    assert not lost
    stages = dict(zip((p.name for p in plan.pairs(planted.config)), planted.chain.contamination, strict=True))
    record = store.record(stages["lab-math / lab_math"])
    assert record["metrics"]["exact"] == {"value": 0.5, "stderr": 0.0, "items": 2}
    assert record["data"] == {"rows": 4}
    lines = (store.place(stages["lab-math / lab_math"]) / "items.jsonl").read_text().splitlines()
    assert [(i["index"], i["exact"], i["ngram13"]) for i in map(json.loads, lines)] == [(0, 1, 1)]
    warmup = store.record(stages["lab / lab_math"])["metrics"]
    assert (warmup["exact"]["value"], warmup["ngram13"]["value"]) == (0, 0.5)
    assert store.record(stages["lab / lab_facts"])["metrics"]["ngram13"]["value"] == 0


def test_a_check_needs_no_torch_and_is_not_done_twice(planted, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(planted.config.model_dump_json())
    code = f"""
import json, sys
from pathlib import Path
from d2lora import config, pipeline, plan
from d2lora.store import Store
c = config.parse(json.loads(Path({str(tmp_path / "config.json")!r}).read_text()))
cell = plan.Cell(c, plan.chain(c))
c = c.model_copy(update={{"job": [s.key for s in cell.chain.contamination]}})
assert not pipeline.do(c, cell, Store(pipeline.output(c)), lambda stage: lambda done, total: None)
print("torch" in sys.modules)
"""
    again = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True) for _ in range(2)]
    assert [done.stdout for done in again] == ["False\n"] * 2, again[0].stderr
    records = list((tmp_path / "out" / "store" / "contamination").glob("*/record.json"))
    assert len(records) == 4
    written = {f: f.stat().st_mtime_ns for f in records}
    do(planted, "contamination")
    assert {f: f.stat().st_mtime_ns for f in written} == written
    assert json.loads(records[0].read_text())["provenance"]["hardware"].keys() == {"machine", "cpu"}


def test_a_check_that_fails_or_finds_everything_holds_nothing_up(planted, monkeypatch) -> None:
    def fail(*_args: object) -> list:
        raise RuntimeError("no memory")

    monkeypatch.setattr(contamination, "overlap", fail)
    store, lost = do(planted, *plan.VERSIONS)
    assert {s.key for s in lost} == {s.key for s in planted.chain.contamination}
    assert all(store.done(s) for s in planted.chain.results)
    monkeypatch.undo()
    assert do(planted, *plan.VERSIONS)[1] == []


def test_a_manifest_names_the_checks_of_a_cell_by_their_pair(planted) -> None:
    output = pipeline.output(planted.config)
    manifest.add_to_manifest(output, planted)
    (entry,) = manifest.read_manifest(output, "adhoc")["cells"]
    assert entry["stages"]["contamination"] == {
        f"{train} / {test}": stage.key
        for (train, test), stage in zip(
            [(t, b) for t in ("lab", "lab-math") for b in ("lab_math", "lab_facts")],
            planted.chain.contamination,
            strict=True,
        )
    }
