"""Values of expressions at points, and equality of two expressions by their values.

Two expressions are equal where they agree to 30 digits at every point tried (Schwartz and Zippel). The points
are fixed, so that a verdict is the same in every process.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import mpmath  # type: ignore[import-untyped]

from hpt_mega.rewards.expression import Tree, symbols

BITS = 40_000  # of an exact number
MAGNITUDE = 3_000  # digits before the point of any other number
FACTORIAL = 3_000
DIGITS = 50
POINTS = 6  # and as many again where values do not exist

Number = Any  # Fraction where exact, else mpmath's mpf or mpc


class NoValueError(Exception):
    """The expression has no value at this point."""


class TooLargeError(Exception):
    """The value has more digits than are computed here."""


def evaluate(tree: Tree, point: Mapping[str, Fraction], real: bool = False) -> Number:
    """Value at a point {name: value}. real: roots and logarithms of negative numbers have no value."""
    kind = tree[0]
    if kind == "number":
        return tree[1]
    if kind == "symbol":
        return point[tree[1]]
    if kind in _CONSTANTS:
        return _CONSTANTS[kind]()
    if kind == "function":
        return _function(tree[1], evaluate(tree[2], point, real), real)
    operands = [evaluate(part, point, real) for part in tree[1:]]
    if kind in ("pow", "root"):
        base, exponent = operands
        if kind == "root":
            exponent = _divide(Fraction(1), exponent)
            if _is_exact(base) and base < 0 and _is_exact(exponent) and exponent.denominator % 2:
                return -_power(-base, exponent, real)  # the real cube root
        return _power(base, exponent, real)
    return _bounded(_OPERATIONS[kind](*operands))


def _infinity() -> Number:
    raise NoValueError("infinity")


_CONSTANTS: dict[str, Callable[[], Number]] = {
    "pi": lambda: +mpmath.mp.pi,
    "e": lambda: +mpmath.mp.e,
    "i": lambda: mpmath.mpc(0, 1),
    "degree": lambda: mpmath.mp.pi / 180,
    "infinity": _infinity,
}


def _is_exact(value: Number) -> bool:
    return isinstance(value, Fraction)


def inexact(value: Number) -> Number:
    """As mpmath's float, at the precision of now."""
    return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _bounded(value: Number) -> Number:
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
            raise TooLargeError("an exact number beyond bounds")
    elif not mpmath.isfinite(value):
        raise NoValueError("not finite")
    elif value and abs(mpmath.mag(value)) > MAGNITUDE * 3.33:
        raise TooLargeError("a number beyond bounds")
    return value


def _both(operation: Callable[[Number, Number], Number]) -> Callable[[Number, Number], Number]:
    def apply(left: Number, right: Number) -> Number:
        if _is_exact(left) and _is_exact(right):
            return operation(left, right)
        return operation(inexact(left), inexact(right))

    return apply


def _divide(left: Number, right: Number) -> Number:
    if right == 0:
        raise NoValueError("division by zero")
    return _both(lambda a, b: a / b)(left, right)


def _power(base: Number, exponent: Number, real: bool) -> Number:
    if base == 0:
        if _real(exponent) <= 0 and exponent != 0:
            raise NoValueError("zero to a negative power")
        return Fraction(1 if exponent == 0 else 0)
    if _is_exact(exponent) and exponent.denominator == 1:
        size = abs(exponent.numerator)
        if _is_exact(base):
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if abs(base) != 1 and size * (bits - 1) > BITS:
                raise TooLargeError("a power beyond bounds")
            return base ** (size % 2 if base == -1 else 1 if base == 1 else int(exponent))
    elif real and _real(base) < 0:
        raise NoValueError("a root of a negative number")
    base, exponent = inexact(base), inexact(exponent)
    size = abs(exponent) * (abs(mpmath.log(abs(base))) + 4)
    if size > MAGNITUDE * math.log(10):
        raise TooLargeError("a power beyond bounds")
    return _bounded(mpmath.power(base, exponent))


def _real(value: Number) -> Number:
    return value if isinstance(value, Fraction) else mpmath.re(value)


def _factorial(value: Number) -> Number:
    if abs(value) > FACTORIAL:
        raise TooLargeError("a factorial beyond bounds")
    if isinstance(value, Fraction) and value.denominator == 1:
        if value < 0:
            raise NoValueError("factorial of a negative number")
        return Fraction(math.factorial(int(value)))
    return mpmath.gamma(inexact(value) + 1)


