"""Benchmark kind `rouge`: the words, and sequences of words, that an answer shares with the gold."""

import dataclasses
import functools
import re
from typing import TYPE_CHECKING

from d2lora.scoring.kinds import Generated
from d2lora.scoring.words import words

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@functools.cache
def _scorer() -> "RougeScorer":
    """Return rouge-score's scorer with its own words: of letters a-z and digits, by the Porter stemmer."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(METRICS), use_stemmer=True)


@functools.cache
def _scorer_of_any() -> "RougeScorer":
    """Return rouge-score's scorer with words of any script; English ones are stemmed as rouge-score does."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

    latin = DefaultTokenizer(use_stemmer=True)

    class AnyScript(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return [stem for word in words(text) for stem in (latin.tokenize(word) if word.isascii() else [word])]

    return RougeScorer(list(METRICS), tokenizer=AnyScript())


def rouge(answer: str, gold: str) -> dict[str, float]:
    """Compute the F-measures of ROUGE-1, -2, -L and -Lsum (rouge-score, Porter stemming on), each in 0..1."""
    return _measures(_scorer(), answer, gold)


def rouge_of_any_script(answer: str, gold: str) -> dict[str, float]:
    """Compute the same of texts in any script (`scoring.words`): equal to `rouge` for ASCII texts."""
    return _measures(_scorer_of_any(), answer, gold)


def _measures(scorer: "RougeScorer", answer: str, gold: str) -> dict[str, float]:
    return {name: score.fmeasure for name, score in scorer.score(gold, answer.strip()).items()}


def _problem(gold: str) -> str | None:
    # rouge-score reads a-z and 0-9 only: a text without them scores 0 whatever the answer, two that share a year score 1.
    with_letters = [word for word in words(gold) if not word.isdecimal()]
    unread = sum(re.search("[a-z0-9]", word) is None for word in with_letters)
    if 2 * unread > len(with_letters):
        return (
            "the gold answer {} is in another script than Latin, and ROUGE reads letters a-z and digits only: script: any in the "
            "benchmark's file reads every script (kind: exact compares texts)"
        )
    return _nothing(gold)


def _nothing(gold: str) -> str | None:
    """Say that a gold has no word in any script."""
    return (
        None if words(gold) else "the gold answer {} has no word, and ROUGE compares words (kind: exact compares texts)"
    )


_OF_ANY_SCRIPT = Generated("rouge", METRICS, rouge_of_any_script, _nothing, family="rouge", right_or_wrong=False)

ROUGE = dataclasses.replace(_OF_ANY_SCRIPT, compare=rouge, problem=_problem, of_any_script=_OF_ANY_SCRIPT)
