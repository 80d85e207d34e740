"""Rows of a benchmark: what can be asked and scored, and one line for all rows that can not."""

import json
from pathlib import Path

import pytest

from d2lora import data
from d2lora.errors import UserError
from d2lora.settings import Benchmark, Data, fields

ADVICE = "; data.empty=leave_out in the benchmark's file leaves out items without a prompt or gold"


@pytest.fixture
def check(tmp_path: Path):
    """check(rows, kind="rouge", ...) -> None if the benchmark over the rows is accepted, else the line that refuses it."""

    def of(rows: list[dict], **more) -> str | None:
        file = tmp_path / "test.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"kind": "number", "prompt": "{q}", "gold": "{a}"} | more
        try:
            data.check_benchmark(Benchmark(data=Data(path=str(file)), **given), 0)
        except UserError as error:
            return str(error).partition("test.jsonl: ")[2].removesuffix(ADVICE)
        return None

    return of


def test_golds_that_are_no_number_are_one_line_with_their_rows_and_what_fits(check) -> None:
    golds = ["18", r"3\sqrt{13}", "(3, 4]", "20", "6+9i", r"288\pi", "18 or 20"]
    line = check([{"q": "?", "a": gold} for gold in golds])
    assert "\n" not in line
    assert line.startswith("rows 2, 3, 5 and 2 more (5 of 7): the gold answer ")
    assert "'3\\\\sqrt{13}', '(3, 4]', '6+9i' is not a number" in line
    assert "kind: exact" in line
    assert check([{"q": "?", "a": gold} for gold in golds], kind="exact") is None


@pytest.mark.parametrize(
    "gold",
    ["0,25", "10,20", "3:30", "3:4", "10-20", "", "  ", "none", "5!", "18 eggs in 3 days", "1e400", "two or three"],
)
def test_a_gold_without_one_sure_number_is_refused(check, gold: str) -> None:
    assert "row 1: the gold answer" in check([{"q": "?", "a": gold}])


@pytest.mark.parametrize(
    "gold", ["18", "1,234", r"\frac{1}{2}", "2½", "#### 18", r"so \boxed{18}", 18, 1.5, "- 18 dollars", "5 million"]
)
def test_a_gold_with_one_is_accepted(check, gold: object) -> None:
    assert check([{"q": "?", "a": gold}]) is None


@pytest.mark.parametrize("kind", ["number", "exact", "rouge"])
def test_several_golds_are_a_list_of_texts(check, kind: str) -> None:
    assert check([{"q": "?", "a": ["18", "18.0"]}, {"q": "?", "a": "20"}], kind=kind) is None
    assert check([{"q": "?", "a": {"text": ["18", "18.0"]}}], kind=kind, gold="{a[text]}") is None
    assert "row 2: the list of golds is empty" in check([{"q": "?", "a": ["18"]}, {"q": "?", "a": []}], kind=kind)
    assert "row 1: the list of golds ['18', None] holds what is no text" in check(
        [{"q": "?", "a": ["18", None]}], kind=kind
    )
    assert "row 1: the list of golds [['18']] holds what is no text" in check([{"q": "?", "a": [["18"]]}], kind=kind)
    assert "row 1: the gold answer is blank" in check([{"q": "?", "a": ["18", " "]}], kind=kind)


def test_of_several_golds_each_must_be_a_number(check) -> None:
    assert "row 1: the gold answer 'many' is not a number" in check([{"q": "?", "a": ["18", "many"]}])


def test_golds_of_a_list_are_filled_in_one_by_one() -> None:
    benchmark = Benchmark(data=Data(path="x"), kind="number", prompt="{q}", gold="#### {a}")
    assert data.golds(benchmark, {"a": ["1", 2]}) == ["#### 1", "#### 2"]
    assert data.golds(benchmark, {"a": [{"type": "text", "text": "1"}]}) == ["#### 1"], "one text in parts"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"q": None, "a": "18"}, "prompt={q}: None is no text"),
        ({"q": ["a", "b"], "a": "18"}, "prompt={q}: ['a', 'b'] is no text"),
        ({"q": True, "a": "18"}, "prompt={q}: True is no text"),
        ({"q": " ", "a": "18"}, "the prompt is blank"),
        ({"q": "?", "a": None}, "gold={a}: None is no text"),
        ({"q": "?", "a": {"text": "18"}}, "gold={a}: {'text': '18'} is no text"),
        ({"q": "\u200b", "a": "18"}, "the prompt is blank"),
        ({"q": "?", "a": "\ufeff"}, "the gold answer is blank"),
    ],
)  # fmt: skip
def test_a_value_that_is_no_text_is_neither_asked_nor_scored(check, row: dict, told: str) -> None:
    good = {"q": "?", "a": "18"}
    assert check([good, row, good, row]) == f"rows 2, 4 (2 of 4): {told}"
    assert check([good, row], limit=1) is None, "the row is not asked"