def _binomial(top: Number, bottom: Number) -> Number:
    return _divide(
        _factorial(top),
        _both(lambda a, b: a * b)(_factorial(bottom), _factorial(_OPERATIONS["sub"](top, bottom))),
    )


def _function(name: str, value: Number, real: bool) -> Number:
    value = inexact(value)
    if name in ("ln", "log", "lg"):
        if value == 0 or (real and _real(value) < 0):
            raise NoValueError("logarithm of no positive number")
        return mpmath.log(value) / (mpmath.log(10) if name == "lg" else 1)
    if name in ("exp", "sinh", "cosh", "tanh") and abs(value) > MAGNITUDE * 2:
        raise TooLargeError("an exponential beyond bounds")
    if abs(value) > 10**DIGITS:
        raise TooLargeError(f"{name} of a number beyond bounds")
    inverse = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}
    try:
        return _bounded(getattr(mpmath, inverse.get(name, name))(value))
    except ZeroDivisionError as error:
        raise NoValueError(f"{name} has a pole") from error


_OPERATIONS: dict[str, Callable[..., Number]] = {
    "add": _both(lambda a, b: a + b),
    "sub": _both(lambda a, b: a - b),
    "mul": _both(lambda a, b: a * b),
    "div": _divide,
    "neg": lambda a: -a,
    "abs": abs,
    "factorial": _factorial,
    "binomial": _binomial,
}


def point(names: frozenset[str], index: int) -> dict[str, Fraction]:
    """The index-th point; signs alternate in all patterns, from the third point on."""
    found = {}
    for name in names:
        spread = zlib.crc32(f"{name} {index}".encode())
        value = Fraction(spread % 3989 + 211, 1009)
        found[name] = -value if index >= 3 and (spread >> 16) % 2 else value
    return found


def same(left: Number, right: Number) -> bool:
    """Equality of two values: exact, or to 30 digits relative to the larger."""
    if _is_exact(left) and _is_exact(right):
        return left == right
    left, right = inexact(left), inexact(right)
    size = max(abs(left), abs(right))
    return abs(left - right) <= size * mpmath.mpf(10) ** (20 - mpmath.mp.dps) or size < mpmath.mpf(10) ** (
        15 - mpmath.mp.dps
    )


def constant(tree: Tree, digits: int = DIGITS) -> Number:
    """Value of an expression without variables; raises NoValueError, TooLargeError."""
    with mpmath.workdps(digits):
        return evaluate(tree, {})


def digits_for(*values: Number) -> int:
    """Digits that still tell a difference of one where values are large."""
    sizes = [int(mpmath.mag(inexact(value)) * 0.302) for value in values if value]
    return DIGITS + max([0, *sizes])


def agree(left: Tree, right: Tree) -> bool | None:
    """Whether two expressions have equal values wherever both have one; None where too few points have.

    Raises TooLargeError.
    """
    names = symbols(left) | symbols(right)
    counted = 0
    for index in range(2 * POINTS if names else 1):
        real = index >= 3
        where = point(names, index)
        with mpmath.workdps(DIGITS):
            try:
                values = [evaluate(tree, where, real) for tree in (left, right)]
            except (NoValueError, OverflowError, ValueError, ZeroDivisionError, TypeError):
                continue
            digits = digits_for(*values)
        with mpmath.workdps(digits):
            if digits > DIGITS + 15:
                values = [evaluate(tree, where, real) for tree in (left, right)]
            if not same(*values):
                return False
        counted += 1
        if counted == POINTS:
            break
    return True if counted >= (2 if names else 1) else None


def proportion(left: Tree, right: Tree) -> Number | None:
    """The constant that left / right is at every point; None where it is not constant or not real."""
    names = symbols(left) | symbols(right)
    found: list[Number] = []
    for index in range(2 * POINTS):
        with mpmath.workdps(DIGITS):
            try:
                top, bottom = (evaluate(tree, point(names, index), index >= 3) for tree in (left, right))
                ratio = _divide(top, bottom)
            except (NoValueError, OverflowError, ValueError, ZeroDivisionError, TypeError):
                continue
            if ratio == 0 or abs(mpmath.im(inexact(ratio))) > mpmath.mpf(10) ** -30:
                return None
            if found and not same(found[0], ratio):
                return None
            found.append(_real(ratio))
        if len(found) == POINTS:
            break
    return found[0] if names and len(found) >= 2 else None
