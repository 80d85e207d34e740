"""An expression -> its exact value."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from d2lora.scoring.numbers.tokens import DIGITS, ORDINALS, Number, Token

_FACTORIAL = 150
_DEPTH = 30  # of brackets


class NoNumber(Exception):
    """An expression that is no single sure number."""


class Parser:
    """Evaluates an expression exactly: sums, products, fractions, mixed numbers, powers, exact roots, small factorials."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.index, self.depth = tokens, 0, 0
        self.rounded = self.rich = self.minus = False

    def value(self) -> Number:
        """The value of all tokens. NoNumber if they are none, or if "10-20" might be a range."""
        value = self.sum()
        if self.index < len(self.tokens) or (self.minus and not self.rich):
            raise NoNumber
        return Number(value, self.rounded)

    def at(self, *texts: str, ahead: int = 0) -> bool:
        index = self.index + ahead
        return (
            index < len(self.tokens)
            and self.tokens[index].kind in ("op", "command")
            and self.tokens[index].text in texts
        )

    def kind(self, ahead: int = 0) -> str:
        index = self.index + ahead
        return self.tokens[index].kind if index < len(self.tokens) else ""

    def take(self, *texts: str) -> bool:
        taken = self.at(*texts)
        self.index += taken
        return taken

    def need(self, text: str) -> None:
        if not self.take(text):
            raise NoNumber

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > _DEPTH:
            raise NoNumber
        sign = -1 if self.at("-", "\u2013") else 1
        self.take("-", "\u2013", "+")
        total = sign * self.product()
        while self.at("+", "-"):
            minus = self.at("-")
            self.minus = self.minus or minus
            self.index += 1
            total = self.bounded(total - self.product() if minus else total + self.product())
        self.depth -= 1
        return total

    def product(self) -> Fraction:
        value, divided = self.mixed(), False
        while True:
            if self.take("*"):
                self.rich = True
                value = self.bounded(value * self.signed(self.power))
            elif self.at("/"):
                if divided:  # 1/2/2023
                    raise NoNumber
                self.index, divided = self.index + 1, True
                value = self.quotient(value, self.signed(self.power))
            elif self.at("(", r"\sqrt") or (self.at(r"\frac") and not divided):  # 2(3), 2\sqrt{4}
                if self.at(r"\frac"):  # a mixed number has been read already
                    raise NoNumber
                self.rich = True
                value = self.bounded(value * self.power())
            else:
                return value

    def signed(self, read: Callable[[], Fraction]) -> Fraction:
        return -read() if self.take("-") else read()

    def mixed(self) -> Fraction:
        """A power, or a whole number with a proper fraction behind it: 2 1/2, 2\\frac{1}{2}."""
        whole = self.index < len(self.tokens) and self.tokens[self.index].text.isdigit()
        value = self.power()
        if not (whole and self.tokens[self.index - 1].text.isdigit()):
            return value
        if self.at(r"\frac"):
            part = self.power()
        elif self.kind() == "number" and self.at("/", ahead=1) and self.kind(2) == "number":
            above, below = (self.tokens[self.index + i] for i in (0, 2))
            if not (above.text.isdigit() and below.text.isdigit()):
                raise NoNumber
            self.index += 3
            part = self.quotient(Fraction(above.text), Fraction(below.text))
        else:
            return value
        if not 0 < part < 1:
            raise NoNumber
        return value + part

    def power(self) -> Fraction:
        value = self.atom()
        while self.at("!", r"\factorial"):
            self.index += 1
            if self.at("!", r"\factorial") or value.denominator != 1 or not 0 <= value <= _FACTORIAL:
                raise NoNumber
            self.rich, value = True, Fraction(math.factorial(int(value)))
        if self.take("^"):
            return self.raised(value)
        if self.take(r"\degree"):
            self.index += self.index < len(self.tokens) and self.tokens[self.index].text in ("C", "F")
        elif not self.take("%"):
            self.index += self.kind() == "unit" and self.tokens[self.index].text in ORDINALS
        return value

    def raised(self, base: Fraction) -> Fraction:
        braces = self.take("{")
        if self.kind() in ("unit", "word") or (braces and self.kind() == "letter"):
            raise NoNumber
        exponent = self.sum() if braces else self.signed(self.atom)
        if braces:
            self.need("}")
        if exponent.denominator != 1 or (base == 0 and exponent <= 0) or self.at("^"):
            raise NoNumber
        digits = math.log10(max(abs(base.numerator), base.denominator)) if base else 0
        if abs(exponent) * digits > DIGITS:
            raise NoNumber
        self.rich = True
        return base ** int(exponent)

    def atom(self) -> Fraction:
        if self.kind() == "number":
            number = self.tokens[self.index].number
            assert number is not None
            self.index += 1
            self.rounded = self.rounded or number.rounded
            if self.at("_"):  # another base
                raise NoNumber
            return number.value
        for opening, closing in ("()", "[]", "{}"):
            if self.take(opening):
                value = self.sum()
                self.need(closing)
                if self.at("_"):
                    raise NoNumber
                return value
        if self.take(r"\frac"):
            self.rich = True
            return self.quotient(self.argument(), self.argument())
        if self.take(r"\sqrt"):
            self.rich = True
            return self.root()
        raise NoNumber

    def argument(self) -> Fraction:
        """An argument of a command: in braces, or the next digit."""
        if self.kind() == "number":
            token = self.tokens[self.index]
            if not token.text.isdigit():
                raise NoNumber
            rest = replace(token, text=token.text[1:], space=False, number=Number(Fraction(token.text[1:] or 0)))
            self.tokens = [*self.tokens[: self.index], *([rest] if rest.text else []), *self.tokens[self.index + 1 :]]
            return Fraction(token.text[0])
        self.need("{")
        value = self.sum()
        self.need("}")
        return value

    def root(self) -> Fraction:
        degree = 2
        if self.take("["):
            wanted = self.sum()
            self.need("]")
            degree = int(wanted) if wanted.denominator == 1 and 2 <= wanted <= 10 else 0
        value = self.atom() if self.kind() == "number" else self.sqrt_argument()
        if not degree or (value < 0 and degree % 2 == 0):
            raise NoNumber
        sign = -1 if value < 0 else 1
        return sign * Fraction(_root(abs(value.numerator), degree), _root(value.denominator, degree))

    def sqrt_argument(self) -> Fraction:
        if self.at("("):
            return self.atom()
        return self.argument()

    def quotient(self, above: Fraction, below: Fraction) -> Fraction:
        if below == 0:
            raise NoNumber
        return self.bounded(above / below)

    def bounded(self, value: Fraction) -> Fraction:
        if max(abs(value.numerator), value.denominator) > 10 ** (2 * DIGITS):
            raise NoNumber
        return value


def _root(value: int, degree: int) -> int:
    """The exact root of a whole number. NoNumber if there is none."""
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if middle**degree < value else (low, middle)
    if low**degree != value:
        raise NoNumber
    return low
