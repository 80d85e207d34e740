"""Rows of a benchmark: what can be asked and scored, and one line for all rows that can not."""

import json
from pathlib import Path

import pytest

from d2lora import data
from d2lora.errors import UserError
from d2lora.settings import Benchmark, Data, fields


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
            return str(error).partition("test.jsonl: ")[2]
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
        (
            {"q": '[{"role": "user", "content": "?"}]', "a": "18"},
            "prompt={q}: '[{\"role\": \"user\", \"content\": \"?\"}]' is a list that is written out",
        ),
    ],
)  # fmt: skip
def test_a_value_that_is_no_text_is_neither_asked_nor_scored(check, row: dict, told: str) -> None:
    good = {"q": "?", "a": "18"}
    assert check([good, row, good, row]) == f"rows 2, 4 (2 of 4): {told}"
    assert check([good, row], limit=1) is None, "the row is not asked"


def test_rows_with_other_problems_are_told_apart_in_one_line(check) -> None:
    line = check([{"q": " ", "a": "1"}, {"q": "?", "a": "eggs"}, {"q": "?", "a": None}])
    assert [part.split(":")[0] for part in line.split("; ")] == ["row 1", "row 2", "row 3"]


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


@pytest.mark.parametrize("gold", ["\u5317\u4eac", "!?", "\u041c\u043e\u0441\u043a\u0432\u0430"])
def test_a_gold_that_rouge_can_t_read_is_refused(check, gold: str) -> None:
    good = {"q": "?", "a": "Beijing"}
    assert check([good, good | {"a": gold}], kind="rouge").startswith(
        f"row 2: the gold answer {gold!r} has no Latin letter and no digit"
    )
    assert check([good, good | {"a": [gold, "x"]}], kind="rouge").startswith("row 2: the gold answer")
    if gold != "!?":
        assert check([good | {"a": gold}], kind="exact") is None


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
