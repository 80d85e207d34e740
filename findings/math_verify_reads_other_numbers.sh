#!/usr/bin/env bash
# math-verify 0.9.0, latex2sympy2_extended 1.11.0
#
# What happens: math-verify reads some notations of school mathematics as other numbers. A repeating decimal, 0.\overline{3}, is read
# without its repeating digits, as 0; a number in another base, 1101_2, without its base, as 1101; an upright i, 3+4\mathrm{i},
# as 7; and i is a variable, so that 1/(1+i) is not (1-i)/2. A space, 4 i for 4i, makes another variable of it.
#
# What one would expect: verify(gold, answer) is true for equal numbers and false for others; what is not understood yields no
# parse, as other texts do.
#
# Why it hurts: it is the judge of lm-eval's math tasks and of TRL's accuracy_reward, and golds of MATH are written just so. An answer
# of 0 for 0.\overline{3} is scored as right, and 1/3 as wrong; digits in base 2 are right in base 3. Under GRPO the policy is rewarded
# for the wrong answers and punished for the right ones.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq "math-verify[antlr4_13_2]==0.9.0" latex2sympy2_extended==1.11.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import sys

from math_verify import parse, verify

print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("math-verify", "latex2sympy2_extended", "sympy")))
cases = [  # gold, answer, whether it is right
    (r"0.\overline{3}", r"0", False),
    (r"0.\overline{3}", r"\frac{1}{3}", True),
    (r"\frac{1}{3}", r"0.\overline{3}", True),
    (r"1.\overline{6}", r"1", False),
    (r"1101_2", r"1101_3", False),
    (r"1101_2", r"1101", False),
    (r"1101_2", r"13", True),
    (r"3+4i", r"3+4\mathrm{i}", True),
    (r"7", r"3+4\mathrm{i}", False),
    (r"\frac{1-i}{2}", r"\frac{1}{1+i}", True),
    (r"3+4i", r"3 + 4 i", True),
    (r"2i", r"\sqrt{-4}", True),
    (r"5", r"|3+4i|", True),
]
alike = [  # the same with notations that are read
    (r"0.5", r"0", False),
    (r"0.25", r"\frac{1}{4}", True),
    (r"3+4x", r"3 + 4 x", True),
    (r"\frac{1-x}{2}", r"\frac{1}{2}-\frac{x}{2}", True),
    (r"7", r"3+4x", False),
]


def verdict(gold: str, answer: str) -> bool:
    return verify(parse(f"${gold}$"), parse(rf"The answer is $\boxed{{{answer}}}$."))


for gold, answer, right in cases + alike:
    print(f"gold {gold:16} answer {answer:24} verified: {str(verdict(gold, answer)):6} expected: {right}")
for notation in (r"0.\overline{3}", r"1101_2", r"3+4\mathrm{i}", r"4i"):
    print(f"{notation} is read as {parse(f'${notation}$')[0]!r}")
held = all(verdict(gold, answer) != right for gold, answer, right in cases)
held = held and all(verdict(gold, answer) == right for gold, answer, right in alike)
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
