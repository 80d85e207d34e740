"""Find the final answer in a text and compare it with a gold. Pure functions; docs/answers.md has the rules."""

import functools
import re
import unicodedata
from fractions import Fraction

from d2lora.scoring import numbers
from d2lora.scoring.numbers import Number

_BRACES = re.compile(r"\\f?boxed\s*\{|\\[{}]|[{}]")
_HASHES = re.compile(r"^[^\S\n]*####[^\S\n]*(?=[^#\s])|####[^\S\n]*(?=[-+.\d$\\])", re.MULTILINE)
_ANSWER = re.compile(r"\banswer\s+is\b(?:\s*:)?|\banswer\s?(?:\*\*|__)?\s?:|^A:", re.IGNORECASE | re.MULTILINE)
_PHRASE = 60  # characters; a longer gold is a solution, not something that could stand in a box
_BETWEEN = re.compile(r"\\(?:text|mbox|mathrm|quad|,|;| |\(|\)|\[|\])|[$\s{}*]+")


def final_number(text: str) -> Fraction | None:
    """Return the number that a solution ends with; None if there is none, or if it is ambiguous.

    The last \\boxed{...} counts; without one the last line after "####" (GSM8K's gold answers), then what follows the
    last "answer is" or "Answer:", then the last number of the text. Units, currency, % and LaTeX around it are ignored.
    """
    number = _number(text)
    return number.value if number else None


def gold_number(text: str) -> Fraction | None:
    """Return the number of a gold.

    None also for a phrase that reads as another number inside a box: "18 eggs in 3 days".
    """
    value = final_number(text)
    if value is None or "\n" in text or len(text) > _PHRASE or _boxes(text) or _marked(text):
        return value
    boxed = numbers.read(re.sub(r"^\s*-\s", "", text), "box")
    return value if boxed is None or boxed.value == value else None


def same_number(answer: str, gold: str) -> bool:
    """Tell whether two texts end with equal numbers (`numbers.Number` defines equality).

    Without any number, with equal texts.
    """
    in_answer, in_gold = _number(answer), _number(gold)
    if in_answer is None and in_gold is None:
        return exact_text(answer) == exact_text(gold) != ""
    return in_answer == in_gold


@functools.lru_cache(maxsize=8192)  # a benchmark's golds are read for each adapter, and when rows are checked
def _number(text: str) -> Number | None:
    """Return the number that a text ends with, found by the first rule of `final_number` that applies."""
    if boxes := _boxes(text):
        return _boxed_number(text, boxes)
    for marked, where in _marked(text):
        if numbers.holds(marked):
            return numbers.read(marked, where)
    return numbers.read(text, "text")


def _marked(text: str) -> list[tuple[str, numbers.Where]]:
    """Return the texts after "####" and "answer is", in the order of precedence, and how each is to be read."""
    marked: list[tuple[str, numbers.Where]] = []
    if hashes := list(_HASHES.finditer(text)):
        line = text[hashes[-1].end() :].split("\n", 1)[0]
        if not line[:1].isalpha() or numbers.opens(line):  # "#### Step 2: add" is a heading
            marked.append((line, "line"))
    if phrases := list(_ANSWER.finditer(text)):
        marked.append((text[phrases[-1].end() :], "sentence"))
    return marked


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Return start, end and content of all complete \\boxed{...} that are not empty, in order.

    Braces inside must be balanced.
    """
    boxes, opened = [], []
    for match in _BRACES.finditer(text):
        if match[0][0] == "\\" and len(match[0]) == 2:
            continue
        if match[0] != "}":
            opened.append(match)
        elif opened and (start := opened.pop())[0] != "{" and text[start.end() : match.start()].strip():
            boxes.append((start.start(), match.end(), text[start.end() : match.start()]))
    return sorted(boxes)


def last_boxed(text: str) -> str | None:
    """Return the content of the last complete \\boxed{...} that is not empty; None if there is none."""
    boxes = _boxes(text)
    return boxes[-1][2] if boxes else None


def _boxed_number(text: str, boxes: list[tuple[int, int, str]]) -> Number | None:
    """Return the number in the last box; None if another number is offered beside it: "\\boxed{18} or \\boxed{20}"."""
    start, end, content = boxes[-1]
    value = numbers.read(content, "box")
    if len(boxes) > 1 and boxes[-2][1] <= start:
        between = _BETWEEN.sub(" ", text[boxes[-2][1] : start]).strip().lower()
        offered = between in (",", ";", "/", "&", "and", ", and") or _has_or(between)
        if offered and numbers.read(boxes[-2][2], "box") != value:
            return None
    begin = max(start - 40, boxes[-2][1] if len(boxes) > 1 else 0)
    before, after = (_BETWEEN.sub(" ", t).strip().lower() for t in (text[begin:start], text[end : end + 40]))
    if re.search(r"\d\W{0,2}\s(?:[a-z]+\s){0,2}or$", before) or re.match(
        r"(?:,\s)?or\s(?:[a-z]+\s){0,2}[^a-z]{0,2}\d", after
    ):
        return None
    return value


def _has_or(between: str) -> bool:
    """Tell whether the words between two boxes offer one or the other."""
    return len(between) < 60 and "." not in between and "or" in re.findall(r"[a-z]+", between)


# --- texts ---------------------------------------------------------------------------------------------------------

_SUPERSCRIPTS = re.compile("[⁺⁻⁰¹²³⁴-⁹]+")
_LATEX = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\(?:left|right|displaystyle|!|,|;|:|\(|\)|\[|\])(?![a-zA-Z])", ""),
        (r"\\[dt]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1"),
        (r"\*\*|__|`", ""),
        (r"\s+", " "),
        (r" ?([^\w\s]) ?", r"\1"),
    )
]


def exact_text(text: str) -> str:
    """Return the final answer as a text that can be compared: without differences of case, spaces and wrapping.

    It is the last \\boxed{...}, else the rest of the line after the last "####", else of the last line with "answer is"
    or "Answer:", else the whole text. Then: Unicode NFKC (superscripts as ^); lower case (casefold); LaTeX's \\left,
    \\right, thin spaces, \\( \\), \\text{} and the like removed, \\dfrac as \\frac; Markdown's ** removed; white space
    as one space, none beside punctuation; and at the ends no $, no quotes around the whole, no . , ; : of a sentence,
    and no ! or ? after a letter.
    """
    boxed = last_boxed(text)
    if boxed is None:
        marks = list(_HASHES.finditer(text)) or list(_ANSWER.finditer(text))
        boxed = text[marks[-1].end() :].strip().split("\n", 1)[0] if marks else text
        boxed = boxed if boxed.strip() else text
    plain = _SUPERSCRIPTS.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]), boxed)
    plain = unicodedata.normalize("NFKC", plain).casefold()
    for pattern, by in _LATEX:
        plain = pattern.sub(by, plain)
    return _unwrapped(plain)


def _unwrapped(text: str) -> str:
    """Remove $, quotes and final punctuation around a text."""
    for _ in range(5):
        text = text.strip().strip("$").strip().rstrip(".,;:")
        if len(text) > 1 and text[-1] in "!?" and text[-2].isalpha():
            text = text[:-1]
        if len(text) > 1 and (text[0], text[-1]) in (
            ('"', '"'),
            ("'", "'"),
            ("“", "”"),
            ("‘", "’"),
            ("«", "»"),
            ("*", "*"),
            ("_", "_"),
        ):
            text = text[1:-1]
    return text


def same_text(answer: str, gold: str) -> bool:
    """Tell whether two texts have equal final answers (`exact_text`); empty ones never are."""
    return exact_text(answer) == exact_text(gold) != ""