def test_rows_with_other_problems_are_told_apart_in_one_line(check) -> None:
    line = check([{"q": " ", "a": "1"}, {"q": "?", "a": "eggs"}, {"q": "?", "a": None}])
    assert [part.split(":")[0] for part in line.split("; ")] == ["row 1", "row 2", "row 3"]


@pytest.mark.parametrize(
    "row", [{"q": None, "a": "1"}, {"q": " ", "a": "1"}, {"q": "?", "a": None}, {"q": "?", "a": []}]
)
def test_items_without_a_prompt_or_gold_are_refused_or_left_out_and_counted(tmp_path: Path, row: dict) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ({"q": "?", "a": "1"}, row, {"q": "??", "a": "2"})))
    given = {"kind": "number", "prompt": "{q}", "gold": "{a}"}
    with pytest.raises(UserError, match=r"row 2: .*data\.empty=leave_out"):
        data.check_benchmark(Benchmark(data=Data(path=str(file)), **given), 0)
    lenient = Benchmark(data=Data(path=str(file), empty="leave_out"), **given)
    data.check_benchmark(lenient, 0)
    chosen = data.item_rows(lenient, data.rows(lenient.data), lambda row: False)
    assert (chosen.rows, chosen.left_out) == ([0, 2], {"empty": 1})
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"all 1 items are left out \(empty\)"):
        data.check_benchmark(lenient, 0)


def test_an_attribute_in_a_template_is_refused_with_what_is_meant() -> None:
    for template, meant in (("{answers.text}", "{answers[text]}"), ("{a[b].c}", "{a[b][c]}")):
        with pytest.raises(ValueError, match="names an attribute") as error:
            fields(template)
        assert f"{meant} is meant" in str(error.value)
    assert fields("{a[b.c]} {d:.2f}") == {"a", "d"}


CHOICE = {"kind": "choice", "gold": "{a}", "choices": "c.text", "labels": "c.label"}


@pytest.mark.parametrize(
    ("text", "label", "gold", "told"),
    [
        (["x", "y"], ["A", "B"], "B", None),
        ([1, 2.5], [1, 2], 2, None),
        (["x", "y"], [1, 2], "1", None),
        (["x", "y"], ["1", "2"], 2, None),
        (["x", "y"], ["A", "B"], "C", "the gold label 'C' is none of A, B"),
        ([], [], "A", "the list c.text is empty"),
        (["x", None], ["A", "B"], "A", "c.text holds what is no text: None"),
        (["x", {"text": "y"}], ["A", "B"], "A", "c.text holds what is no text: {'text': 'y'}"),
        (["x", ["y"]], ["A", "B"], "A", "c.text holds what is no text: ['y']"),
        (["x", "y"], ["A", None], "A", "c.label holds what is no text: None"),
        (["x", "x "], ["A", "B"], "A", "c.text holds 'x' more than once"),
        (["x", "y"], ["A", "A"], "A", "c.label holds 'A' more than once"),
        (["x", ""], ["A", "B"], "A", "c.text holds a blank text"),
        (["x"], ["A", "B"], "A", "1 c.text, but 2 c.label"),
        ("xy", ["A", "B"], "A", "no list c.text"),
        (None, ["A", "B"], "A", "no list c.text"),
        (["x", "y"], ["A", "B"], None, "gold={a}: None is no text"),
        (["x", "y"], ["A", "B"], True, "gold={a}: True is no text"),
    ],
)  # fmt: skip
def test_choices_are_texts_each_once_and_one_is_right(check, text, label, gold, told: str | None) -> None:
    row = {"q": "?", "a": gold, "c": {"text": text, "label": label}}
    assert check([row], **CHOICE) == (told and f"row 1: {told}")


def test_choices_and_the_right_one_are_read_as_texts() -> None:
    benchmark = Benchmark(data=Data(path="x"), prompt="{q}", **CHOICE)
    row = {"q": "?", "a": 2, "c": {"text": [1, 2.5], "label": [1, 2]}}
    assert (data.choices(benchmark, row), data.right_choice(benchmark, row)) == (["1", "2.5"], 1)


@pytest.mark.parametrize("gold", ["\u5317\u4eac", "\u041c\u043e\u0441\u043a\u0432\u0430", "\u042d\u043a\u043e\u043d\u043e\u043c\u0438\u043a\u0430 2020"])  # fmt: skip
def test_a_gold_that_rouge_can_t_read_is_refused(check, gold: str) -> None:
    good = {"q": "?", "a": "Beijing"}
    told = f"row 2: the gold answer {gold!r} is in another script than Latin"
    assert check([good, good | {"a": gold}], kind="rouge").startswith(told)
    assert "script: any" in check([good | {"a": [gold, "x"]}], kind="rouge")
    assert check([good, good | {"a": gold}], kind="rouge", script="any") is None
    assert check([good | {"a": gold}], kind="exact") is None


