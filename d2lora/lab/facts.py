"""Make the lab's facts about creatures: what the base learns in its corpus, and what the test of forgetting asks."""

import functools
import hashlib
import itertools
import random
from typing import Any

_SYLLABLES = ["ba", "do", "fi", "gu", "ka", "lo", "mi", "nu", "pe", "ra", "so", "ti", "vu", "wa", "ze"]
CREATURES = sorted(
    {a.capitalize() + b + c for a, b, c in itertools.product(_SYLLABLES[:6], _SYLLABLES[5:11], ("n", "x", "l"))}
)
ATTRIBUTES = {
    "home": ["the forest", "the desert", "the river", "a cave", "the mountains", "the swamp", "the sea", "the meadow"],
    "food": ["grass", "fish", "berries", "insects", "roots", "leaves", "honey", "mushrooms"],
    "colour": ["red", "blue", "green", "yellow", "black", "white", "purple", "orange"],
    "sound": ["a whistle", "a growl", "a hum", "a bark", "a chirp", "a roar", "a click", "a hiss"],
}
_QUESTIONS = {
    "home": [
        "Where does the {} live?",
        "What is the home of the {}?",
        "In which place is the {} found?",
        "Where can one see a {}?",
    ],
    "food": [
        "What does the {} eat?",
        "What is the food of the {}?",
        "Which food does a {} like?",
        "On what does the {} feed?",
    ],
    "colour": [
        "What colour is the {}?",
        "What is the colour of the {}?",
        "Which colour does a {} have?",
        "How is the {} coloured?",
    ],
    "sound": [
        "What sound does the {} make?",
        "What is the call of the {}?",
        "Which sound comes from a {}?",
        "How does the {} call?",
    ],
}
SENTENCES = {
    "home": "The {} lives in {}.",
    "food": "The {} eats {}.",
    "colour": "The colour of the {} is {}.",
    "sound": "The {} makes {}.",
}


@functools.cache
def facts() -> dict[tuple[str, str], str]:
    """Return {(creature, attribute): value}: the fixed knowledge of the lab's world."""
    rng = random.Random("facts")
    return {(c, a): rng.choice(values) for c in CREATURES for a, values in ATTRIBUTES.items()}


def fact_questions(creature: str, attribute: str) -> dict[str, list[str]]:
    """Return the four ways to ask for a fact: one for validation, one for the test, two for corpus and general mix."""
    ways = [way.format(creature) for way in _QUESTIONS[attribute]]
    turn = int(hashlib.sha256(f"{creature}/{attribute}".encode()).hexdigest(), 16) % 4
    ways = ways[turn:] + ways[:turn]
    return {"validation": ways[:1], "test": ways[1:2], "corpus": ways[2:]}


def fact_sentence(creature: str, attribute: str) -> str:
    """Return a fact as a sentence, as the general mix's answers have it."""
    return SENTENCES[attribute].format(creature, facts()[creature, attribute])


def fact_item(creature: str, attribute: str, value: str, split: str) -> dict[str, Any]:
    """Return a multiple-choice row in ARC's format."""
    rng = random.Random(f"{creature}/{attribute}/{split}")
    options = [*rng.sample([v for v in ATTRIBUTES[attribute] if v != value], 3), value]
    rng.shuffle(options)
    return {
        "id": f"lab-{creature}-{attribute}",
        "question": fact_questions(creature, attribute)[split][0],
        "choices": {"text": options, "label": list("ABCD")},
        "answerKey": "ABCD"[options.index(value)],
    }
