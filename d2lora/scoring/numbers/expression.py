"""Evaluate an expression exactly."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from d2lora.scoring.numbers.tokens import DIGITS, ORDINALS, Number, Token

_FACTORIAL = 150
_DEPTH = 30  # of brackets


class NoNumber(Exception):
    """An expression that is not one unambiguous number."""


class Parser:
    """A recursive-descent parser: sums, products, fractions, mixed numbers, powers, exact roots, small factorials.

    `rich` is set by operations that a range of numbers would not have, `minus` by a subtraction, `rounded` by a long
    decimal.
    """

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.index, self.depth = tokens, 0, 0
        self.rounded = self.rich = self.minus = False

    def value(self) -> Number:
        """Return the value of all tokens. NoNumber if they have none, or if "10-20" might be a range."""
        value = self.sum()
        if self.index < len(self.tokens) or (self.minus and not self.rich):
            raise NoNumber
        return Number(value, self.rounded)

    def at(self, *texts: str, ahead: int = 0) -> bool:
        """Tell whether the token is one of these operators or commands; `ahead` counts from the current one."""
        index = self.index + ahead
        return (
            index < len(self.tokens)
            and self.tokens[index].kind in ("op", "command")
            and self.tokens[index].text in texts
        )

    def kind(self, ahead: int = 0) -> str:
        """Return the kind of the token, "" at the end."""
        index = self.index + ahead
        return self.tokens[index].kind if index < len(self.tokens) else ""

    def take(self, *texts: str) -> bool:
        """Skip the current token if it is one of these, and tell whether it was."""
        matches = self.at(*texts)
        self.index += matches
        return matches

    def expect(self, text: str) -> None:
        """Skip this token. NoNumber if it is not the current one."""
        if not self.take(text):
            raise NoNumber

    def sum(self) -> Fraction:
        """Return the value of a sum of products."""
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
        """Return the value of a product or quotient of powers; "2(3)" multiplies too."""
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
        """Read a value that may have a minus sign."""
        return -read() if self.take("-") else read()

    def mixed(self) -> Fraction:
        """Return the value of a power, or of an integer followed by a proper fraction: 2 1/2, 2\\frac{1}{2}."""
        is_integer = self.index < len(self.tokens) and self.tokens[self.index].text.isdigit()
        value = self.power()
        if not (is_integer and self.tokens[self.index - 1].text.isdigit()):
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
        """Return the value of an atom with what may follow it: !, ^, % or a degree sign."""
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
        """Raise to the power that follows a ^. NoNumber if the exponent is not an integer or the result too large."""
        braces = self.take("{")
        if self.kind() in ("unit", "word") or (braces and self.kind() == "letter"):
            raise NoNumber
        exponent = self.sum() if braces else self.signed(self.atom)
        if braces:
            self.expect("}")
        if exponent.denominator != 1 or (base == 0 and exponent <= 0) or self.at("^"):
            raise NoNumber
        digits = math.log10(max(abs(base.numerator), base.denominator)) if base else 0
        if abs(exponent) * digits > DIGITS:
            raise NoNumber
        self.rich = True
        return base ** int(exponent)

    def atom(self) -> Fraction:
        """Return the value of a number, a bracketed expression, a fraction or a root."""
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
                self.expect(closing)
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
        """Return the value of a command's argument: in braces, or the next digit."""
        if self.kind() == "number":
            token = self.tokens[self.index]
            if not token.text.isdigit():
                raise NoNumber
            rest = replace(token, text=token.text[1:], space=False, number=Number(Fraction(token.text[1:] or 0)))
            self.tokens = [*self.tokens[: self.index], *([rest] if rest.text else []), *self.tokens[self.index + 1 :]]
            return Fraction(token.text[0])
        self.expect("{")
        value = self.sum()
        self.expect("}")
        return value

    def root(self) -> Fraction:
        """Return the value of a root. NoNumber if it is not exact."""
        degree = 2
        if self.take("["):
            index = self.sum()
            self.expect("]")
            degree = int(index) if index.denominator == 1 and 2 <= index <= 10 else 0
        value = self.atom() if self.kind() == "number" else self.sqrt_argument()
        if not degree or (value < 0 and degree % 2 == 0):
            raise NoNumber
        sign = -1 if value < 0 else 1
        return sign * Fraction(_root(abs(value.numerator), degree), _root(value.denominator, degree))

    def sqrt_argument(self) -> Fraction:
        """Return the value under a root, in brackets or braces, or the next digit."""
        if self.at("("):
            return self.atom()
        return self.argument()

    def quotient(self, above: Fraction, below: Fraction) -> Fraction:
        """Divide. NoNumber for a division by 0."""
        if below == 0:
            raise NoNumber
        return self.bounded(above / below)

    def bounded(self, value: Fraction) -> Fraction:
        """Return the value. NoNumber if it has too many digits."""
        if max(abs(value.numerator), value.denominator) > 10 ** (2 * DIGITS):
            raise NoNumber
        return value


def _root(value: int, degree: int) -> int:
    """Return the exact root of an integer. NoNumber if there is none."""
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if middle**degree < value else (low, middle)
    if low**degree != value:
        raise NoNumber
    return low
