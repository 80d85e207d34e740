"""Rows of tasks and general data: trained on exactly what they say, or refused in one line, or left out and counted."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from doing import do
from transformers import AutoTokenizer

from d2lora import data, report
from d2lora.command import preflight, rehearsal
from d2lora.errors import UserError
from d2lora.report.manifest import add_to_manifest
from d2lora.settings import Task

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "d2lora/lab/base")


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def task_of(file: Path | str = "x", **more) -> Task:
    given = {"name": "t", "prompt": "{q}", "chosen": "{good}", "rejected": "{bad}"} | more
    return Task.model_validate({"data": {"path": str(file)} | given.pop("data", {})} | given)


def told(task: Task, n: int = 1, preference: bool = True) -> str:
    with pytest.raises(UserError) as refused:
        data.check_task(task, n, 0, preference)
    return str(refused.value)


ROW = {"q": "Name a fruit.", "good": "An apple.", "bad": "A stone."}


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", list(ROW))
@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), ["a"], [], {"a": "b"}, [{"type": "image"}]])
def test_a_value_that_is_no_text_is_refused_with_its_rows(tmp_path: Path, column: str, value) -> None:
    bad = ROW | {column: value}
    task = task_of(write(tmp_path / "rows.jsonl", [ROW, bad, ROW, bad, bad, bad, bad]))
    said = told(task)
    assert f"rows 2, 4, 5 and 2 more (5 of 7): column {column} holds no text" in said
    assert "\n" not in said


@pytest.mark.parametrize("value", [None, "", " \n\t"])
@pytest.mark.parametrize("column", list(ROW))
def test_nothing_is_refused_or_left_out_and_counted(tmp_path: Path, column: str, value) -> None:
    file = write(tmp_path / "rows.jsonl", [ROW, ROW | {column: value}, ROW])
    said = told(task_of(file))
    assert f"row 2 (1 of 3): nothing in column {column}" in said
    assert "task.data.empty=leave_out" in said
    lenient = task_of(file, data={"empty": "leave_out"})
    data.check_task(lenient, 2, 0)
    assert "n=3: task=t has 3 rows, of which 2 can be used (left out: empty: 1): choose n of at most 2" in told(
        lenient, 3
    )


def test_a_csv_with_empty_abstracts_is_counted(tmp_path: Path, tokenizer) -> None:
    lines = [f"{f'abstract {i}' if i % 2 else ''},title {i}" for i in range(20)]
    (tmp_path / "train.csv").write_text("abstract,title\n" + "\n".join(lines) + "\n")
    columns = {"prompt": "Write a title for this abstract: {abstract}", "chosen": "{title}", "rejected": None}
    assert "rows 1, 3, 5 and 7 more (10 of 20): nothing in column abstract" in told(task_of(tmp_path, **columns))
    task = task_of(tmp_path, data={"empty": "leave_out"}, **columns)
    drawn = data.subset(data.rows(task.data), lambda r: data.pair_example(tokenizer, task, r), "all", 64, "s")
    assert (len(drawn.rows), drawn.counts().left_out) == (10, {"empty": 10})
    assert not any(index % 2 == 0 for index in drawn.rows)


def test_an_empty_column_beside_a_full_one_is_no_empty_prompt(tokenizer) -> None:
    task = task_of(prompt="{instruction}\n{input}")
    example = data.pair_example(tokenizer, task, ROW | {"instruction": "Name a fruit.", "input": ""})
    assert "Name a fruit.\n" in tokenizer.decode(example["prompt_ids"])


def test_numbers_and_text_parts_are_texts(tmp_path: Path, tokenizer) -> None:
    row = {"q": [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}], "good": 3, "bad": 2.5}
    data.check_task(task_of(write(tmp_path / "rows.jsonl", [row])), 1, 0)
    example = data.pair_example(tokenizer, task_of(), row)
    assert "How many?" in tokenizer.decode(example["prompt_ids"])
    assert [tokenizer.decode(example[f"{k}_ids"]).removesuffix("<|end|>") for k in ("chosen", "rejected")] == [
        "3",
        "2.5",
    ]


@pytest.mark.parametrize("chosen", ["{answers[text]}", "{answers[3]}", "{q:d}", "{answers[a][b]}"])
def test_a_template_that_can_t_be_filled_in_is_refused_with_its_rows(tmp_path: Path, chosen: str) -> None:
    task = task_of(write(tmp_path / "rows.jsonl", [ROW | {"answers": ["a"]}] * 2), chosen=chosen)
    assert "rows 1, 2 (2 of 2)" in told(task)


# --- conversations -------------------------------------------------------------------------------------------------

HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Name a fruit."},
]


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


CALL = {"tool_calls": [{"function": {"name": "pick", "arguments": {"what": "apple"}}}]}


def sharegpt(turns: list[dict]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


LAYOUTS = {
    "implicit": ({"good": [*HISTORY, said("An apple.")], "bad": [*HISTORY, said("A stone.")]}, None),
    "prompt repeated": ({"q": "Name a fruit.", "good": [*HISTORY, said("An apple.")], "bad": [*HISTORY, said("A stone.")]}, "{q}"),
    "explicit": ({"q": HISTORY, "good": [said("An apple.")], "bad": [said("A stone.")]}, "{q}"),
    "explicit and whole": ({"q": HISTORY, "good": [*HISTORY, said("An apple.")], "bad": [*HISTORY, said("A stone.")]}, "{q}"),
    "history, then texts": ({"q": HISTORY, "good": "An apple.", "bad": "A stone."}, "{q}"),
    "ShareGPT": ({"good": sharegpt([*HISTORY, said("An apple.")]), "bad": sharegpt([*HISTORY, said("A stone.")])}, None),
    "parts": ({"good": [*HISTORY, said([{"type": "text", "text": "An apple."}])], "bad": [*HISTORY, said("A stone.")]}, None),
    "turns": (ROW, [*HISTORY[:3], {"role": "user", "content": "{q}"}]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_known_layouts_are_read_as_what_they_are(tmp_path: Path, tokenizer, layout: str) -> None:
    row, prompt = LAYOUTS[layout]
    task = task_of(write(tmp_path / "rows.jsonl", [row]), prompt=prompt)
    data.check_task(task, 1, 0, preference=True)
    example = data.pair_example(tokenizer, task, data.rows(task.data)[0], preference=True)
    rendered = tokenizer.apply_chat_template(HISTORY, tokenize=False, add_generation_prompt=True)
    for name, answer in (("chosen", "An apple."), ("rejected", "A stone.")):
        plain = tokenizer(rendered + answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert example["prompt_ids"] + example[f"{name}_ids"] == plain


@pytest.mark.parametrize(
    ("row", "prompt", "words"),
    [
        ({"good": HISTORY, "bad": HISTORY}, None, "does not end with an assistant turn"),
        ({"good": [*HISTORY, said("a")], "bad": [*HISTORY, said("b")]}, "{good} ", "holds no text"),
        ({"q": "Other?", "good": [*HISTORY, said("a")], "bad": [*HISTORY, said("b")]}, "{q}", "is not task.prompt"),
        ({"good": [*HISTORY, said("a") | CALL], "bad": "b"}, None, "tool_calls"),
        ({"good": [*HISTORY, said("a") | {"weight": 0}], "bad": "b"}, None, "weight"),
        ({"good": [*HISTORY, said(None)], "bad": "b"}, None, "nothing in the last turn"),
        ({"good": [*HISTORY[:3], {"role": "user", "content": None}, said("a")], "bad": "b"}, None, "nothing in turn 4 in {good}"),
        ({"q": [*HISTORY, said("a")], "good": "b", "bad": "c"}, "{q}", "ends with an assistant turn"),
        ({"good": "a", "bad": "b"}, None, "no prompt"),
    ],
)  # fmt: skip
def test_conversations_that_are_no_pair_are_refused_with_their_rows(tmp_path: Path, row, prompt, words) -> None:
    line = told(task_of(write(tmp_path / "rows.jsonl", [row, row]), prompt=prompt))
    assert "rows 1, 2 (2 of 2)" in line
    assert words in line


def test_pairs_that_part_early_are_left_out(tmp_path: Path) -> None:
    other = [*HISTORY[:2], said("Go away."), HISTORY[3]]
    rows = [{"good": [*HISTORY, said("a")], "bad": [*h, said("b")]} for h in (HISTORY, other)]
    line = told(task_of(write(tmp_path / "rows.jsonl", rows), prompt=None), 2)
    assert "of which 1 can be used (left out: chosen and rejected part before their last turn: 1)" in line


def test_the_lab_s_general_pairs_are_read_under_dpo(tokenizer) -> None:
    task = task_of("d2lora/lab/data/general", prompt="{prompt}", chosen="{chosen}", rejected="{rejected}")
    data.check_task(task, "all", 0, preference=True)
    for row in data.rows(task.data)[::4000]:
        example = data.pair_example(tokenizer, task, row, preference=True)
        assert tokenizer.decode(example["chosen_ids"]).endswith(row["chosen"][-1]["content"][-3:] + "<|end|>")
        assert "role" not in tokenizer.decode(example["prompt_ids"] + example["chosen_ids"])


# --- equal answers -------------------------------------------------------------------------------------------------


def test_a_pair_without_a_preference_is_left_out_where_one_is_learned(tmp_path: Path, tokenizer) -> None:
    task = task_of(write(tmp_path / "rows.jsonl", [ROW, ROW | {"bad": ROW["good"]}, ROW]))
    data.check_task(task, 3, 0)
    line = told(task, 3)
    assert "of which 2 can be used (left out: chosen equals rejected: 1)" in line

    def drawn(preference: bool) -> data.Subset:
        make = lambda row: data.pair_example(tokenizer, task, row, preference)  # noqa: E731
        return data.subset(data.rows(task.data), make, "all", 64, "s")

    assert drawn(True).counts().left_out == {"chosen equals rejected": 1}
    assert 1 not in drawn(True).rows
    counts = drawn(False).counts()
    assert (counts.samples, counts.misfits) == (3, 0)
    assert "left_out" not in counts.as_read()


# --- known while planning ------------------------------------------------------------------------------------------


@pytest.fixture
def check(cell, tmp_path: Path):
    """check({"task.data.path": rows, ...}, "n=4", ...) checks the cell as a run would; rows go into a file."""

    def checked(rows: dict[str, list[dict]], *overrides: str) -> None:
        given = []
        for number, (key, found) in enumerate(rows.items()):
            given.append(f"{key}={write(tmp_path / f'{number}.jsonl', found)}")
        preflight.check(cell(f"output={tmp_path / 'out'}", *given, *overrides).config, set())

    return checked


STEPS = {"initial_reason_steps": "Step 1:", "chosen": " It is 4.", "rejected": " It is 5."}
STEPS |= {"full_chosen": STEPS["chosen"], "full_rejected": STEPS["rejected"]}


def pairs(*lengths: int) -> list[dict]:
    return [STEPS | {"prompt": f"{i} " + "how many cups " * length} for i, length in enumerate(lengths)]


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_rows_that_fit_are_counted_before_anything_is_loaded(check, method: str) -> None:
    rows = {"task.data.path": pairs(*[1] * 13, *[300] * 3)}
    check(rows, "n=13", f"method={method}")
    check(rows, "n=all", f"method={method}")
    with pytest.raises(
        UserError, match=r"n=16: task=lab-math: only 13 of 16 rows fit recipe.max_length=256, and 16 are"
    ):
        check(rows, "n=16", f"method={method}")


def test_equal_answers_are_counted_with_them(check) -> None:
    rows = {"task.data.path": [*pairs(*[1] * 6), *(r | {"full_rejected": STEPS["full_chosen"]} for r in pairs(1, 1))]}
    check(rows, "n=8", "method=sft")
    check(rows, "n=6", "method=dpo")
    with pytest.raises(UserError, match=r"n=8: task=lab-math: only 6 of 8 .*\(left out: chosen equals rejected: 2\)"):
        check(rows, "n=8", "method=dpo")


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([{"role": "user", "content": "Hello."}], "a conversation without an assistant turn"),
        ([], "nothing in column chosen"),
        ("hello", "no conversation: a list of"),
        (3, "must hold conversations"),
        ([{"role": "user"}], "turn 1 .user.: nothing in content"),
    ],
)
def test_conversations_that_can_t_be_learned_are_named_together(check, turns, words: str) -> None:
    good = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    rows = {"warmup.data.path": [{"chosen": good if i % 2 else turns} for i in range(10)]}
    with pytest.raises(UserError, match=rf"rows 1, 3, 5 and 2 more \(5 of 10\): .*{words}"):
        check(rows, "n=4", "m=10")


def with_template(tiny: Path, folder: Path, template: str | None) -> Path:
    """A copy of the tiny model with another chat template, or none."""
    folder.mkdir()
    for file in tiny.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_base_without_a_chat_template_is_refused_for_a_warm_up(check, tiny: Path, tmp_path: Path) -> None:
    bare = with_template(tiny, tmp_path / "bare", None)
    check({}, f"model.path={bare}", "n=4")
    with pytest.raises(UserError, match=r"m=8: warmup=lab: .* no chat template, which conversations need: use m=0"):
        check({}, f"model.path={bare}", "n=4", "m=8")


def test_what_a_chat_template_refuses_is_named_with_its_rows(check, tiny: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    strict = with_template(tiny, tmp_path / "strict", template)
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    told_off = [{"role": "system", "content": "Be brief."}, *turns]
    rows = {"warmup.data.path": [{"chosen": told_off if i in (2, 5) else turns} for i in range(8)]}
    with pytest.raises(UserError, match=r"rows 3, 6 \(2 of 8\): .*System role not supported"):
        check(rows, f"model.path={strict}", "n=4", "m=8")


def test_test_items_that_the_model_can_t_take_are_named(check) -> None:
    items = [{"question": "how many cups " * (300 if i in (1, 3) else 2), "answer": "#### 4"} for i in range(6)]
    rows = {"task.benchmark.lab_math.data.path": items}
    with pytest.raises(
        UserError, match=r"task.benchmark.lab_math: .*: rows 2, 4 \(2 of 6 items\): longer than the \d+ tok"
    ):
        check(rows, "n=4")
    check(rows, "n=4", "+task.benchmark.lab_math.limit=1")
    check(rows, "n=4", "+task.benchmark.lab_math.too_long=leave_out")
    rows["task.benchmark.lab_math.data.path"] = items[1:2]
    with pytest.raises(UserError, match=r"row 1 \(1 of 1 items\): longer than the"):
        check(rows, "n=4", "+task.benchmark.lab_math.too_long=leave_out")


def test_choices_of_a_chat_carry_no_tokens_of_the_model(check) -> None:
    items = [
        {"question": "?", "choices": {"text": [text, "salt"], "label": ["A", "B"]}, "answerKey": "A"}
        for text in ("iron", "iron<|end|>", "wood")
    ]
    rows = {"task.benchmark.lab_facts.data.path": items}
    check(rows, "n=4")
    with pytest.raises(
        UserError, match=r"task.benchmark.lab_facts: .*: row 2 \(1 of 3\): a choice carries the model's own tok"
    ):
        check(rows, "n=4", "task.benchmark.lab_facts.chat=true")


def test_what_was_found_is_remembered_once_nothing_is_refused(check, tmp_path: Path, monkeypatch) -> None:
    rows = {"task.data.path": pairs(*[1] * 20)}
    check(rows, "n=16")
    assert not (tmp_path / "out").exists()
    rehearsal.remember()
    kept = sorted((tmp_path / "out" / "fingerprints").glob("*.json"))
    assert {"samples": 16, "misfits": 0, "left_out": {}} in [json.loads(file.read_text()) for file in kept]
    monkeypatch.setattr(rehearsal, "_fates", {})
    monkeypatch.setattr(rehearsal, "_tokenizer", lambda *_: pytest.fail("tokenized again"))
    check(rows, "n=16")
    with pytest.raises(pytest.fail.Exception):
        check({"task.data.path": pairs(*[2] * 20)}, "n=16")


def test_a_plan_is_refused_by_a_process_without_torch(run, tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", pairs(*[1] * 13, *[300] * 3))
    done = run("-m", "task.data.path=pairs.jsonl", "n=4,16", "method=sft,dpo", "dry_run=true", code=2)
    assert "n=16: task=lab-math: only 13 of 16 rows fit recipe.max_length=256" in done.stderr
    assert "[2 of the grid's cells]" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_in_the_hub_s_cache_is_known_too(run, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tiny, tmp_path / "hub" / "models--someone--tiny" / "snapshots" / commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    write(tmp_path / "pairs.jsonl", pairs(*[1] * 13, *[300] * 3))
    write(tmp_path / "items.jsonl", [{"question": "how many cups " * 300, "answer": "#### 4"}])
    model = ["model.path=someone/tiny", f"+model.revision={commit}"]
    assert "only 13 of 16 rows fit" in run(*model, "task.data.path=pairs.jsonl", "n=16", code=2).stderr
    long = run(*model, "task.benchmark.lab_math.data.path=items.jsonl", "n=0", code=2).stderr
    assert "row 1 (1 of 1 items): longer than the" in long


def test_data_root_is_wanted_only_where_something_of_it_is_read(cell, monkeypatch) -> None:
    assert cell("scale=laptop", "task=lab_math", "model=lab", "m=0").config.data_root is None
    with pytest.raises(UserError, match="data_root=null"):
        cell("scale=laptop", "task=lab_math", "model=lab", "m=8")


# --- said ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_what_is_left_out_is_in_the_record_the_table_s_notes_the_page_and_results(
    cell, tiny: Path, tmp_path: Path
) -> None:
    rows = pairs(*[1] * 20, 300, 300)
    for index in (3, 4, 5):
        rows[index] |= {"full_rejected": STEPS["full_chosen"]}
    rows[6]["prompt"] = None
    write(tmp_path / "pairs.jsonl", rows)
    short = ["task.benchmark.lab_math.limit=2", "task.benchmark.lab_facts.limit=2", "method.epochs=1"]
    given = [f"model.path={tiny}", f"task.data.path={tmp_path / 'pairs.jsonl'}", "+task.data.empty=leave_out", *short]
    this, output = cell("method=dpo", "n=all", *given, f"output={tmp_path / 'out'}"), tmp_path / "out"
    counts = do(this).record(this.chain.adapt).data
    assert (counts.samples, counts.misfits) == (16, 2)
    assert counts.left_out == {"chosen equals rejected": 3, "empty": 1}
    add_to_manifest(output, this)
    text = " ".join(report.write(output, ["adhoc"]).split())
    for note in ("3 at most in a training: chosen equals rejected.", "2 at most in a training: too long"):
        assert note in text
        assert note in (output / "report" / "index.html").read_text()
    with (output / "report" / "results.csv").open() as file:
        assert {(r["misfits"], r["left_out"]) for r in csv.DictReader(file)} == {
            ("2", "chosen equals rejected: 3; empty: 1")
        }


# --- lists in files that have none ---------------------------------------------------------------------------------


def table(file: Path, rows: list[dict]) -> Path:
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def asked(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("spelling", [json.dumps, repr])  # pandas writes Python's
@pytest.mark.parametrize("prompt", ["{q}", None])
def test_conversations_in_cells_are_read_as_conversations(tmp_path: Path, tokenizer, spelling, prompt) -> None:
    row = ROW | {k: spelling(asked(ROW["q"], ROW[k])) for k in ("good", "bad")}
    task = task_of(table(tmp_path / "rows.csv", [row, row]), prompt=prompt)
    data.check_task(task, 2, 0, True)
    read = data.rows(task.data)[0]
    assert data.pair_example(tokenizer, task, read) == data.pair_example(tokenizer, task_of(), ROW)


def test_typed_parts_in_cells_are_joined(tokenizer) -> None:
    row = ROW | {"good": json.dumps([{"type": "text", "text": "An "}, {"type": "text", "text": "apple."}])}
    assert data.pair_example(tokenizer, task_of(), row) == data.pair_example(tokenizer, task_of(), ROW)


@pytest.mark.parametrize("value", [str(asked("q", "a")).replace("}, {", "}\n {"), repr(asked("q", "a"))[:-1] + ",,]"])
def test_a_conversation_in_a_cell_that_can_t_be_read_is_refused(tmp_path: Path, value: str) -> None:
    task = task_of(table(tmp_path / "rows.csv", [ROW, ROW | {"good": value}]))
    assert "row 2 (1 of 2): there is no text {good}" in told(task)


def test_a_conversation_in_a_cell_is_no_part_of_a_text(tmp_path: Path) -> None:
    row = ROW | {"good": json.dumps(asked("q", "a"))}
    task = task_of(table(tmp_path / "rows.csv", [ROW, row]), chosen="Answer: {good}")
    assert "row 2 (1 of 2): column good holds no text" in told(task)


@pytest.mark.parametrize(
    "text", ['[{"name": "f", "arguments": {}}]', "[{x}] is a set", "[1, 2]", '[{"role": "admin"}]', "[{'a"]
)
def test_other_lists_are_answers_as_they_stand(tmp_path: Path, tokenizer, text: str) -> None:
    task = task_of(table(tmp_path / "rows.csv", [ROW | {"good": text}]))
    data.check_task(task, 1, 0, True)
    example = data.pair_example(tokenizer, task, data.rows(task.data)[0])
    assert tokenizer.decode(example["prompt_ids"] + example["chosen_ids"]).endswith(f"<|assistant|>{text}<|end|>")


def test_a_part_of_a_text_is_not_its_letter(tmp_path: Path) -> None:
    task = task_of(table(tmp_path / "rows.csv", [ROW | {"good": "['An apple.']"}]), chosen="{good[0]}")
    assert "row 1 (1 of 1): there is no text {good[0]} (\"['An apple.']\" is a text, and {good[0]} names" in told(task)


@pytest.mark.parametrize("value", ["\u200b", "\ufeff ", "\u2060\u00ad"])
@pytest.mark.parametrize("column", list(ROW))
def test_what_nobody_sees_is_nothing(tmp_path: Path, column: str, value: str) -> None:
    file = write(tmp_path / "rows.jsonl", [ROW, ROW | {column: value}])
    assert f"row 2 (1 of 2): nothing in column {column}" in told(task_of(file))


def test_where_no_row_can_be_used_no_number_is_advised(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [ROW | {"bad": ROW["good"]}])
    assert told(task_of(file)).endswith("of which 0 can be used (left out: chosen equals rejected: 1): none is left")


@pytest.mark.parametrize("template", ["prompt", "chosen", "rejected"])
def test_a_column_s_name_without_braces_is_refused(tmp_path: Path, template: str) -> None:
    name = {"prompt": "q", "chosen": "good", "rejected": "bad"}[template]
    assert f"{name} is a column, as a template it is only this text: write {{{name}}}" in told(
        task_of(write(tmp_path / "rows.jsonl", [ROW]), **{template: name})
    )
