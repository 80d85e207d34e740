"""Cut a text into numbers, operators, LaTeX commands, words and units."""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from d2lora.scoring.numbers.spelling import CLOSE, OPEN

# Where a text was found: in a box, in a line after "####", after "answer is", or in a text without any such mark.
Where = Literal["box", "line", "sentence", "text"]

DIGITS = 300  # of a number at most: no answer has more, and powers of such numbers would take forever to compute


@dataclass(frozen=True)
class Number:
    """An exact value; `rounded` if it was written as a decimal of more than six digits, which may carry float noise."""

    value: Fraction
    rounded: bool = False

    def __eq__(self, other: object) -> bool:
        """Compare as fractions; within 1e-6 relative where one of them is rounded."""
        if not isinstance(other, Number):
            return NotImplemented
        a, b = self.value, other.value
        if a == b or not (self.rounded or other.rounded):
            return a == b
        return abs(a - b) * 10**6 <= max(abs(a), abs(b))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Token:
    """A token.

    Its kind is number, unclear (digits without one reading), letter (a variable), command, word, unit, op, break or
    end.
    """

    kind: str
    text: str
    space: bool = False  # whether white space comes before it
    number: Number | None = None
    upright: bool = False  # in \text{...}, where single letters are no variables


# --- tokens --------------------------------------------------------------------------------------------------------

