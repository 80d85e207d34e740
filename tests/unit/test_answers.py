"""The final answer of a text as a number or as a text: a table of what models and data sets write, and rules for all texts."""

import csv
import math
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2lora import data
from d2lora.scoring import KINDS, Generated, shown_metrics
from d2lora.scoring.answers import exact_text, final_number, gold_number, last_boxed, same_number, same_text
from d2lora.scoring.likelihood import LIKELIHOOD
from d2lora.scoring.rouge import rouge, rouge_of_any_script
from d2lora.settings import Benchmark, Data

SHARED = Path(__file__).parents[3] / "shared"

CASES = [
    (r"The answer is \boxed{18}.", 18),
    (r"\boxed{1,234}", 1234),
    (r"\boxed{1{,}234}", 1234),
    (r"\boxed{1\,234}", 1234),
    (r"\boxed{\$18}", 18),
    (r"\boxed{$18.50}", Fraction(37, 2)),
    (r"\boxed{18\%}", 18),
    (r"\boxed{18 \text{ dollars}}", 18),
    (r"\boxed{18\text{ eggs per day}}", 18),
    (r"\boxed{\text{18}}", 18),
    (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
    (r"\boxed{\dfrac{3}{4}}", Fraction(3, 4)),
    (r"\boxed{\tfrac34}", Fraction(3, 4)),
    (r"\boxed{-\frac{1}{2}}", Fraction(-1, 2)),
    (r"\boxed{1\frac{1}{2}}", Fraction(3, 2)),
    (r"\boxed{3/4}", Fraction(3, 4)),
    (r"\boxed{1 1/2}", Fraction(3, 2)),
    (r"\boxed{-5}", -5),
    ("\\boxed{\u22125}", -5),
    (r"\boxed{+5}", 5),
    (r"\boxed{.5}", Fraction(1, 2)),
    (r"\boxed{0.50}", Fraction(1, 2)),
    (r"\boxed{18.0}", 18),
    (r"\boxed{x = 18}", 18),
    (r"\boxed{2 + 3 = 5}", 5),
    (r"\boxed{\mathrm{18\ km}}", 18),
    (r"First \boxed{3}, so in all \boxed{18}.", 18),
    (r"\boxed{\text{a box {of} 18}}", 18),
    (r"\boxed{3 \times 10^2}", 300),
    (r"\boxed{3 \times 10^{-2}}", Fraction(3, 100)),
    (r"\boxed{18} and then 25 more words", 18),
    (r"\fbox{3} \boxed{ 18 }", 18),
    (r"\boxed{\frac{1,000}{4}}", 250),
    ("Janet makes 9 * 2 = 18 dollars.\n#### 18", 18),
    ("#### 1,234", 1234),
    ("#### -7", -7),
    ("The answer is 18.", 18),
    ("The answer is $1,234.56 per week.", Fraction(123456, 100)),
    ("So she has 18 eggs", 18),
    ("That is 20% of 90, which makes 18 eggs.", 18),
    ("It costs \u20ac18.", 18),
    ("She sold 3, 4 and then 18", 18),
    (r"Unfinished \boxed{18", 18),
    (r"\boxed{18/hour}", 18),
    (r"\boxed{\$18/\text{hour}}", 18),
    ("The answer is $15/hour.", 15),
    (r"\boxed{18} \boxed{}", 18),
    (r"\boxed{}", None),
    ("no number at all", None),
    ("", None),
    (r"\boxed{\text{none}}", None),
    (r"\boxed{1/0}", None),
]


def table(file: Path) -> list[tuple[str, Fraction | None]]:
    with file.open(newline="") as lines:
        return [(r["text"], None if r["right"] == "none" else Fraction(r["right"])) for r in csv.DictReader(lines)]


OWN = table(Path(__file__).parents[1] / "answers.csv")
assert len(OWN) > 300


@pytest.mark.parametrize(("text", "number"), CASES + OWN)
def test_the_final_answer_is_read_as_a_number(text: str, number: object) -> None:
    assert final_number(text) == number


def test_an_absurd_power_of_ten_is_no_number_and_takes_no_time() -> None:
    assert final_number(r"\boxed{3 \times 10^{99999999999}}") is None
    assert final_number(r"\boxed{3 \times 10^{4}}") == 30_000


def test_nested_braces_of_the_last_box_are_balanced() -> None:
    assert last_boxed(r"\boxed{1} \boxed{\frac{a}{\text{b}}} end") == r"\frac{a}{\text{b}}"
    assert last_boxed("no box") is None


def test_rouge_of_equal_and_of_unrelated_titles() -> None:
    assert set(rouge("Gains from Trade", "Gains from Trade").values()) == {1.0}
    assert set(rouge("apples", "Gains from Trade").values()) == {0.0}
    assert rouge("gain from trades", "Gains from Trade")["rouge1"] == 1.0, "stemming is on"


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared: known cases of this project's developers")
def test_known_cases_are_read_right() -> None:
    for text, number in table(SHARED / "cases" / "answers.csv"):
        assert final_number(text) == number, text


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared: GSM8K")
@pytest.mark.parametrize("wrapped", ["#### {}", "A: {}", "The answer is {}.", "\\boxed{{{}}}", "**Answer: ${}**", "{}"])
def test_every_solution_of_gsm8k_ends_on_its_number(wrapped: str) -> None:
    rows = [r for s in ("test", "train") for r in data.rows(Data(path=str(SHARED / "data" / "gsm8k"), split=s))]
    for row in rows if wrapped.startswith("####") else rows[::7]:
        steps, _, gold = row["answer"].rpartition("#### ")
        assert final_number(steps + wrapped.format(gold)) == Fraction(gold.replace(",", "")), row


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("0,25", "#### 0,75"), ("1 000", "1 500"), ("2", "2^{10}"), ("2", r"2\sqrt{3}"), ("2", "(2, 8)"), ("2", "2:30"), ("2", r"2!\cdot 3"),
        ("13", r"3\sqrt{13}"), ("3", r"3\sqrt{13}"), ("50%", "0.5"), ("0.333333", "1/3"), ("1234567.89", "1234567.88"),
        ("18", "18 or 20"), (r"\boxed{18} or \boxed{20}", "18"), (r"\boxed{18} or \boxed{20}", "20"), ("", ""), ("1e-17", "0"),
    ],
)  # fmt: skip
def test_what_differs_is_not_equal(answer: str, gold: str) -> None:
    assert not same_number(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("0.6666666666666667", "0.6666666666666666"), ("0.6666666666666667", "2/3"), (r"\boxed{\frac{50}{3}}", "16.666667"),
        (r"\boxed{3\sqrt{13}}", r"3 \sqrt{13}"), ("(3, 4]", r"\boxed{(3,4]}"), ("18.0", "18"), (r"\boxed{1{,}234}", "#### 1,234"),
    ],
)  # fmt: skip
def test_what_is_the_same_is_equal(answer: str, gold: str) -> None:
    assert same_number(answer, gold)
    assert same_number(gold, answer)


