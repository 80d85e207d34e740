"""Read a short text as one exact number. Pure functions, in time linear in the text.

A text is cut into tokens (numbers, operators, LaTeX commands, words), and the tokens between words form runs of
mathematics. One run is evaluated exactly. An ambiguous text is no number; docs/answers.md lists the cases.
"""

import re
from dataclasses import dataclass

from d2lora.scoring.numbers.expression import NoNumber, Parser
from d2lora.scoring.numbers.spelling import plain
from d2lora.scoring.numbers.tokens import BEFORE_NUMBERS, ORDINALS, Number, Token, Where, tokens_of, with_units
from d2lora.scoring.numbers.words import ALTERNATIVES, WORDS, in_words

_LONGEST = 500  # tokens of an expression

__all__ = ["Number", "Where", "holds", "opens", "read"]

# --- runs of mathematics -------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """Consecutive tokens of one expression, and their position among all tokens."""

    tokens: list[Token]
    start: int
    end: int
    sentence: int

    @property
    def counts(self) -> bool:
        """Tell whether the run could be a number."""
        return any(t.kind in ("number", "unclear", "command") for t in self.tokens)


def _runs(tokens: list[Token], where: Where) -> list[_Run]:
    """Return the runs of mathematics between words."""
    runs: list[_Run] = []
    current: list[Token] = []
    start = sentence = depth = 0
    for index, token in enumerate([*tokens, Token("end", "")]):
        inside = token.kind in ("number", "unclear", "letter", "command", "unit") or (
            token.kind == "op" and _belongs(tokens, index, depth, bool(current), where)
        )
        opens_aside = token.text == "(" and token.space and current and current[-1].kind in ("number", "unit")
        if current and (not inside or opens_aside):
            runs.append(_Run(current, start, index, sentence))
            current, depth = [], 0
        if inside:
            start = start if current else index
            current.append(token)
            depth += (token.text in "([{") - (token.text in ")]}") if token.kind == "op" else 0
        sentence += token.kind == "end"
    return runs


def _belongs(tokens: list[Token], index: int, depth: int, within: bool, where: Where) -> bool:
    """Tell whether an operator is part of an expression rather than punctuation."""
    token = tokens[index]
    before = tokens[index - 1] if index else None
    after = tokens[index + 1] if index + 1 < len(tokens) else None
    value = before is not None and (
        before.kind in ("number", "unclear", "letter", "unit", "command") or before.text in (")", "]", "}", "%", "!")
    )
    if token.text == ",":
        return within and after is not None and (depth > 0 or not after.space) and (after.kind != "word" or depth > 0)
    if token.text == ":":
        digits = ("number", "unclear")
        return (
            within
            and before is not None
            and before.kind in digits
            and after is not None
            and after.kind in digits
            and token.space == after.space
        )
    if token.text == "|":
        return where == "box" or not token.space or (after is not None and not after.space)
    if token.text == "_":
        return value
    if token.text == "!":
        return value and not token.space
    if token.text in ("-", "\u2013"):
        if value:
            return True
        apart = after is not None and after.space
        if before is None:
            return not apart or where != "text"
        if before.kind == "op":
            return True
        return not apart and (token.space or before.kind in ("end", "break"))
    return True


def _trimmed(tokens: list[Token], after: Token | None) -> list[Token]:
    """Remove unbalanced brackets, Markdown's stars, and a dash before words."""
    opened: list[int] = []
    lone = set()
    for index, token in enumerate(tokens):
        if token.kind == "op" and token.text in "([{":
            opened.append(index)
        elif token.kind == "op" and token.text in ")]}":
            if opened:
                opened.pop()
            else:
                lone.add(index)
    lone.update(opened)
    first, last = 0, len(tokens)
    while first < last and (first in lone or tokens[first].text in ("*", ",", ":", "/")):
        first += 1
    dash = after is not None and after.kind == "word"
    while last > first and (
        last - 1 in lone
        or tokens[last - 1].text in ("*", ",", ":", "_")
        or (tokens[last - 1].text in ("-", "\u2013") and dash)
    ):
        last -= 1
    return tokens[first:last]


def _value(run: _Run, tokens: list[Token], where: Where) -> Number | None:
    """Evaluate a run; of an equation its right side, unless that is only a variable. None if it is ambiguous."""
    before = tokens[run.start - 1] if run.start else None
    after = tokens[run.end] if run.end < len(tokens) else None
    inner = _trimmed(run.tokens, after)
    if len(inner) > _LONGEST:
        return None
    if where != "box" and _exclaimed(inner, after):
        if not any(t.kind == "word" for t in tokens) and where != "sentence":
            return None  # "5!": a factorial, or joy?
        if after is not None and after.kind == "word" and after.text[0].islower():
            return None  # "5! ways"
        while inner and inner[-1].text == "!":
            inner = inner[:-1]
    if before is not None and (before.text == "not" or _goes_on(inner, before)):
        return None
    sides: list[list[Token]] = [[]]
    depth = 0
    for token in inner:
        depth += (token.text in "([{") - (token.text in ")]}") if token.kind == "op" else 0
        if token.kind == "op" and (token.text in "<>|" or (token.text in ",:" and depth == 0)):
            return None
        if token.kind == "op" and token.text == "=" and depth == 0:
            sides.append([])
        else:
            sides[-1].append(token)
    side = sides[-1]
    if len(sides) > 1 and side and all(t.kind == "letter" for t in side):
        side = sides[-2]
    while side and side[-1].kind == "unit" and side[-1].text not in ORDINALS:
        side = side[:-1]
    try:
        return Parser(side).value()
    except NoNumber:
        return None