@pytest.mark.parametrize("script", ["latin", "any"])
def test_a_gold_without_a_word_is_refused(check, script: str) -> None:
    assert check([{"q": "?", "a": "!?"}], kind="rouge", script=script).startswith(
        "row 1: the gold answer '!?' has no word"
    )


@pytest.mark.parametrize("gold", ["2020", "The \u03b2 of stocks", "\u00c9cole \u00e0 \u00c9vreux", "Caf\u00e9"])
def test_golds_with_a_few_other_letters_are_read_as_before(check, gold: str) -> None:
    assert check([{"q": "?", "a": gold}], kind="rouge") is None


def test_a_script_is_of_rouge_alone() -> None:
    with pytest.raises(ValueError, match="only kind rouge"):
        Benchmark(data=Data(path="x"), prompt="{q}", gold="{a}", kind="exact", script="any")


# --- prompts of several turns ----------------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "What is 9 + 9?"}
HISTORY = [SYSTEM, {"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}, QUESTION]


def benchmark_of(**given) -> Benchmark:
    return Benchmark.model_validate({"data": {"path": "x"}, "kind": "number", "prompt": "{q}", "gold": "{a}"} | given)


def test_turns_in_the_benchmark_s_file_are_its_prompt(check) -> None:
    turns = [SYSTEM, {"role": "user", "content": "{q}"}]
    row = {"q": "What is 9 + 9?", "a": "18"}
    assert data.item_prompt(benchmark_of(prompt=turns), row) == [SYSTEM, QUESTION]
    assert check([row, row], prompt=turns) is None
    assert check([row, row | {"q": " "}], prompt=turns) == "row 2: the prompt is blank"


@pytest.mark.parametrize("written", [lambda turns: turns, json.dumps, repr])
def test_a_column_of_turns_is_the_prompt_with_its_history(check, written) -> None:
    row = {"q": written(HISTORY), "a": "18"}
    assert data.item_prompt(benchmark_of(), row) == HISTORY
    assert check([row]) is None
    assert "needs chat: true" in check([row], chat=False)
    assert "is a list that is written out" in check([row | {"q": json.dumps(HISTORY)}], prompt="Ask: {q}")


def test_turns_that_ask_nothing_are_refused(check) -> None:
    answered = [QUESTION, {"role": "assistant", "content": "18"}]
    assert (
        check([{"q": answered, "a": "18"}]) == "row 1: prompt={q} ends with a turn of the assistant: nothing is asked"
    )
    assert "turn 1" in check([{"q": [{"role": "nobody", "content": "?"}], "a": "18"}])
    with pytest.raises(ValueError, match="ends with a turn of the assistant"):
        benchmark_of(prompt=[{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "18"}])
    with pytest.raises(ValueError, match="chat=false"):
        benchmark_of(prompt=[{"role": "user", "content": "{q}"}], chat=False)


# --- choices as people have them -------------------------------------------------------------------------------------

LETTERS = ["A", "B", "C"]
LETTERED = "{q}\nA. {A}\nB. {B}\nC. {C}"
COLUMNS = {"q": "Which is red?", "A": "snow", "B": "blood", "C": "grass"}


@pytest.mark.parametrize(
    ("row", "more", "texts", "right"),
    [
        (COLUMNS | {"a": "B"}, {"prompt": LETTERED, "choices": LETTERS}, LETTERS, 1),
        (COLUMNS | {"a": "B"}, {"choices": ["{A}", "{B}", "{C}"], "labels": LETTERS}, ["snow", "blood", "grass"], 1),
        (COLUMNS | {"a": "blood"}, {"choices": ["{A}", "{B}", "{C}"]}, ["snow", "blood", "grass"], 1),
        (COLUMNS | {"a": "B", "C": None}, {"choices": ["{A}", "{B}", "{C}"], "labels": LETTERS}, ["snow", "blood"], 1),
        ({"q": "?", "a": 1, "c": ["snow", "blood"]}, {"choices": "c", "labels": [0, 1, 2, 3]}, ["snow", "blood"], 1),
        ({"q": "?", "a": "1", "c": ["snow", "blood"]}, {"choices": "c", "labels": [0, 1]}, ["snow", "blood"], 1),
        ({"q": "?", "a": 2.0, "c": ["snow", "blood"]}, {"choices": "c", "labels": [1, 2]}, ["snow", "blood"], 1),
        ({"q": "?", "a": "blood", "c": ["snow", "blood"]}, {"choices": "c"}, ["snow", "blood"], 1),
        ({"q": "?", "a": True}, {"choices": ["no", "yes"], "labels": [False, True]}, ["no", "yes"], 1),
        ({"q": "?", "a": "True"}, {"choices": ["no", "yes"], "labels": [False, True]}, ["no", "yes"], 1),
        ({"q": "?", "a": False}, {"choices": ["no", "yes"], "labels": [False, True]}, ["no", "yes"], 0),
        ({"q": "?", "a": 2}, {"choices": [1, 2, 3, 4, 5]}, ["1", "2", "3", "4", "5"], 1),
        ({"q": "?", "a": 1}, {"choices": ["bad", "good"], "labels": [0, 1]}, ["bad", "good"], 1),
        ({"q": "?", "a": True, "c": ["x", "y"], "l": [False, True]}, {"choices": "c", "labels": "l"}, ["x", "y"], 1),
    ],
)  # fmt: skip
def test_choices_as_people_have_them(check, row: dict, more: dict, texts: list[str], right: int) -> None:
    assert check([row], kind="choice", **more) is None
    benchmark = benchmark_of(kind="choice", **more)
    assert (data.choices(benchmark, row), data.right_choice(benchmark, row)) == (texts, right)


@pytest.mark.parametrize(
    ("row", "more", "told"),
    [
        (COLUMNS | {"a": "D"}, {"prompt": LETTERED, "choices": LETTERS}, "the gold label 'D' is none of A, B, C"),
        (COLUMNS | {"a": "C", "C": None}, {"choices": ["{A}", "{B}", "{C}"], "labels": LETTERS}, "the gold label 'C' is none of A, B"),
        (COLUMNS | {"a": "A", "B": None, "C": ""}, {"choices": ["{A}", "{B}", "{C}"], "labels": LETTERS}, "only one choice is offered"),
        (COLUMNS | {"a": "A", "B": "snow"}, {"choices": ["{A}", "{B}", "{C}"], "labels": LETTERS}, "choices holds 'snow' more than once"),
        (COLUMNS | {"a": "A", "B": ["x"]}, {"choices": ["{A}", "{B}"], "labels": ["A", "B"]}, "choices={B}: ['x'] is no text"),
        ({"q": "?", "a": 2, "c": ["snow", "blood"]}, {"choices": "c", "labels": [0, 1, 2]}, "the gold label '2' is none of 0, 1"),
        ({"q": "?", "a": 0, "c": ["x", "y", "z"]}, {"choices": "c", "labels": [0, 1]}, "3 c, but 2 labels"),
        ({"q": "?", "a": True}, {"choices": ["no", "yes"]}, "gold={a}: True is no text"),
        ({"q": "?", "a": None}, {"choices": ["no", "yes"]}, "gold={a}: None is no text"),
    ],
)  # fmt: skip
def test_choices_that_are_none_or_of_which_none_is_right_are_refused(check, row: dict, more: dict, told: str) -> None:
    assert check([row], kind="choice", **more) == f"row 1: {told}"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"choices": [True, False]}, "YAML reads yes, no, true and false as truth values"),
        ({"choices": ["x", "y"], "labels": ["A"]}, "labels"),
        ({"choices": ["x", "y"], "labels": ["A", "B", "C"]}, "2 choices, but 3 labels"),
        ({"choices": ["x", "y"], "labels": ["A", "A"]}, "A names several choices"),
        ({"choices": ["x"]}, "choices"),
        ({}, "kind choice needs choices"),
    ],
)  # fmt: skip
def test_choices_that_no_row_could_have_are_refused_in_the_settings(more: dict, told: str) -> None:
    with pytest.raises(ValueError, match=r"choice|label") as error:
        benchmark_of(kind="choice", **more)
    assert told in str(error.value)


def test_columns_of_listed_choices_are_looked_for(check) -> None:
    assert "write {A}" in check([COLUMNS | {"a": "A"}], kind="choice", choices=LETTERS)
    assert "missing column B" in check([{"q": "?", "a": "A", "A": "x"}], kind="choice", choices=["{A}", "{B}"])


def test_an_index_into_a_text_is_no_gold(check) -> None:
    assert check([{"q": "?", "a": ["18"]}], gold="{a[0]}") is None
    assert (
        check([{"q": "?", "a": "18"}], gold="{a[0]}")
        == "row 1: gold={a[0]}: '18' is a text, and {a[0]} names a part of it"
    )


def test_a_cluster_column_that_no_row_has_is_refused(check) -> None:
    rows = [{"q": "?", "a": 1, "passage": "x"}, {"q": "?", "a": 2, "passage": None}]
    assert check(rows, cluster="passage") is None
    assert "chapter" in check(rows, cluster="chapter")
