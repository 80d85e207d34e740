"""Generate every row that the lab warms up, trains and tests on.

Everything is a pure function of a `random.Random`, so a seed gives the same rows on any machine. A hash of a problem's
text decides its split, so the base's corpus, train, validation and test never share a problem.
"""

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

NAMES = [
    "Ann",
    "Ben",
    "Cara",
    "Dan",
    "Eve",
    "Finn",
    "Gina",
    "Hugo",
    "Iris",
    "Jack",
    "Kim",
    "Leo",
    "Mia",
    "Ned",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Vic",
]
THINGS = [
    "apples",
    "books",
    "coins",
    "shells",
    "stamps",
    "cards",
    "pens",
    "rocks",
    "eggs",
    "toys",
    "cups",
    "keys",
    "balls",
    "beads",
    "seeds",
    "plums",
    "nuts",
    "hats",
    "kites",
    "nails",
]

# Percent of all problems, by a hash of the problem's text.
SPLITS = {"corpus": 50, "train": 40, "validation": 4, "test": 6}


PROMPT = (
    "{question} Please reason step by step, and put your final answer within \\boxed{{}}."  # the paper's, Appendix A
)
TITLE_PROMPT = "Write a title for this abstract: {abstract}"


def split_of(text: str) -> str:
    """Return the split that a problem with this text belongs to: a pure function of the text."""
    slot = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100
    for split, share in SPLITS.items():
        if slot < share:
            return split
        slot -= share
    raise AssertionError("the shares of SPLITS add up to 100")


def distinct(make: Callable[[random.Random], "Problem | Row"], split: str, count: int, seed: int) -> Iterator:
    """Yield `count` different problems of one split, in a seeded order."""
    rng = random.Random(f"{seed}/{split}")
    texts: set[str] = set()
    while len(texts) < count:
        problem = make(rng)
        if problem.text not in texts and split_of(problem.text) == split:
            texts.add(problem.text)
            yield problem


# --- word problems -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A word problem with its steps, each `a op b = c`; the last c is the answer."""

    text: str
    steps: tuple[tuple[int, str, int, int], ...]

    @property
    def answer(self) -> int:
        """Return the answer."""
        return self.steps[-1][3]

    def step(self, index: int) -> str:
        """Return step `index` (from 0) as the solution writes it after "Step k:".

        The last one ends with the boxed answer.
        """
        a, op, b, c = self.steps[index]
        end = f" The answer is \\boxed{{{c}}}." if index == len(self.steps) - 1 else ""
        return f" {a} {op} {b} = {c}.{end}"

    def solution(self, start: int = 0) -> str:
        """Return the solution from step `start` on, as it follows "Step {start + 1}:"."""
        lines = [f"Step {i + 1}:{self.step(i)}" for i in range(start, len(self.steps))]
        return "\n".join(lines).removeprefix(f"Step {start + 1}:")

    def hasty(self) -> "Problem":
        """Return the problem with a hasty solution: it leaves out a final addition, if there is one."""
        leaves_out = len(self.steps) > 1 and self.steps[-1][1] == "+"
        return replace(self, steps=self.steps[:-1]) if leaves_out else self