_PLAIN = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:(?:,\d{3})+|(?:'\d{3})+|(?: \d{3})+)(?:\.\d+)?")
_SPACED = re.compile(r"[1-9]\d{0,2}(?: \d{3})+(?![\d']|,\d|\s?/)(?:\.\d+)?(?![.,]\d)")
_SCAN = re.compile(
    r"(?P<space>\s+)|(?P<number>(?:\d+|(?<![\w.])\.\d+)(?:[.,']\d+)*)|(?P<command>\\[a-zA-Z]+|\\.)"
    r"|(?P<word>[^\W\d_]+)|(?P<op>.)",
    re.DOTALL,
)
_EXPONENT = re.compile(r"[eE]([+-]?\d{1,5})(?![\w.])")
_MATHEMATICS = {"pi", "sqrt", "sin", "cos", "tan", "ln", "infinity"}  # words that are part of an expression
BEFORE_NUMBERS = {"rs", "usd", "eur", "gbp", "inr", "chf", "cad", "aud", "no", "nr"}


def tokens_of(text: str, where: Where) -> list[Token]:
    """Cut a text into tokens."""
    tokens: list[Token] = []
    index, space, upright = 0, False, 0
    while index < len(text):
        match = _SCAN.match(text, index)
        assert match is not None, "any character is a token"
        kind, raw = str(match.lastgroup), match[0]
        index = match.end()
        if kind == "space":
            if "\n" in raw and where != "box" and tokens and tokens[-1].kind != "end":
                tokens.append(Token("end", "\n"))
            space = True
            continue
        if raw in (OPEN, CLOSE):
            upright += 1 if raw == OPEN else -1
            space = space or raw == OPEN
            continue
        if kind == "number":
            token, index = _number(text, match.start(), raw, space)
        elif kind == "word":
            token = _word(raw, space, upright > 0, text[index : index + 3])
        elif raw in (r"\then", "\\\\"):
            token = Token("break", raw)
        elif raw in ".?" and (index == len(text) or text[index].isspace()) and where != "box":
            token = Token("end", raw, space)
        elif raw in "+-*/^!=<>()[]{}|:,%_\u2013":
            token = Token("op", raw, space)
        else:
            token = Token("command" if kind == "command" else "break", raw, space)
        tokens.append(token)
        space = False
    return tokens


def _number(text: str, start: int, raw: str, space: bool) -> tuple[Token, int]:
    """Return the token of the number that starts at an index, and the index where it ends."""
    spaced = _SPACED.match(text, start)
    raw = spaced[0] if spaced and len(spaced[0]) > len(raw) else raw
    end, power = start + len(raw), 0
    if exponent := _EXPONENT.match(text, end):
        end, power = exponent.end(), int(exponent[1])
    plain = re.sub("[,' ]", "", raw)
    if len(plain) > DIGITS or abs(power) > DIGITS or not (_PLAIN.fullmatch(raw) or _GROUPED.fullmatch(raw)):
        return Token("unclear", raw, space), end
    after = plain.partition(".")[2]
    rounded = len(after) > 3 and len(plain.replace(".", "").lstrip("0")) > 6
    return Token("number", raw, space, Number(Fraction(plain) * Fraction(10) ** power, rounded)), end


def _word(raw: str, space: bool, upright: bool, after: str) -> Token:
    """Return the token of a word: a letter or command if it is part of an expression."""
    article = raw in ("a", "A", "I") and after[:1] == " " and after[1:2].isalnum()
    attached = after[:1].isdigit() and raw.lower() not in BEFORE_NUMBERS and not upright
    if (len(raw) == 1 and not upright and not article) or raw in _MATHEMATICS or attached:
        return Token("command" if raw == "sqrt" else "letter", r"\sqrt" if raw == "sqrt" else raw, space)
    return Token("word", raw, space, upright=upright)


# --- units, signs and powers in words ------------------------------------------------------------------------------


def word_set(text: str) -> frozenset[str]:
    """Return the words of a text as a set. (A list of them in the source would take a line each.)"""
    return frozenset(text.split())


POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_UNIT_LETTERS = set("mgshlLVWJN")
_SHORT_UNITS = word_set(
    "km cm mm nm kg mg ml mL dl cl hr hrs min mins sec secs ms ft in yd mi lb lbs oz pt qt gal mph kph kmh kW kWh kJ kPa Pa Hz MHz GHz cal "
    "USD EUR GBP INR CHF CAD AUD Rs rs GB MB KB TB st nd rd th cc sq"
)
_FUNCTION_WORDS = word_set(
    "and or nor to through thru until of for per in on at by with from because since so as which that this is are was were be will would "
    "then but if when while than out over into after before more less plus minus times divided vs versus the a an each every only not "
    "it he she they we you i there has have had can could must should"
)
ORDINALS = {"st", "nd", "rd", "th"}


def with_units(tokens: list[Token]) -> list[Token]:
    """Join the units behind numbers into one token each, multiply in powers in words, and turn "negative" into a sign."""
    joined: list[Token] = []
    index = 0
    while index < len(tokens):
        token = tokens[index]
        index += 1
        before = joined[-1] if joined else None
        if token.kind == "number" and token.number:
            token, index = _scaled(token, tokens, index)
        elif _is_sign(token, before) and _starts(tokens, index):
            token, tokens[index] = Token("op", "-", True), replace(tokens[index], space=False)
        joined.append(token)
        if token.kind in ("number", "unclear") or token.text in (r"\degree", "%", ")", "}"):
            end = _unit(tokens, index)
            if end > index:
                joined.append(Token("unit", tokens[index].text, tokens[index].space))
                if (
                    sum(t.kind == "word" for t in tokens[index:end]) > 1
                    and end < len(tokens)
                    and tokens[end].kind != "op"
                ):
                    joined.append(Token("break", "words"))  # "13 pears make 25 fruits"
                index = end
        elif token.kind == "word":
            index = _power_of_unit(tokens, index)
    return joined


def _is_sign(token: Token, before: Token | None) -> bool:
    """Tell whether a word is "negative", or "minus" that follows no number."""
    within = before is not None and before.kind in ("number", "unit")
    return token.kind == "word" and token.text.lower() in ("negative", "minus") and not within


def _starts(tokens: list[Token], index: int) -> bool:
    """Tell whether a number or fraction starts at an index."""
    return index < len(tokens) and (tokens[index].kind == "number" or tokens[index].text == r"\frac")


def _scaled(token: Token, tokens: list[Token], index: int) -> tuple[Token, int]:
    """Multiply a number by the words that follow it ("5 million"). Return its token and the next index."""
    number = token.number
    assert number is not None
    last = min(len(tokens), index + 2)
    while index < last and tokens[index].kind == "word" and tokens[index].text.lower().removesuffix("s") in POWERS:
        power = POWERS[tokens[index].text.lower().removesuffix("s")]
        number, index = Number(number.value * 10**power, number.rounded), index + 1
    return replace(token, number=number), index


def _unit(tokens: list[Token], index: int) -> int:
    """Return the index where the unit that starts at an index ends: "eggs", "cm^2", "km/h", "/hour", "-year".

    The index itself if none.
    """
    start = index
    while index < len(tokens):
        joined = tokens[index].text in ("/", "*", "-") and tokens[index].kind == "op" and index + 1 < len(tokens)
        inner = index + 1 if joined and (tokens[index].text == "/" or not tokens[index + 1].space) else index
        if not (
            inner < len(tokens) and _is_unit(tokens[inner], behind_digits=inner == start and not tokens[inner].space)
        ):
            break
        if inner > index and tokens[index].text == "-" and (tokens[index].space or tokens[inner].kind != "word"):
            break
        if inner > index and tokens[index].text == "*" and start == index:
            break
        index = _power_of_unit(tokens, inner + 1)
    if index > start and index < len(tokens):  # "5m+1" is algebra
        behind = tokens[index]
        letters = any(t.kind == "letter" for t in tokens[start:index])
        if letters and (
            behind.text in ("+", "-", "*", "/", "^", "(", "_", "!") or behind.kind in ("letter", "number", "command")
        ):
            return start
    return index


def _is_unit(token: Token, behind_digits: bool) -> bool:
    """Tell whether a token can be a unit. Directly behind digits only well-known short ones are: "2ab" is algebra."""
    if token.kind == "letter":
        return token.text in _UNIT_LETTERS
    if token.kind != "word" or (token.text.lower() in _FUNCTION_WORDS and not (behind_digits and token.text == "in")):
        return False
    return token.upright or not behind_digits or len(token.text) > 3 or token.text in _SHORT_UNITS


def _power_of_unit(tokens: list[Token], index: int) -> int:
    """Return the index behind a unit's power, "^2" or "^{-1}"; the index itself if there is none."""
    texts = [t.text for t in tokens[index : index + 5]]
    if texts[:1] != ["^"]:
        return index
    for length in (2, 3, 4, 5):
        if re.fullmatch(r"\^(?:-?\d|\{-?\d\})", "".join(texts[:length])):
            return index + length
    return index
