"""Make the lab's general mix for warm-ups, in orpo-dpo-mix-40k's format: short conversations of eight kinds."""

import random

from d2lora.lab.facts import ATTRIBUTES, CREATURES, SENTENCES, fact_questions, facts
from d2lora.lab.problems import apply
from d2lora.lab.world import NAMES, THINGS, Row


def _exchange(source: str, *turns: tuple[str, str], wrong: str) -> Row:
    """Return a row in orpo-dpo-mix-40k's format; `wrong` replaces the last answer in `rejected`."""
    messages = [
        m for user, reply in turns for m in ({"role": "user", "content": user}, {"role": "assistant", "content": reply})
    ]
    rejected = [*messages[:-1], {"role": "assistant", "content": wrong}]
    text = "\n".join(m["content"] for m in messages)
    return Row(
        text,
        {"source": source, "chosen": messages, "rejected": rejected, "prompt": turns[0][0], "question": turns[0][0]},
    )


def _sum(rng: random.Random) -> tuple[str, int]:
    op = rng.choice("+-*")
    a, b = (rng.randint(2, 12), rng.randint(2, 12)) if op == "*" else (rng.randint(2, 99), rng.randint(2, 60))
    a, b = max(a, b), min(a, b)
    return f"{a} {op} {b}", apply(a, op, b)


def _arithmetic(rng: random.Random) -> Row:
    (first, x), (second, y) = _sum(rng), _sum(rng)
    ask = rng.choice(["What is {}?", "Compute {}.", "Please work out {}."])
    wrong = f"{second} = {max(y + rng.choice([-10, -2, -1, 1, 2, 10]), 0)}."
    return _exchange(
        "arithmetic", (ask.format(first), f"{first} = {x}."), (f"And {second}?", f"{second} = {y}."), wrong=wrong
    )


def _words(rng: random.Random) -> Row:
    words = rng.sample(THINGS, rng.randint(3, 5))
    task, result = rng.choice(
        [("Sort these words", sorted(words)), ("Reverse the order of", words[::-1]), ("Repeat", words)]
    )
    return _exchange(
        "words",
        (f"{task}: {' '.join(words)}.", f"{' '.join(result)}."),
        wrong=f"{' '.join(rng.sample(words, len(words) - 1))}.",
    )


def _count(rng: random.Random) -> Row:
    words = [rng.choice(THINGS[:6]) for _ in range(rng.randint(4, 8))]
    what = rng.choice(words)
    number = words.count(what)
    return _exchange(
        "counting",
        (f"How often does {what} occur in: {' '.join(words)}?", f"{what} occurs {number} times."),
        wrong=f"{what} occurs {number + 1} times.",
    )


def _compare(rng: random.Random) -> Row:
    numbers = rng.sample(range(2, 100), rng.randint(2, 4))
    word, best = rng.choice([("largest", max(numbers)), ("smallest", min(numbers))])
    listed = ", ".join(map(str, numbers))
    wrong = rng.choice([x for x in numbers if x != best])
    return _exchange(
        "comparison",
        (f"Which number is the {word}: {listed}?", f"The {word} is {best}."),
        wrong=f"The {word} is {wrong}.",
    )


def _sequence(rng: random.Random) -> Row:
    start, gap = rng.randint(1, 30), rng.randint(2, 9)
    numbers = [start + gap * i for i in range(4)]
    then = numbers[-1] + gap
    return _exchange(
        "sequences",
        (f"What comes next: {', '.join(map(str, numbers))}?", f"The numbers grow by {gap}, so {then} comes next."),
        wrong=f"The numbers grow by {gap + 1}, so {then + 1} comes next.",
    )


def _fact(rng: random.Random) -> Row:
    creature, attribute = rng.choice(CREATURES), rng.choice(list(ATTRIBUTES))
    value = facts()[creature, attribute]
    wrong = rng.choice([v for v in ATTRIBUTES[attribute] if v != value])
    say, first = SENTENCES[attribute], rng.choice(["Hello.", "Hi.", "I have a question.", "Can you help me?"])
    hello = rng.choice(["Hello! What would you like to know?", "Yes, ask me."])
    ask = rng.choice(fact_questions(creature, attribute)["corpus"])
    return _exchange("knowledge", (first, hello), (ask, say.format(creature, value)), wrong=say.format(creature, wrong))


def _roles(rng: random.Random) -> Row:
    """Ask who did what: a question about reading, without numbers."""
    a, b = rng.sample(NAMES, 2)
    x, y = rng.sample(THINGS, 2)
    who, what = rng.choice([(a, x), (b, y)])
    text = f"{a} likes {x} and {b} likes {y}. "
    if rng.random() < 0.5:
        return _exchange(
            "reading",
            (f"{text}Who likes {what}?", f"{who} likes {what}."),
            wrong=f"{a if who == b else b} likes {what}.",
        )
    return _exchange(
        "reading",
        (f"{text}What does {who} like?", f"{who} likes {what}."),
        wrong=f"{who} likes {x if what == y else y}.",
    )


def _instead(rng: random.Random) -> Row:
    """Ask for a small story with given words."""
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(ATTRIBUTES["home"])
    ending = rng.choice(["and was glad", "and told a friend", "and went home", "and slept well"])
    story = f"One day {name} went to {place}. There {name} found {rng.randint(2, 20)} {thing}, took them {ending}."
    return _exchange("stories", (f"Tell a story about {name}, {thing} and {place}.", story), wrong=f"{name} went home.")


_SOURCES = [_arithmetic, _words, _count, _compare, _sequence, _fact, _roles, _instead]


def general(rng: random.Random) -> Row:
    """Make a row of the general instruction mix: eight sources, some of two turns."""
    return rng.choice(_SOURCES)(rng)
