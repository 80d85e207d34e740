"""What a training set contains of a test set: the check itself, its stage, and its place in a grid."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2lora import plan, worker
from d2lora.command import summary
from d2lora.data import overlap, texts, wording
from d2lora.outputs import Outputs
from d2lora.records import Score
from d2lora.report import manifest
from d2lora.settings import fields
from d2lora.stages import VERSIONS, contamination
from d2lora.store import Store

ROOT = Path(__file__).parents[2]
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
    training = overlap.TrainingSet([{"text": row} for row in rows], ["text"])
    return overlap.overlap(overlap.TestSet(TESTS, ["question"], ["answer"]), training)


def test_a_clean_training_set_has_no_overlap() -> None:
    assert found("What is 2 + 3?", "A train leaves Bonn at 9:30, and nobody is on it.", "", "4", "mercury") == []


def test_the_same_question_is_found_whatever_its_case_and_punctuation() -> None:
    assert found("other", "what is 2 2", "What is 2 + 2?") == [
        {"index": 1, "question": "What is 2 + 2?", "exact": 1, "ngram13": None, "ngram": None}
    ]


def test_thirteen_words_in_a_row_are_found_in_question_and_answer_and_twelve_are_not() -> None:
    words = wording.words(QUESTION)
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


@pytest.mark.parametrize("spelling", [json.dumps, repr])
def test_a_conversation_in_a_cell_is_read_turn_by_turn(spelling) -> None:
    turns = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "Four."}]
    sharegpt = [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "Four."}]
    assert [i["index"] for i in found(spelling(turns))] == [i["index"] for i in found(spelling(sharegpt))] == [1]


@pytest.mark.parametrize(
    "text",
    [
        "<|begin|><|user|>What is 2 + 2?<|end|><|assistant|>Four.<|end|>",
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>",
        "<bos><start_of_turn>user\nWhat is 2 + 2?<end_of_turn>\n<start_of_turn>model\nFour.",
        "<s>[INST] What is 2 + 2? [/INST] Four.</s>",
    ],
)
def test_a_rendered_conversation_is_read_turn_by_turn(text: str) -> None:
    assert [(i["index"], i["exact"]) for i in found(text)] == [(1, 0)]
    assert found("Is a<b or b>c? What is 2 + 2?") == []


def test_lists_of_texts_are_read_element_by_element() -> None:
    rows = [{"options": ["sixty", QUESTION], "question": "Which is it?", "answers": ["80", ANSWER]}]
    tests = overlap.TestSet(rows, ["options", "question"], ["answers"])

    def said(text: str) -> list[tuple]:
        items = overlap.overlap(tests, overlap.TrainingSet([{"text": text}], ["text"]))
        return [(item["exact"], item["ngram13"]) for item in items]

    assert said(f"sixty {QUESTION} Which is it?") == [(0, 0)]
    assert said(f"Hear! {QUESTION}") == said(f"So: {ANSWER}") == [(None, 0)]
    assert said("Which is it?") == []
    assert [i["exact"] for i in found(["sixty", QUESTION], [{"label": "B", "text": [QUESTION]}])] == [0]
    assert [i["exact"] for i in found("other", [{"label": "B", "text": [QUESTION]}])] == [1]


def test_the_shares_are_of_all_items() -> None:
    third = Score(value=1 / 3, stderr=0.0, items=3)
    assert overlap.shares(found("what is 2+2", QUESTION), len(TESTS)) == {"exact": third, "ngram13": third}


# --- templates -----------------------------------------------------------------------------------------------------

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{{}}."


def between(test: tuple[str, dict], train: tuple[str, dict], gold: str = "") -> tuple[bool, bool]:
    """Whether a test (prompt template and row) is in a training set (template or "", and row): as a whole, by 13 words."""
    (prompt, item), (template, row) = test, train
    rows = [{"other": "nothing"} | dict.fromkeys(row, "before"), row]
    found = overlap.overlap(
        overlap.TestSet([item], sorted(fields(prompt)), sorted(fields(gold)), prompt, gold),
        overlap.TrainingSet(rows, sorted(row), (template,) if template else ()),
    )
    assert all(i[name] in (None, 1) for i in found for name in ("exact", "ngram13"))
    return any(i["exact"] == 1 for i in found), any(i["ngram13"] == 1 for i in found)


@pytest.mark.parametrize(
    ("test", "train", "exact"),
    [
        # a template on either side, on both, on none
        (("What is the capital of {country}?", {"country": "Ardan"}), ("", {"q": "What is the capital of Ardan?"}), True),
        (("What is the capital of {country}?", {"country": "Ardan"}), ("{q}", {"q": "what is the capital of ARDAN"}), True),
        (("{q}", {"q": "What is the capital of Ardan?"}), ("What is the capital of {c}?", {"c": "Ardan"}), True),
        (("Name the capital of {c}.", {"c": "Ardan"}), ("Name the {what} of {c}.", {"what": "capital", "c": "Ardan"}), True),
        (("{q}", {"q": "What is the capital of Ardan?"}), ("", {"q": "What is the capital of Ardan?"}), True),
        # an instruction beside it, on either side
        (("{q} " + INSTRUCTION, {"q": "Which is it?"}), ("", {"t": "Which is it?"}), True),
        (("{q}", {"q": "Which is it?"}), ("{t} " + INSTRUCTION, {"t": "Which is it?"}), True),
        (("{q} " + INSTRUCTION, {"q": "Is it?"}), ("", {"t": f"Is it? {INSTRUCTION.format()}"}), True),
        (("Question: {q}\nAnswer:", {"q": "Which is it?"}), ("{t} " + INSTRUCTION, {"t": "Which is it?"}), True),
        (("What is the capital of {c}? Answer in one word.", {"c": "Ardan"}), ("", {"q": "What is the capital of Ardan?"}), True),
        (("{q}", {"q": "What is the capital of Ardan?"}), ("Be short. What is the capital of {c}?", {"c": "Ardan"}), True),
        # two parts
        (("{z} {a}", {"z": "Ann has 3 figs.", "a": "How many?"}), ("", {"q": "Ann has 3 figs. How many?"}), True),
        (("{q}", {"q": "Ann has 3 figs. How many?"}), ("{z} {a}", {"z": "Ann has 3 figs.", "a": "How many?"}), True),
        (("{n}{unit}?", {"n": 5, "unit": "kg"}), ("", {"q": "5kg?"}), True),
        (("Is {a} above {b}?", {"a": 3, "b": 5}), ("What is {x} plus {y}?", {"x": 3, "y": 5}), False),
        (("{a}, {b}. Which is larger?", {"a": 3, "b": 5}), ("{x}, {y}. Add them.", {"x": 3, "y": 5}), False),
        (("{a} {b}?", {"a": "Ann has 3 figs.", "b": "How many?"}), ("", {"x": "Ann has 3 figs.", "y": "How many?"}), False),
        (("What is the capital of {c}?", {"c": "Ardan"}), ("What is the river of {c}?", {"c": "Bel"}), False),
    ],
)  # fmt: skip
def test_questions_are_compared_as_they_are_asked(test, train, exact: bool) -> None:
    assert between(test, train) == (exact, False)


def test_a_long_question_in_two_parts_is_found_under_other_labels() -> None:
    parts = {"story": "A train leaves Bonn at 9:30 with 120 people.", "q": "How many of them are still on it in Rome?"}
    labelled = "Story: {story}\nQuestion: {q}\nAnswer:"
    assert between((labelled, parts), ("{story} {q}", parts)) == (True, True)
    assert between(("{story} {q}", parts), (labelled, parts)) == (True, True)
    assert between((labelled, parts), ("", {"text": f"Hear: {parts['story']} {parts['q']} Well."})) == (False, True)
    assert between(("{story} {q}", parts), ("", {"text": f"Hear: {parts['story']} {parts['q']} Well."})) == (
        False,
        True,
    )


def test_a_template_s_wording_is_no_overlap() -> None:
    """Fourteen words that all prompts share, in the template of one side, of both, or beside a short value."""
    wording = "think about it as long as you need and write the number alone at the end"
    prompt = "{q} Please " + wording
    ours, theirs = {"q": "Two and two?"}, {"p": "Ten less one?"}
    assert between((prompt, ours), ("{p} Please " + wording, theirs)) == (False, False)
    assert between((prompt, ours), ("", {"p": f"Ten less one? Please {wording}"})) == (False, False)
    assert between(("{q}", {"q": f"Two? Please {wording}"}), ("{p} Please " + wording, theirs)) == (False, False)
    gold = wording + " {answer}"
    assert between(("{q}", ours | {"answer": "4"}), ("", {"p": wording}), gold) == (False, False)


def test_answers_are_compared_as_they_are_filled() -> None:
    item = {"q": "How?", "steps": "At first there are 120 people on it.", "end": "So 80 are left in Rome."}
    said = f"{item['steps']} {item['end']}"
    assert between(("{q}", item), ("", {"t": said}), "{steps} {end}") == (False, True)
    assert between(("{q}", {"q": "How?", "a": said}), ("{steps} {end}", item), "{a}")[1]
    assert between(("{q}", item), ("", {"t": said}), "{steps} and {end}") == (False, False), "a word stands between"
    short = {"steps": "At first there are", "end": "120 people on the train to Rome via Genoa at 9 sharp"}
    around = {"t": f"{short['steps']} {short['end']}"}
    assert between(("{q}", {"q": "How?", "a": around["t"]}), ("{steps} {end}", short), "{a}") == (False, True)


def test_what_is_no_text_is_read_by_its_parts_and_never_as_python_source() -> None:
    typed = [{"role": "user", "content": [{"type": "text", "text": "Which "}, {"type": "text", "text": "is it?"}]}]
    item = ("{q}", {"q": "Which is it?"})
    assert between(item, ("", {"chat": typed})) == (True, False)
    assert between(item, ("{chat}", {"chat": typed})) == (True, False), "the template can't be filled"
    assert between(item, ("", {"options": ["Which", "is it?"]})) == (False, False)
    options = {"q": "Which is it?", "options": ["red", "blue"]}
    assert between(("{q} {options}", options), ("", {"t": "red blue Which is it?"})) == (True, False)
    assert between(("{q} {options[0]}", options), ("", {"t": "Which is it? red"})) == (True, False)
    silent = [{"role": "user", "content": "Call."}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    for word in ("None", "role", "[{'role': 'user'", "{'text': ['red']}"):
        assert between(("{q}", {"q": word}), ("", {"chat": silent, "t": None, "c": {"text": ["red"]}})) == (
            False,
            False,
        )


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("Wo liegt die Stra\u00dfe?", "WO LIEGT DIE STRASSE", True),
        ("Who was Bront\u00eb?", "who was bronte\u0308", True),
        ("Who was Bront\u00eb?", "who was bronte", False),
        ("\uff37\uff48\uff4f has \uff11\uff12?", "who has 12", True),
        ("It costs $1,200.", "it costs 1200", True),
        ("It costs 1\u202f200.", "it costs 1,200", True),
        ("\u201cWho\u201d \u2014 said he \u2026", '"who" said he', True),
        ("\ufb01nd it", "find it", True),
        ("法国的首都是什么？", "法国 的 首都 是 什么", True),
        ("法国的首都是什么？", "德国的首都是什么？", False),
        ("カメラはどこ", "ｶﾒﾗはどこ?", True),
        ("กินข้าวไหม", "กิน ข้าว ไหม", True),
        ("กิน", "กัน", False),
        ("कि", "की", False),
        ("나는 학생이다", "나는 학생이다.", True),
        ("나는 학생이다", "나는학생이다", False),
    ],
)
def test_words_are_compared_whatever_their_spelling_in_unicode(one: str, other: str, equal: bool) -> None:
    assert between(("{q}", {"q": one}), ("", {"t": other})) == (equal, False)
    assert between(("{q}", {"q": other}), ("", {"t": one})) == (equal, False)


@pytest.mark.parametrize(
    "text", ["从前有一座山山里有一座庙庙里有一个老和尚", "むかしむかしあるところにおじいさんがいました", "กาลครั้งหนึ่งนานมาแล้วมีชายชราคนหนึ่ง", "ကျွန်တော်သည်ကျောင်းသားတစ်ယောက်ဖြစ်သည်ဟုပြောသည်"]
)  # fmt: skip
def test_without_spaces_thirteen_characters_are_found_and_twelve_are_not(text: str) -> None:
    characters = wording.words(text)
    assert len(characters) > 14
    for length, found in ((13, True), (12, False)):
        part = "".join(characters[1 : 1 + length])
        assert between(("{q}", {"q": text}), ("", {"t": f"{part}A B"})) == (False, found)


def test_korean_has_spaces_and_is_compared_by_words() -> None:
    text = "옛날 옛적 깊은 산속 작은 마을 외딴 집 한 채 착한 나무꾼 그리고 늙은 어머니"
    words = text.split()
    assert wording.words(text) == tuple(words)
    assert between(("{q}", {"q": text}), ("", {"t": " ".join(words[:13])})) == (False, True)
    assert between(("{q}", {"q": text}), ("", {"t": " ".join(words[:12])})) == (False, False)


_WORDS = st.lists(st.sampled_from(["one", "two", "three", "four.", "5,", "Six", "七八", "é"]), max_size=20).map(
    " ".join
)
_ROW = st.fixed_dictionaries({"a": _WORDS, "b": _WORDS, "c": st.lists(_WORDS, max_size=1)})
_TEMPLATE = st.sampled_from(
    ["{a}", "{b} {a}", "Q: {a}\nA: {b}", "one {a} two {b}", "{a}{b}", "{a} Say it. {b}", "{c[0]}"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_ROW, min_size=1, max_size=4), st.lists(_ROW, max_size=4), _TEMPLATE, _TEMPLATE, _TEMPLATE)
def test_templates_add_to_what_columns_find_and_equal_renderings_are_found(tests, rows, prompt, gold, trained) -> None:
    columns = ["a", "b"]
    raw = overlap.overlap(overlap.TestSet(tests, columns, ["b"]), overlap.TrainingSet(rows, columns))
    rendered = overlap.overlap(
        overlap.TestSet(tests, columns, ["b"], prompt, gold), overlap.TrainingSet(rows, columns, (trained,))
    )
    plain, found = ({i["index"]: i for i in items} for items in (raw, rendered))
    for index, item in plain.items():
        assert all(item[name] is None or found[index][name] <= item[name] for name in ("exact", "ngram13"))
    for index, item in enumerate(tests):
        lines = [texts.fill(trained, row) for row in rows if row["c"] or "[0]" not in trained]
        asked = wording.words(texts.fill(prompt, item)) if item["c"] or "[0]" not in prompt else ()
        if asked and asked in map(wording.words, lines):
            assert found[index]["exact"] is not None


# --- the stage -----------------------------------------------------------------------------------------------------


def test_one_stage_a_pair_serves_all_methods_sizes_and_seeds(cell) -> None:
    grid = [
        cell(f"method={method}", f"m={m}", f"n={n}", f"seed={seed}")
        for method, seed in (("sft", 0), ("orpo", 1))
        for m in (0, 8, 4000)
        for n in (0, 8, 1000)
    ]
    names = {
        pair.name: s.key
        for c in grid
        for pair, s in zip(contamination.pairs(c.config), c.chain.contamination, strict=True)
    }
    assert set(names) == {f"{train} / {test}" for train in ("lab", "lab-math") for test in ("lab_math", "lab_facts")}
    checks = [s for s in plan.stages(grid) if s.kind == "contamination"]
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
    assert len(keys() & keys("task.benchmark.lab_math.prompt='Solve: {question}'")) == 1, (
        "it is looked for as it is asked"
    )
    assert not keys() & keys("task.prompt='Solve: {prompt}'")
    assert keys() == keys("task.benchmark.lab_math.limit=4", "recipe.lr.sft=1e-5"), "the whole set is checked"


def test_checks_end_the_first_batch_of_a_grid_and_a_finished_one_is_none(cell) -> None:
    grid = [cell(f"m={m}", f"n={n}") for m in (8, 0) for n in (0, 8, 16)]
    prepares, first, second, *last = (
        [{s.kind == "contamination" for s in job.stages} for job in jobs] for jobs in plan.batches(grid, set())
    )
    assert first[-2:] == [{True}, {True}]
    assert all(kind == {False} for kind in prepares + first[:-2] + second)
    assert not any(last)
    checks = {s.key for s in plan.stages(grid) if s.kind == "contamination"}
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
    keys = [s.key for s in planted.chain.stages if s.kind in names]
    config = planted.config.model_copy(update={"job": keys})
    store = Store(Outputs.of(config).root)
    return store, worker.do(config, planted, store, lambda stage: lambda done, total: None)


def test_a_record_names_what_was_found_and_where(planted) -> None:
    store, lost = do(planted, "contamination")
    assert not lost
    stages = dict(zip((p.name for p in contamination.pairs(planted.config)), planted.chain.contamination, strict=True))
    record = store.record(stages["lab-math / lab_math"])
    assert record.scores["exact"] == Score(value=0.5, stderr=0.0, items=2)
    assert record.data.rows == 4
    lines = (store.folder(stages["lab-math / lab_math"]) / "items.jsonl").read_text().splitlines()
    assert [(i["index"], i["exact"], i["ngram13"]) for i in map(json.loads, lines)] == [(0, 1, 1)]
    warmup = store.record(stages["lab / lab_math"]).scores
    assert (warmup["exact"].value, warmup["ngram13"].value) == (0, 0.5)
    assert store.record(stages["lab / lab_facts"]).scores["ngram13"].value == 0


def test_a_check_needs_no_torch_and_is_not_done_twice(planted, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(planted.config.model_dump_json())
    code = f"""
