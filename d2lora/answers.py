"""Reading a final answer as a number, and scoring texts. Pure functions."""

import functools
import re
from fractions import Fraction

_NUMBER = r"[-+\u2212]?\s*(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?"
_LARGEST_POWER = 300  # of ten; an answer with more is no number anyone means, and would take for ever to write out
_FRACTION = re.compile(r"(?:([-+])\s*)?\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_TOKEN = re.compile(
    rf"(?P<whole>[-+\u2212]?\d+)\s+(?P<above>\d+)\s*/\s*(?P<below>\d+)"  # 1 1/2
    rf"|(?P<top>{_NUMBER})\s*/\s*(?P<bottom>{_NUMBER})"
    rf"|(?P<number>{_NUMBER})(?:\s*(?:\\times|\u00d7|x|\*)\s*10\s*\^\s*\{{?(?P<power>-?\d+)\}}?)?"
)


def final_number(text: str) -> Fraction | None:
    """The number that a solution ends on; None if there is none.

    The last \\boxed{...} counts; without one what follows the last "####" (GSM8K's gold answers), then the last
    "answer is", then the last number of the text. Units, currency, commas, % and LaTeX around it are no part of it.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return _read(boxed, last=False)
    for mark in ("####", "answer is", "Answer:"):
        _, found, after = text.rpartition(mark)
        if found and (number := _read(after, last=False)) is not None:
            return number
    return _read(text, last=True)


def last_boxed(text: str) -> str | None:
    """The content of the last complete \\boxed{...} that is not empty, braces inside it balanced."""
    for match in reversed(list(re.finditer(r"\\f?boxed\s*\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                if text[match.end() : end].strip():
                    return text[match.end() : end]
                break
    return None


def _read(text: str, last: bool) -> Fraction | None:
    """The first (or last) number of a short answer; of an equation, of its right side."""
    text = text.rsplit("=", 1)[-1] if not last else text
    text = (
        text.replace("\u2212", "-")
        .replace("\\!", "")
        .replace("{,}", ",")
        .replace("\\,", "")
        .replace("\\$", "$")
        .replace("\\%", "%")
    )
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"(\d)\s*(?=\\[dtc]?frac)", r"\1 ", text)
    text = _FRACTION.sub(lambda m: f"{m[1] or ''}{m[2] or m[3]}/{m[4] or m[5]}", text)
    text = re.sub(r"([-+]?)\s*[$\u20ac\u00a3]\s*", r"\1", text)
    found = [n for m in _TOKEN.finditer(text) if (n := _number(m)) is not None]
    if not found:
        return None
    return found[-1] if last else found[0]


def _number(match: re.Match) -> Fraction | None:
    if match["whole"]:
        if int(match["below"]) == 0:
            return None
        part = Fraction(int(match["above"]), int(match["below"]))
        whole = int(match["whole"])
        return whole - part if match["whole"].startswith("-") else whole + part
    if match["top"] is not None:
        top, bottom = _decimal(match["top"]), _decimal(match["bottom"])
        if bottom is None:  # a unit: "18/hour"
            return top
        return top / bottom if top is not None and bottom else None
    number = _decimal(match["number"])
    if number is None or not match["power"]:
        return number
    power = int(match["power"])
    return number * Fraction(10) ** power if abs(power) <= _LARGEST_POWER else None


def _decimal(text: str | None) -> Fraction | None:
    try:
        return Fraction(re.sub(r"[,\s]", "", text or ""))
    except ValueError:
        return None


@functools.cache
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)


def rouge(answer: str, gold: str) -> dict[str, float]:
    """ROUGE-1, -2, -L and -Lsum F-measures (rouge-score, Porter stemming on), each in 0..1."""
    return {name: score.fmeasure for name, score in _scorer().score(gold, answer.strip()).items()}
