from fractions import Fraction

import pytest

from d2lora.answers import final_number, last_boxed, rouge

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
    (r"\boxed{10,20}", 10),
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


@pytest.mark.parametrize(("text", "number"), CASES)
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
