r"""Numbers with a unit behind: where the unit starts, and whether two units are the same or convert.

A unit that only one side names does not count against it; two that differ do.
"""

from __future__ import annotations

import re
from fractions import Fraction

Unit = tuple[tuple[tuple[str, int], ...], Fraction]  # ((base unit, exponent), ...), factor to the base units

_LENGTH, _MASS, _TIME, _MONEY = "meter", "gram", "second", "dollar"
_BASE: dict[str, tuple[str, str]] = {  # unit: (base unit, factor)
    "m": (_LENGTH, "1"), "meter": (_LENGTH, "1"), "metre": (_LENGTH, "1"), "cm": (_LENGTH, "1/100"),
    "centimeter": (_LENGTH, "1/100"), "centimetre": (_LENGTH, "1/100"), "mm": (_LENGTH, "1/1000"),
    "millimeter": (_LENGTH, "1/1000"), "km": (_LENGTH, "1000"), "kilometer": (_LENGTH, "1000"),
    "kilometre": (_LENGTH, "1000"), "nm": (_LENGTH, "1/1000000000"), "in": ("inch", "1"),
    "inch": ("inch", "1"),
    "inche": ("inch", "1"), "ft": ("inch", "12"), "foot": ("inch", "12"), "feet": ("inch", "12"),
    "yd": ("inch", "36"), "yard": ("inch", "36"), "mi": ("inch", "63360"), "mile": ("inch", "63360"),
    "g": (_MASS, "1"), "gram": (_MASS, "1"), "kg": (_MASS, "1000"), "kilogram": (_MASS, "1000"),
    "mg": (_MASS, "1/1000"), "lb": ("pound", "1"), "pound": ("pound", "1"), "oz": ("ounce", "1"),
    "ounce": ("ounce", "1"), "s": (_TIME, "1"), "sec": (_TIME, "1"), "second": (_TIME, "1"),
    "ms": (_TIME, "1/1000"), "min": (_TIME, "60"), "minute": (_TIME, "60"), "h": (_TIME, "3600"),
    "hr": (_TIME, "3600"), "hour": (_TIME, "3600"), "day": (_TIME, "86400"), "week": (_TIME, "604800"),
    "dollar": (_MONEY, "1"), "buck": (_MONEY, "1"), "usd": (_MONEY, "1"), "cent": (_MONEY, "1/100"),
    "l": ("liter", "1"), "liter": ("liter", "1"), "litre": ("liter", "1"), "ml": ("liter", "1/1000"),
    "milliliter": ("liter", "1/1000"), "joule": ("J", "1"), "j": ("J", "1"), "kj": ("J", "1000"),
    "n": ("newton", "1"), "newton": ("newton", "1"), "k": ("kelvin", "1"), "kelvin": ("kelvin", "1"),
    "degree": ("degree", "1"), "deg": ("degree", "1"), "rad": ("radian", "1"), "radian": ("radian", "1"),
    "unit": ("unit", "1"),
}  # fmt: skip
# Words that change a number's value, or that are no unit at all.
_NO_UNIT = frozenset(
    re.findall(
        r"\S+",
        "million billion trillion thousand hundred dozen percent percentage pct half halves third "
        "quarter tenth hundredth squared cubed factorial over plus minus times and or sin cos tan log ln "
        "exp sqrt pi not more less mod if for where with when is to of ",
    )
)
_SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_SCALE = re.compile(rf"(?<=[\d.}}\s])\s*«?\s*({'|'.join(_SCALES)})s?\b\s*»?(.*)")
_KNOWN = "|".join(sorted((name for name in _BASE if len(name) > 1), key=len, reverse=True))
_TAIL = re.compile(
    r"\s*(?P<unit>(?:«[^»]*»"  # in \text{...}
    rf"|(?<=[\d)}}°])(?:{_KNOWN})s?(?![A-Za-z])"  # 5cm
    r"|(?<=[\d)}°i]\s)(?:[A-Za-z]{4,}|(?:cm|mm|km|ft|sq)(?![A-Za-z]))"  # 5 apples, 4\pi cm
    rf"|(?<=\d\s)(?:{_KNOWN}|[mgshLNJKVWCF])(?![A-Za-z]))"  # 5 m, 5 hr
    r"(?:«[^»]*»|[A-Za-z]+|\^\s*\{?\s*-?\d\s*\}?|[/*.,\s-]|°)*)$"
)
_PIECE = re.compile(r"[A-Za-z]+|\^\s*\{?\s*(-?\d)\s*\}?|/")


def split_unit(text: str) -> tuple[str, str]:
    """(value, unit) of a normalised quantity; the unit is "" without one."""
    text = text.strip()
    if text.startswith("¤") or text.startswith("-¤"):
        return text.replace("¤", "").strip(), "dollar"
    if text.endswith("¤"):
        return text[:-1].strip(), "dollar"
    match = _TAIL.search(text)
    if match is None or not any(
        character.isdigit() or character == "\\" for character in text[: match.start()]
    ):
        return text, ""
    value, unit = text[: match.start()].strip(), match["unit"]
    if _NO_UNIT & {word.lower() for word in re.findall("[A-Za-z]+", unit)}:
        return text, ""
    return value, unit


def scaled(text: str) -> str:
    """'2 million' and '3 dozen' as a product; other text as it is."""
    match = _SCALE.search(text)
    if match is None:
        return text
    return f"{text[: match.start()]} * {_SCALES[match[1]]} {match[2]}".strip()


def read_unit(text: str) -> Unit:
    """Base units with their exponents, and the factor to them; unknown words are base units of their own."""
    text = text.replace("°", " degree ").lower()
    text = re.sub(r"\bper\b", "/", text)
    text = re.sub(r"\b(?:square|sq)\.?\s+«?\s*([a-z]+)", r"\1^2", text)
    text = re.sub(r"\bcubic\s+«?\s*([a-z]+)", r"\1^3", text)
    powers: dict[str, int] = {}
    factor, sign, last = Fraction(1), 1, ("", Fraction(1), 1)
    for match in _PIECE.finditer(text):
        if match[0] == "/":
            sign = -1
        elif match[1] is not None:
            base, size, direction = last
            extra = direction * (int(match[1]) - 1)
            powers[base] = powers.get(base, 0) + extra
            factor *= size**extra
        else:
            word = match[0]
            base, ratio = (
                _BASE.get(word) or _BASE.get(word.removesuffix("s")) or (word.removesuffix("s"), "1")
            )
            last = (base, Fraction(ratio), sign)
            powers[base] = powers.get(base, 0) + sign
            factor *= Fraction(ratio) ** sign
    return tuple(sorted((base, power) for base, power in powers.items() if power and base)), factor


def conversion(gold: str, given: str) -> Fraction | None:
    """What the given number is multiplied by to be in the gold's unit; None where units differ in kind."""
    if not gold or not given:
        return Fraction(1)
    (base, factor), (other, other_factor) = read_unit(gold), read_unit(given)
    if not _is_named(base) or not _is_named(other):
        return Fraction(1)
    return other_factor / factor if base == other else None


def _is_named(base: tuple[tuple[str, int], ...]) -> bool:
    """'units' and 'square units' stand for whatever unit is meant."""
    return bool(base) and all(name != "unit" for name, _ in base)