import json, sys
from pathlib import Path
from d2lora.settings import config
from d2lora import plan, worker
from d2lora.outputs import Outputs
from d2lora.store import Store
c = config.parse(json.loads(Path({str(tmp_path / "config.json")!r}).read_text()))
cell = plan.Cell(c, plan.chain(c))
c = c.model_copy(update={{"job": [s.key for s in cell.chain.contamination]}})
assert not worker.do(c, cell, Store(Outputs.of(c).root), lambda stage: lambda done, total: None)
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

    monkeypatch.setattr(overlap, "overlap", fail)
    store, lost = do(planted, *VERSIONS)
    assert {s.key for s in lost} == {s.key for s in planted.chain.contamination}
    assert all(store.done(s) for s in planted.chain.results)
    monkeypatch.undo()
    assert do(planted, *VERSIONS)[1] == []


def test_a_manifest_names_the_checks_of_a_cell_by_their_pair(planted) -> None:
    output = Outputs.of(planted.config).root
    manifest.add_to_manifest(output, planted)
    (entry,) = manifest.read_manifest(output, "adhoc").cells
    assert entry.stages.contamination == {
        f"{train} / {test}": stage.key
        for (train, test), stage in zip(
            [(t, b) for t in ("lab", "lab-math") for b in ("lab_math", "lab_facts")],
            planted.chain.contamination,
            strict=True,
        )
    }