def test_a_phrase_that_a_box_would_give_another_number_is_no_gold() -> None:
    assert gold_number("18 eggs in 3 days") is None
    assert gold_number("- 18 dollars") == 18
    assert gold_number("She had 20 eggs.\nShe sold 2.\nSo 18 are left.") == 18


LETTERS = st.text(st.sampled_from("0123456789.,+-*/^!=()[]{}$%:;| \n\\abxi" + "\u00bd\u00b2\u2212"), max_size=30)
PIECES = st.lists(
    st.sampled_from(
        [r"\frac{1}{2}", r"\sqrt{2}", r"\boxed{", "}", r"\text{", " or ", " and ", "18", "1,000", "2.5", "-", "####", "answer is ", "three", " eggs ", "x", "=", r"\pi"]
    ),
    max_size=8,
).map("".join)  # fmt: skip


@given(LETTERS | PIECES | st.text(max_size=40))
def test_an_accepted_gold_and_the_identical_answer_are_equal(text: str) -> None:
    """In a box, behind "The answer is" and alone, for golds that are not themselves such texts."""
    gold = gold_number(text)
    if gold is None:
        return
    assert final_number(text) == gold
    assert same_number(text, text)
    short = (
        len(text) < 60 and "\n" not in text and not any(mark in text for mark in ("boxed", "####", "answer", "{", "}"))
    )
    if short and not text.strip().startswith("-"):  # a bullet
        assert final_number(rf"\boxed{{{text}}}") in (gold, None), "another number"


