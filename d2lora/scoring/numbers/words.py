"""Read numbers in words: "twenty-one", "two and a half"."""

from fractions import Fraction

from d2lora.scoring.numbers.tokens import POWERS, Number, Token, Where, word_set

ALTERNATIVES = {"or", "nor", "maybe", "perhaps", "possibly"}
_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: i for i, word in enumerate(_SMALL.split())} | {
    word: 10 * (i + 2) for i, word in enumerate(_TENS.split())
}
_PARTS = word_set(
    "half halves third thirds quarter quarters fourth fourths fifth fifths sixth eighth eighths tenth tenths dozen dozens couple few several"
)


def in_words(tokens: list[Token], where: Where) -> Number | None:
    """Return the number in a text without digits: "twenty-one", "negative five", "two and a half".

    None if there is none.
    """
    words = [t.text.lower() for t in tokens]
    runs: list[tuple[int, int]] = []
    index = 0
    while index < len(words):
        end = _spelled_end(words, index)
        if end > index:
            runs.append((index, end))
        index = max(end, index + 1)
    if where == "text" and len(runs) > 1:  # a pronoun
        runs = [r for r in runs if words[r[0] : r[1]] != ["one"]] or runs
    if not runs:
        return None
    start, end = runs[-1] if where == "text" else runs[0]
    value = _spelled(words[start:end])
    if words[end : end + 3] == ["and", "a", "half"]:
        value, end = None if value is None else value + Fraction(1, 2), end + 3
    others = [_spelled(words[a:b]) for a, b in runs if a != start]
    if value is None or _PARTS & set(words[end : end + 2]):  # "two thirds"
        return None
    if any(o != value for o in others) and (ALTERNATIVES | {"and"}) & _outside(words, runs):  # "two or three"
        return None
    if words[end : end + 1] == ["point"] or (start and words[start - 1] == "point"):
        return None
    sign = -1 if start and (words[start - 1] in ("negative", "minus") or words[:start] == ["-"]) else 1
    return Number(Fraction(sign * value))


def _outside(words: list[str], runs: list[tuple[int, int]]) -> set[str]:
    """Return the words that are in no number: not the "and" of "one hundred and five"."""
    inside = {index for start, end in runs for index in range(start, end)}
    return {word for index, word in enumerate(words) if index not in inside}


def _spelled_end(words: list[str], index: int) -> int:
    """Return the index where the number in words that starts at an index ends."""
    end = index
    while index < len(words):
        word = words[index]
        if word in WORDS or (word in POWERS and (end == index or end > 0)):
            index = end = index + 1
        elif (
            word in ("-", "and")
            and end == index
            and index
            and words[index - 1] in (*WORDS, *POWERS)
            and index + 1 < len(words)
        ):
            joins = words[index + 1] in WORDS and (word == "-" or words[index - 1] in POWERS)
            if not joins:
                break
            index += 1
        else:
            break
    return end


def _spelled(words: list[str]) -> Fraction | None:
    """Return the value of a number in words; None for "two three"."""
    total = current = 0
    smallest = 10**15
    for word in words:
        if word in ("-", "and"):
            continue
        if word in POWERS:
            power = 10 ** POWERS[word]
            current = max(current, 1) * power
            if power > 100:
                if power >= smallest:
                    return None
                total, current, smallest = total + current, 0, power
        else:
            value = WORDS[word]
            low = current % 100
            if low and not (low >= 20 and low % 10 == 0 and 0 < value < 10):
                return None
            current += value
        if current > 10**30:
            return None
    return Fraction(total + current)