def test_a_cell_says_what_was_found_and_what_was_not(planted) -> None:
    store = do(planted, "contamination")[0]
    said = [line.strip() for line in summary.cell_text(planted, store).splitlines() if "training set" in line]
    assert said == [
        "test items in the training set, lab / lab_math: ngram13 50.00 % of 2 items",
        "test items in the training set, lab / lab_facts: no overlap found",
        "test items in the training set, lab-math / lab_math: exact 50.00 %, ngram13 50.00 % of 2 items",
        "test items in the training set, lab-math / lab_facts: no overlap found",
    ]


def test_a_cell_finds_the_questions_its_test_template_makes(cell, tiny: Path, tmp_path: Path) -> None:
    """The training column has whole questions, the test set only the countries."""
    countries = ["Ardan", "Belor", "Cesta", "Dorim"]
    train = [{"q": f"What is the capital of {c}?", "a": f"{c}ville"} for c in countries[:3]]
    for name, rows in (("train", train), ("test", [{"country": c, "n": 1} for c in countries])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    test = "task.benchmark.lab_math"
    task = [f"task.data.path={tmp_path / 'train.jsonl'}", "task.prompt='{q}'", "task.chosen='{a}'", "task.prefix=''"]
    task += [f"task.{name}=null" for name in ("rejected", "full_chosen", "full_rejected")]
    task += [f"{test}.data.path={tmp_path / 'test.jsonl'}", f"{test}.prompt='What is the capital of {{country}}?'"]
    task += [f"{test}.gold='{{n}}'", "~task.benchmark.lab_facts"]
    this = cell("n=2", "m=0", f"model.path={tiny}", *task, f"output={tmp_path / 'out'}")
    store, lost = do(this, "contamination")
    assert not lost
    text = "test items in the training set, lab-math / lab_math: exact 75.00 % of 4 items"
    assert text in summary.cell_text(this, store)