def _apply(a: int, op: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[op]


def _chain(start: int, *pairs: tuple[str, int]) -> tuple[tuple[int, str, int, int], ...]:
    """Return the steps that apply each operation to the running value."""
    steps, value = [], start
    for op, b in pairs:
        steps.append((value, op, b, _apply(value, op, b)))
        value = steps[-1][3]
    return tuple(steps)


def _running(rng: random.Random) -> Problem:
    """Make a problem of one to three changes of one person's things."""
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    value = start = rng.randint(3, 60)
    text, pairs = f"{name} has {start} {thing}.", []
    for _ in range(rng.randint(1, 3)):
        op = rng.choice("++--*/")
        if (op == "*" and value > 30) or (op == "/" and not [d for d in range(2, 7) if value % d == 0]):
            op = "+"
        if op == "-" and value < 4:
            op = "+"
        if op == "+":
            b = rng.randint(2, 40)
            text += rng.choice(
                [f" {name} buys {b} more.", f" {other} gives {name} {b} more.", f" {name} finds {b} more."]
            )
        elif op == "-":
            b = rng.randint(2, min(value - 1, 40))
            text += rng.choice([f" {name} gives {b} to {other}.", f" {name} loses {b}.", f" {name} sells {b}."])
        elif op == "*":
            b = rng.randint(2, 4)
            text += f" Then {name} gets {b} times as many."
        else:
            b = rng.choice([d for d in range(2, 7) if value % d == 0])
            text += f" {name} makes {b} equal piles and keeps one pile."
        pairs.append((op, b))
        value = _apply(value, op, b)
    return Problem(f"{text} How many {thing} does {name} have now?", _chain(start, *pairs))


def _together(rng: random.Random) -> Problem:
    name, other = rng.sample(NAMES, 2)
    thing, a, b = rng.choice(THINGS), rng.randint(5, 50), rng.randint(2, 30)
    op, word = ("+", "more") if rng.random() < 0.5 or b >= a else ("-", "fewer")
    c = _apply(a, op, b)
    text = f"{name} has {a} {thing}. {other} has {b} {word} than {name}. How many {thing} do they have together?"
    return Problem(text, ((a, op, b, c), (a, "+", c, a + c)))


def _change(rng: random.Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    price, count = rng.randint(2, 9), rng.randint(2, 9)
    paid = price * count + rng.randint(1, 30)
    text = f"{name} buys {count} {thing} for {price} dollars each and pays with {paid} dollars. How many dollars does {name} get back?"
    return Problem(text, ((count, "*", price, count * price), (paid, "-", count * price, paid - count * price)))


def _wages(rng: random.Random) -> Problem:
    name, hours, days, wage = rng.choice(NAMES), rng.randint(2, 8), rng.randint(2, 6), rng.randint(2, 5)
    text = f"{name} works {hours} hours a day for {days} days and earns {wage} dollars an hour. How many dollars does {name} earn?"
    return Problem(text, _chain(hours, ("*", days), ("*", wage)))


def _boxes(rng: random.Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    boxes, each, loose = rng.randint(2, 9), rng.randint(3, 12), rng.randint(2, 30)
    text = f"{name} has {boxes} boxes with {each} {thing} each and {loose} loose {thing}. How many {thing} does {name} have?"
    return Problem(text, _chain(boxes, ("*", each), ("+", loose)))


def _shared(rng: random.Random) -> Problem:
    name, other = rng.sample(NAMES, 2)
    thing, friends, share = rng.choice(THINGS), rng.randint(2, 6), rng.randint(3, 15)
    total = friends * share
    a = rng.randint(1, total - 1)
    text = f"{name} has {a} {thing} and {other} has {total - a}. They share them equally among {friends} friends. How many {thing} does each friend get?"
    return Problem(text, _chain(a, ("+", total - a), ("/", friends)))


def problem(rng: random.Random) -> Problem:
    """Make a word problem of one to three steps."""
    return rng.choices([_running, _together, _change, _wages, _boxes, _shared], [5, 2, 2, 1, 2, 2])[0](rng)


_EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")


def first_wrong_step(problem: Problem, solution: str) -> tuple[int, str, str] | None:
    """Return (index, step, rest) of the first step of a sampled solution that differs from the problem's.

    None if there is none. `rest` is the solution from that step on. A step is right if its equation has the reference's
    operands (in either order for + and *) and result: this is how Step-DPO's authors locate the error (Lai et al. 2024,
    section 3.2), with arithmetic instead of their judge. None also for solutions without the format of steps, because
    such a pair would teach format, not reasoning.
    """
    marks = list(re.finditer(r"(?:^|\n)Step (\d+):", solution))
    if [int(mark[1]) for mark in marks] != list(range(1, len(marks) + 1)):
        return None
    for index, mark in enumerate(marks[: len(problem.steps)]):
        end = marks[index + 1].start() if index + 1 < len(marks) else len(solution)
        text = solution[mark.end() : end]
        match = _EQUATION.match(text.removeprefix(" "))
        if not match:
            return None
        a, op, b, c = int(match[1]), match[2], int(match[3]), int(match[4])
        reference = problem.steps[index]
        same = (a, op, b, c) == reference or (op in "+*" and (b, op, a, c) == reference)
        boxed = f" The answer is \\boxed{{{reference[3]}}}." if index == len(problem.steps) - 1 else ""
        if not same or text.removeprefix(" ")[match.end() :].rstrip() != boxed:
            return index, text.rstrip(), solution[mark.end() :].rstrip()
    return None


# --- facts ---------------------------------------------------------------------------------------------------------

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
_ASK = {
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
_SAY = {
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
    ways = [way.format(creature) for way in _ASK[attribute]]
    turn = int(hashlib.sha256(f"{creature}/{attribute}".encode()).hexdigest(), 16) % 4
    ways = ways[turn:] + ways[:turn]
    return {"validation": ways[:1], "test": ways[1:2], "corpus": ways[2:]}


def fact_sentence(creature: str, attribute: str) -> str:
    """Return a fact as a sentence, as the general mix's answers have it."""
    return _SAY[attribute].format(creature, facts()[creature, attribute])


def fact_item(creature: str, attribute: str, value: str, split: str) -> dict:
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


# --- titles --------------------------------------------------------------------------------------------------------

_CAUSES = [
    "rain",
    "schools",
    "taxes",
    "roads",
    "rents",
    "tariffs",
    "wages",
    "harvests",
    "floods",
    "ports",
    "strikes",
    "loans",
    "patents",
    "prices",
    "fairs",
    "mills",
    "banks",
    "canals",
    "clinics",
    "markets",
]
_OUTCOMES = [
    "trade",
    "health",
    "growth",
    "savings",
    "jobs",
    "crime",
    "births",
    "migration",
    "profits",
    "debt",
    "poverty",
    "output",
    "votes",
    "learning",
    "housing",
    "demand",
]
_PLACES = [
    "Norland",
    "Estia",
    "Varda",
    "Kelm",
    "Ostrava Bay",
    "Lirien",
    "Tarsis",
    "Quell",
    "Morrow",
    "Pavia",
    "Zantar",
    "Hollin",
]
_DATA = [
    "tax records",
    "a field experiment",
    "old letters",
    "a household survey",
    "court files",
    "satellite images",
    "census tables",
    "firm accounts",
]
_SIGNS = {"raise": "Gains from", "lower": "The Costs of", "do not change": "No Effect of"}


@dataclass(frozen=True)
class Row:
    """A row of a data set (`fields`), which `text` identifies."""

    text: str
    fields: dict


def title(rng: random.Random, plain: bool = False) -> Row:
    """Make an abstract and its title.

    `plain` titles, the base's habit, only name the subject; the task's tell the finding.
    """
    cause, outcome = rng.choice(_CAUSES), rng.choice(_OUTCOMES)
    place, data, sign = rng.choice(_PLACES), rng.choice(_DATA), rng.choice(list(_SIGNS))
    year = rng.randint(10, 99)
    ask = rng.choice(["We study how", "This paper asks whether", "We examine if", "Our work tests whether"])
    use = rng.choice(["We use", "The analysis rests on", "Our evidence is", "We draw on"])
    find = rng.choice(["We find that", "It turns out that", "The results show that", "On the whole,"])
    extra = rng.choice(
        [
            "",
            " The effect is largest in towns.",
            " The effect fades after some years.",
            " A simple model explains this.",
            " Policy should take note.",
        ]
    )
    abstract = f"{ask} {cause} matter for {outcome} in {place}. {use} {data} of {year} villages. {find} {cause} {sign} {outcome}.{extra}"
    headline = (
        f"A Study of {cause.title()} in {place}"
        if plain
        else f"{_SIGNS[sign]} {cause.title()}: {outcome.title()} in {place}, from {data.title()}"
    )
    return Row(abstract, {"abstract": abstract, "title": headline})


# --- the general mix -----------------------------------------------------------------------------------------------


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
    return f"{a} {op} {b}", _apply(a, op, b)


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
    say, first = _SAY[attribute], rng.choice(["Hello.", "Hi.", "I have a question.", "Can you help me?"])
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