@given(LETTERS | PIECES | st.text(max_size=60))
def test_any_text_is_read_without_an_error(text: str) -> None:
    final_number(text)
    assert exact_text(text) == exact_text(text.upper().lower()) or not text.isascii()
    assert same_text(text, text) == bool(exact_text(text))


NUMBERS = st.fractions(min_value=-(10**12), max_value=10**12, max_denominator=10**4)
DECIMALS = st.decimals(min_value=-(10**9), max_value=10**9, places=3, allow_nan=False)


@given(
    NUMBERS,
    st.sampled_from(
        ["{}", r"\boxed{{{}}}", "The answer is {}.", "#### {}", r"\boxed{{x = {}}}", "**{}**", "${}$", "so {} eggs"]
    ),
)
def test_fractions_are_read_as_they_are_written(number: Fraction, wrapped: str) -> None:
    sign, top, below = "-" * (number < 0), abs(number.numerator), number.denominator
    spelled = [f"{sign}{top}/{below}", rf"{sign}\frac{{{top}}}{{{below}}}", rf"{sign}\dfrac{{{top:,}}}{{{below:,}}}"]
    if below > 1 and top > below:
        spelled += [
            f"{sign}{top // below} {top % below}/{below}",
            rf"{sign}{top // below}\frac{{{top % below}}}{{{below}}}",
        ]
    for text in spelled:
        assert final_number(wrapped.format(text)) == number, text


@given(
    DECIMALS,
    st.sampled_from(
        ["{}", r"\boxed{{{}}}", "The answer is {}.", "A: {}", "It costs {}", r"\boxed{{{}\text{{ km}}}}", "\\({}\\)"]
    ),
)
def test_decimals_are_read_as_they_are_written(number: Decimal, wrapped: str) -> None:
    for text in (
        f"{number:f}",
        f"{number:,f}",
        f"{number:,f}".replace(",", "{,}"),
        f"{number:,f}".replace(",", " "),
        f"{number:f}".replace("-", "\u2212"),
    ):
        assert final_number(wrapped.format(text)) == Fraction(number), text


@pytest.mark.parametrize(
    "piece",
    ["1", "(", "{", "\\boxed{", "1,", "- ", "-", "\\text{", "\\frac12+", "five or ", "5 million ", "=", "!", "$1", "<<", "answer ", "#### ", "2^", "18 or ", "\n- ", '"', " "],
)  # fmt: skip
def test_long_answers_take_no_time(piece: str) -> None:
    text = piece * (40_000 // len(piece)) + "z"
    start = time.perf_counter()
    final_number(text)
    exact_text(text)
    assert time.perf_counter() - start < 10, "what grows with the square of the length takes minutes"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("The answer is Paris.", "paris"), (r"\boxed{\text{New York}}", "New  York"), ("**Answer:** 3:30", "3:30"), ('"Yes!"', "yes"),
        (r"so it is $\boxed{3\sqrt{13}}$", r"3\sqrt{13}"), (r"\boxed{\dfrac{\pi}{2}}", r"\frac{\pi}{2}"), ("#### B", "b"), ("(3, 4]", "(3,4]"),
        ("\uff21\uff22", "ab"), (r"\boxed{\left(2,8\right)}", "(2, 8)"),
    ],
)  # fmt: skip
def test_texts_are_the_same_but_for_case_spaces_and_wrapping(answer: str, gold: str) -> None:
    assert same_text(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("5!", "5"),
        ("x\u00b2", "x2"),
        ("(3,4)", "(3,4]"),
        ("-5", "5"),
        ("", ""),
        (r"\boxed{}", "$"),
        (".5", "5"),
        ("18", "18.0"),
    ],
)
def test_texts_that_differ_are_not_the_same(answer: str, gold: str) -> None:
    assert not same_text(answer, gold)