def _exclaimed(tokens: list[Token], after: Token | None) -> bool:
    """Tell whether the ! at the end of a run may end a sentence: "18!", but not "5! * 3!" or "5!."."""
    marks = [index for index, t in enumerate(tokens) if t.kind == "op" and t.text == "!"]
    if not marks or marks[-1] != len(tokens) - 1 or (after is not None and after.text in (".", ",", ")")):
        return False
    return marks == list(range(marks[0], len(tokens)))


def _goes_on(tokens: list[Token], before: Token) -> bool:
    """Tell whether a run continues a sum that began before words: "10 cm + 8 cm"."""
    return bool(tokens) and tokens[0].text == "+" and before.kind == "word" and not any(t.text == "=" for t in tokens)


# --- a text -> its number ------------------------------------------------------------------------------------------

_LISTING = ALTERNATIVES | {
    "and",
    "to",
    "through",
    "thru",
    "until",
    "vs",
    "versus",
    "of",
    "times",
    "plus",
    "minus",
    "over",
    "by",
    "out",
}
_LABEL = re.compile(r"\s*(?:\([A-Ea-e]\)|[A-E][).:])\s*(?=\S)")
_BULLET = re.compile(r"^[ \t]*[-*]\s+(?=\S)", re.MULTILINE)


def read(text: str, where: Where) -> Number | None:
    """Return the number in a text; None if there is none, or if it is ambiguous."""
    text = _LABEL.sub("", text, count=1) if _LABEL.match(text) else text
    if where == "text":
        if re.fullmatch(r"\s*-\s[^a-zA-Z]*", text):  # a bullet, or a sign?
            return None
        text = _BULLET.sub("", text)
    elif where != "box":
        head, newline, rest = text.partition("\n")
        text = head + newline + _BULLET.sub("", rest)
    tokens = with_units(tokens_of(plain(text), where))
    counted = [run for run in _runs(tokens, where) if run.counts]
    if not counted:
        return in_words(tokens, where)
    chosen, other = (counted[-1], counted[-2:-1]) if where == "text" else (counted[0], counted[1:2])
    value = _value(chosen, tokens, where)
    for run in other:
        first, second = sorted((chosen, run), key=lambda r: r.start)
        if (
            run.sentence == chosen.sentence
            and _joined(tokens, first, second, where)
            and value != _value(run, tokens, where)
        ):
            return None
    return value


def holds(text: str) -> bool:
    """Tell whether a text has anything that could be meant as a number."""
    tokens = tokens_of(plain(text), "sentence")
    return any(
        t.kind in ("number", "unclear") or (t.kind == "command" and t.text[1:].isalpha()) for t in tokens
    ) or any(t.kind == "word" and t.text.lower() in WORDS for t in tokens)


def opens(text: str) -> bool:
    """Tell whether a line begins with a number in words: "three", "negative 5", "USD 18"."""
    first = re.match(r"[^\W\d_]*", text)
    return first is not None and first[0].lower() in {
        *WORDS,
        *BEFORE_NUMBERS,
        "negative",
        "minus",
        "about",
        "approximately",
    }


def _joined(tokens: list[Token], first: _Run, second: _Run, where: Where) -> bool:
    """Tell whether two numbers are offered together: "18 or 20", "5, -3", "10 to 20"."""
    between = tokens[first.end : second.start]
    words = [t.text.lower() for t in between]
    if not between:  # "18 (20 - 2)"
        return second.tokens[0].text != "(" or where in ("box", "text")
    if ALTERNATIVES & set(words) and len(words) < 6:
        return True
    if _computed(second):  # "because 20 times .25 = 5"
        return False
    if where != "text":
        return words[-1] in _LISTING or words[-1] in (",", ";", ":", "'", '"', "&")
    if not any(t.kind == "word" for t in tokens):
        return True
    words = [w for w in words if w != ","]
    return words == ["out", "of"] or (len(words) == 1 and (words[0] in _LISTING or words[0] == "'"))


def _computed(run: _Run) -> bool:
    """Tell whether a run is a calculation with its result: "9 * 2 = 18"."""
    equals = [i for i, t in enumerate(run.tokens) if t.text == "="]
    return bool(equals) and any(t.kind == "number" for t in run.tokens[: equals[0]])
