"""Make the lab's word problems, and find the first wrong step of a sampled solution."""

import random
import re
from dataclasses import dataclass, replace

from d2lora.lab.world import NAMES, THINGS


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


def apply(a: int, op: str, b: int) -> int:
    """Return a op b; a division is a whole number, and 0 by 0."""
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[op]


def _chain(start: int, *pairs: tuple[str, int]) -> tuple[tuple[int, str, int, int], ...]:
    """Return the steps that apply each operation to the running value."""
    steps, value = [], start
    for op, b in pairs:
        steps.append((value, op, b, apply(value, op, b)))
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
        value = apply(value, op, b)
    return Problem(f"{text} How many {thing} does {name} have now?", _chain(start, *pairs))


def _together(rng: random.Random) -> Problem:
    name, other = rng.sample(NAMES, 2)
    thing, a, b = rng.choice(THINGS), rng.randint(5, 50), rng.randint(2, 30)
    op, word = ("+", "more") if rng.random() < 0.5 or b >= a else ("-", "fewer")
    c = apply(a, op, b)
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