@pytest.mark.parametrize(
    "text",
    ["1 1/2 million", "1/2 million", "2½ million", r"\boxed{1\frac{1}{2} million}", "half a million", "one and a half million", "1.2-million", "1.2 lakh", "3 crore", "5 mln"],
)  # fmt: skip
def test_a_power_in_words_that_is_not_read_leaves_no_other_number(text: str) -> None:
    assert final_number(text) is None
    assert gold_number(text) is None
    assert same_number(text, text)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if isinstance(kind, Generated)], ids=lambda kind: kind.name)
def test_a_kind_gives_its_metrics_and_the_best_gold_counts(kind: Generated) -> None:
    right, wrong = kind.score("18 eggs", ["7", "18 eggs"]), kind.score("18 eggs", ["7"])
    assert (tuple(right), tuple(wrong)) == (kind.metrics, kind.metrics)
    assert (set(right.values()), set(wrong.values())) == ({1.0}, {0.0})
    assert kind.problem("18 eggs") is None


@pytest.mark.parametrize(
    ("answer", "gold", "rouge1"),
    [
        ("Экономика России", "Экономика России", 1.0),
        ("Политика Китая 2020", "Экономика России 2020", 1 / 3),  # of equal years alone rouge-score makes 1
        ("экономика «России»", "Экономика России", 1.0),
        ("北京天气", "北京的天气", 8 / 9),  # characters
        ("東京タワー", "東京タワー", 1.0),
        ("ภาษาไทย", "ภาษาไทย", 1.0),
        ("हिन्दी भाषा", "हिन्दी में", 0.5),
        ("محمد", "مُحَمَّد", 1.0),  # vowel points are optional
        ("Größe", "Grün", 0.0),  # rouge-score's words of both begin with "gr"
        ("ÉCOLE", "école", 1.0),
        ("gain from trades", "Gains from Trade", 1.0),
    ],
)  # fmt: skip
def test_rouge_of_any_script_has_words_of_every_script(answer: str, gold: str, rouge1: float) -> None:
    assert rouge_of_any_script(answer, gold)["rouge1"] == pytest.approx(rouge1)


@pytest.mark.parametrize("answer", ["Well-known cats don't run_fast, 3.5 %", "A\nB, the 2nd one.", "", "(x+1)^2"])
@pytest.mark.parametrize("gold", ["well known cat doesn't run fast", "b: The 2nd ones\na", "x 1 2"])
def test_rouge_of_any_script_is_rouge_for_english(answer: str, gold: str) -> None:
    assert rouge_of_any_script(answer, gold) == rouge(answer, gold)


def test_a_report_shows_the_first_metric_and_all_of_rouge() -> None:
    shown = {kind.name: tuple(shown_metrics(kind.metrics)) for kind in KINDS}
    likelihood = {"likelihood": ("loglikelihood_per_byte",)}
    rouge_ = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    assert shown == {"number": ("accuracy",), "exact": ("accuracy",), "rouge": rouge_, "choice": ("acc",), **likelihood}
    assert shown_metrics(["bleu", "bleu_max", "rouge1_max"]) == ["bleu", "rouge1_max"], "a task of the harness"


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("He has 3 + 4 = <<3+4=7>>7 eggs.\n#### 7", "He has 3 + 4 = 7 eggs."),
        ("Step 1: 2 * 2 = 4.\n#### 4\n", "Step 1: 2 * 2 = 4."),
        ("#### Step 1\nadd them: 4", "#### Step 1\nadd them: 4"),
        ("a << b", "a << b"),
        (" 4", " 4"),
    ],
)
def test_a_solution_is_a_gold_without_what_gsm8k_writes_around_it(gold: str, text: str) -> None:
    assert LIKELIHOOD.solution(gold) == text
    assert LIKELIHOOD.problem(gold) is None


def test_a_likelihood_is_in_bits_for_each_byte_of_the_text() -> None:
    assert LIKELIHOOD.score(-math.log(2) * 6, "né\n") == {"loglikelihood_per_byte": -1.5}


def test_a_kind_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="Input should be 'number', 'exact', 'rouge', 'choice' or 'likelihood'"):
        Benchmark(data=Data(path="x"), kind="bleu", prompt="{q}", gold="{a}")
