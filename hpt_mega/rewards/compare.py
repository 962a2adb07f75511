r"""Whether two final answers are the same: lists, tuples, intervals, matrices, relations, quantities, text.

An answer is taken apart into parts without commas, whose values value.py compares. No symbolic algebra here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from hpt_mega.rewards.expression import Tree, UnreadableError, read, symbols
from hpt_mega.rewards.latex import normalise, split_outside, squash, wrapped
from hpt_mega.rewards.units import conversion, scaled, split_unit
from hpt_mega.rewards.value import NoValueError, TooLargeError, agree, constant, inexact, proportion

MOST_PARTS = 64
SIGNIFICANT_DIGITS = 6  # from which on a rounded decimal stands for an exact value


class Outcome(NamedTuple):
    """same is None where the answer cannot be read here."""

    same: bool | None
    why: str


_THOUSANDS = re.compile(r"[-+]?¤?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])")
_NAME = r"(?:[A-Za-z]{1,2}'?|\\[A-Za-z]+|«[^»]{1,40}»|\|[A-Za-z]{1,3}\|)(?:_\{?\w+\}?)?"
_BARE_NAME = re.compile(
    rf"(?:\\(?:angle|triangle|deg|overline)\s*)?{_NAME}\s*(?:\([A-Za-z\\, \d]{{1,20}}\))?"
    r"|\\angle\s*[A-Z]{3}|[A-Z]{2,4}|\\overline\{[A-Z]{2}\}|«[^»]*»\s*\(?\w*\)?"
)
_NAMES_TUPLE = re.compile(r"\(?\s*[A-Za-z](?:_\{?\w\}?)?(?:\s*,\s*[A-Za-z](?:_\{?\w\}?)?)+\s*\)?")
_MATRIX = re.compile(r"\\begin\s*\{([bpvBV]?(?:small)?matrix|array)\}(?:\s*\{[lcr|]+\})?(.*?)\\end\s*\{\1\}")
_BASED = re.compile(r"(\d[\dA-F]*)\s*_\s*\{?\s*(?:«?)(\w+)(?:»?)\s*\}?")
_DECIMAL = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?")
_TIME = re.compile(r"(\d{1,2}):(\d\d)\s*«?\s*([AaPp])?\.?\s*[Mm]?\.?\s*»?")
_REAL_LINE = frozenset({"r", "allrealnumbers", "allreals", "allrealx", "reals", "thereals", "therealnumbers"})
_ADVANCED = re.compile(r"\\(?:int|sum|prod|lim|m[ai][xn]|gcd)|⦃.*[|:]")  # left to math-verify
_FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "=": "=", "≠": "≠"}


@dataclass(frozen=True)
class Group:
    """Several parts. brackets: "" of a bare list, "∪" of a union, else the two brackets."""

    items: tuple[str, ...]
    brackets: str
    variable: str = ""

    @property
    def is_ordered(self) -> bool:
        return self.brackets not in ("", "∪", "⦃⦄")


def compare(gold: str, given: str) -> Outcome:
    """Whether a given final answer is the gold one; both as written, without \\boxed."""
    try:
        return _compare(_prepared(gold), _prepared(given), 0)
    except TooLargeError as error:
        return Outcome(False, f"too large to compare: {error}")


def _prepared(text: str) -> str:
    text = normalise(text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text).replace("+∞", "∞")
    text = re.sub(r"⦃\s*⦄", "∅", text)
    folded = re.sub(r"[^a-z]", "", text.lower())
    if folded in _REAL_LINE and "\\" not in text and ("«" in text or len(text) > 3):
        return "(-∞,∞)"
    for _ in range(2):
        if len(text) > 1 and text[0] == "«" and text.find("»") == len(text) - 1 and not _is_text(text):
            text = text[1:-1].strip()
    if "≈" in text:
        exact, _, rounded = text.partition("≈")
        text = rounded if _BARE_NAME.fullmatch(exact.strip()) or not exact.strip() else exact
    return re.sub(r"\s*«\s*»", "", text).strip().rstrip(".;,").strip()


def _compare(gold: str, given: str, depth: int) -> Outcome:
    if squash(gold) == squash(given):
        return Outcome(bool(gold), "same text")
    if not gold or not given or depth > 8:
        return Outcome(False, "nothing to compare")
    matrices = _matrix(gold), _matrix(given)
    if any(matrices):
        return _compare_matrices(gold, given, *matrices, depth)
    if depth == 0:
        gold, given = _unnamed_tuple(gold), _unnamed_tuple(given)
    groups = _group(gold), _group(given)
    if groups[0] and groups[1]:
        return _compare_groups(groups[0], groups[1], depth)
    if groups[0] or groups[1]:
        return _compare_group_with_one(gold, given, groups, depth)
    return _compare_single(gold, given, depth)


def _unnamed_tuple(text: str) -> str:
    """(x, y) = (1, 2) and x ∈ {1, 2} without what is left of the sign."""
    for sign in "=∈":
        name, found, rest = text.partition(sign)
        if found and (
            _NAMES_TUPLE.fullmatch(name.strip()) if sign == "=" else _BARE_NAME.fullmatch(name.strip())
        ):
            return rest.strip()
    name, found, rest = text.partition("=")
    if found and _BARE_NAME.fullmatch(name.strip()) and (wrapped(rest.strip()) or "∪" in rest):
        return rest.strip()
    return text


def _group(text: str) -> Group | None:
    """The parts of a list, set, tuple, interval or union; None for a single value."""
    if _THOUSANDS.fullmatch(text):
        return None
    if len(parts := split_outside(text, "∪")) > 1:
        return Group(tuple(parts), "∪")
    if len(parts := [part for part in split_outside(text, ",;") if part]) > 1:
        return Group(tuple(one for part in parts for one in _signs(part)), "")
    if interval := _interval(text):
        return interval
    if (inside := wrapped(text)) is not None:
        left, content, right = inside
        if left == "⦃" and re.search(r"[|:]", content):
            return None  # {x | ...}
        parts = [part for part in split_outside(content, ",;") if part]
        if len(parts) > 1 or left == "⦃":
            signs = [one for part in parts for one in _signs(part)] if left == "⦃" else parts
            return Group(tuple(signs), left + right)
        return None
    if len(signs := _signs(text)) > 1:
        return Group(tuple(signs), "")
    if len(parts := split_outside(text, ":")) > 2:
        return Group(tuple(parts), "::")
    return None


def _signs(text: str) -> list[str]:
    """The two values (four, for two independent signs) that ± stands for."""
    if "±" not in text and "∓" not in text:
        return [text]
    if "∓" in text or text.count("±") == 1:
        return [text.replace("±", sign).replace("∓", other) for sign, other in ("+-", "-+")]
    if text.count("±") > 3:
        return [text]
    return [one for sign in "+-" for one in _signs(text.replace("±", sign, 1))]


def _interval(text: str) -> Group | None:
    """The interval that an inequality in one named variable describes, x ≠ a included."""
    signs = re.findall(r"[<>≤≥≠]", text)
    parts = [part.strip() for part in re.split(r"[<>≤≥≠]", text)]
    if len(signs) == 1 and not _BARE_NAME.fullmatch(parts[0]) and _BARE_NAME.fullmatch(parts[1]):
        signs, parts = [_FLIPPED[signs[0]]], parts[::-1]
    if "=" in text:
        return None
    if len(signs) == 1 and _BARE_NAME.fullmatch(parts[0]):
        name, bound = parts
        if signs[0] == "≠":
            return Group((f"(-∞,{bound})", f"({bound},∞)"), "∪", name)
        if signs[0] in "<≤":
            return Group(("-∞", bound), "(" + ("]" if signs[0] == "≤" else ")"), name)
        return Group((bound, "∞"), ("[" if signs[0] == "≥" else "(") + ")", name)
    if len(signs) == 2 and _BARE_NAME.fullmatch(parts[1]):
        if set(signs) <= set(">≥"):
            signs, parts = [_FLIPPED[sign] for sign in reversed(signs)], parts[::-1]
        if set(signs) <= set("<≤"):
            brackets = ("[" if signs[0] == "≤" else "(") + ("]" if signs[1] == "≤" else ")")
            return Group((parts[0], parts[2]), brackets, parts[1])
    return None


def _compare_groups(gold: Group, given: Group, depth: int) -> Outcome:
    if gold.variable and given.variable and squash(gold.variable) != squash(given.variable):
        return Outcome(False, f"about {given.variable}, not {gold.variable}")
    if len(gold.items) != len(given.items):
        return Outcome(False, f"{len(given.items)} parts, not {len(gold.items)}")
    if len(gold.items) > MOST_PARTS:
        return Outcome(False, f"{len(gold.items)} parts, at most {MOST_PARTS} are compared")
    brackets = {gold.brackets, given.brackets}
    if "∪" in brackets and brackets - {"∪", ""}:
        return Outcome(False, "a union and no union")
    if len(gold.items) == 2 and "" not in brackets and len(brackets) > 1 and brackets & {"[]", "[)", "(]"}:
        return Outcome(False, "ends open and closed differ")
    if "⦃⦄" in brackets and brackets - {"⦃⦄", ""}:
        return Outcome(False, "a set and an ordered tuple")
    names = [[_named(item)[0] for item in group.items] for group in (gold, given)]
    is_named = [all(row) and len(set(row)) == len(row) for row in names]
    if all(is_named):
        return _every(
            [
                _compare(item, given.items[names[1].index(name)], depth + 1)
                if name in names[1]
                else Outcome(False, f"no value of {name}")
                for name, item in zip(names[0], gold.items, strict=True)
            ]
        )
    if gold.is_ordered or given.is_ordered or any(is_named):  # p = 2, q = 3 is not 3, 2
        pairs = zip(gold.items, given.items, strict=True)
        return _every([_compare(one, other, depth + 1) for one, other in pairs])
    return _unordered(gold.items, given.items, depth)


def _every(outcomes: list[Outcome]) -> Outcome:
    for outcome in outcomes:
        if outcome.same is False:
            return Outcome(False, f"a part differs: {outcome.why}")
    if all(outcome.same for outcome in outcomes):
        return Outcome(True, "every part is equal")
    return Outcome(None, "a part cannot be read")


def _unordered(gold: tuple[str, ...], given: tuple[str, ...], depth: int) -> Outcome:
    left = list(given)
    for item in gold:
        outcomes = [_compare(item, other, depth + 1).same for other in left]
        if True in outcomes:
            left.pop(outcomes.index(True))
        elif None in outcomes:
            return Outcome(None, "a part cannot be read")
        else:
            return Outcome(False, f"{item[:40]} is missing")
    return Outcome(True, "the same parts")


def _compare_group_with_one(
    gold: str, given: str, groups: tuple[Group | None, Group | None], depth: int
) -> Outcome:
    for text, group in zip((gold, given), groups, strict=True):
        if group is not None and group.brackets == "⦃⦄" and len(group.items) == 1:
            other = given if text is gold else gold
            return _compare(
                *((group.items[0], other) if text is gold else (other, group.items[0])), depth + 1
            )
        if group is None and "," in text and _THOUSANDS.fullmatch(text):  # 100,200 may be two numbers
            spaced = text.replace(",", ", ")
            return _compare(*((spaced, given) if text is gold else (gold, spaced)), depth + 1)
        if group is None and (inside := wrapped(text)) is not None and inside[0] == "(" and depth < 8:
            return _compare(*((inside[1], given) if text is gold else (gold, inside[1])), depth + 1)
    if groups[0] is not None and groups[0].brackets == "::":
        return Outcome(False, "a ratio and no ratio")
    if _ADVANCED.search(gold + given):
        return Outcome(None, "beyond the grammar")
    return Outcome(False, "several values and a single one")


def _matrix(text: str) -> list[list[str]] | None:
    """Rows of a text that is one matrix; None otherwise."""
    match = _MATRIX.fullmatch(_bare_matrix(text))
    if match is None:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^]]*\])?", match[2].replace(r"\hline", "")) if row.strip()]
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def _bare_matrix(text: str) -> str:
    _, sign, rest = text.partition("=")
    if sign and rest.strip().startswith(r"\begin"):
        text = rest.strip()
    inside = wrapped(text)
    return inside[1] if inside is not None and inside[0] in "([" and inside[1].startswith(r"\begin") else text


def _compare_matrices(
    gold: str, given: str, one: list[list[str]] | None, other: list[list[str]] | None, depth: int
) -> Outcome:
    if one is None or other is None:  # a vector may be written as a tuple
        matrix, text = (one, given) if one is not None else (other, gold)
        group = _group(_unnamed_tuple(text))
        assert matrix is not None
        cells = [cell for row in matrix for cell in row]
        if group is None or group.brackets not in ("()", "⟨⟩", "[]") or min(len(matrix), len(matrix[0])) != 1:
            return Outcome(None if "\\begin" in text else False, "a matrix and no matrix")
        return _compare_groups(Group(tuple(cells), "()"), Group(group.items, "()"), depth)
    if [len(row) for row in one] != [len(row) for row in other]:
        return Outcome(False, "matrices of other shapes")
    if len(one) * len(one[0]) > MOST_PARTS:
        return Outcome(False, f"at most {MOST_PARTS} entries are compared")
    pairs = [(a, b) for rows in zip(one, other, strict=True) for a, b in zip(*rows, strict=True)]
    return _every([_compare(a, b, depth + 1) for a, b in pairs])


def _named(text: str) -> tuple[str, str]:
    """("x", "5") of "x = 5" or "5 = x"; ("", text) where no bare name stands on a side."""
    parts = split_outside(text, "=")
    if len(parts) < 2 or any(sign in text for sign in "<>≤≥≠"):
        return "", text
    if _BARE_NAME.fullmatch(parts[0]):
        return squash(parts[0]), parts[-1]
    if len(parts) == 2 and _BARE_NAME.fullmatch(parts[1]) and not _is_text(parts[1]):
        return squash(parts[1]), parts[0]
    return "", text


def _compare_single(gold: str, given: str, depth: int) -> Outcome:
    (name, body), (other_name, other_body) = _named(gold), _named(given)
    if name or other_name or "=" in gold or any(sign in gold for sign in "<>≤≥≠"):
        if (name or _relation(gold)) and (other_name or _relation(given)):
            if name == other_name or ("(" in name + other_name and name and other_name):
                outcome = _compare(body, other_body, depth + 1)
                if outcome.same or not (symbols_of(body) or symbols_of(other_body)):
                    return outcome
            return _compare_relations(gold, given)
        if name or other_name:
            if not name and _relation(gold):
                return Outcome(False, "a relation and a value")
            return _compare(body, other_body, depth + 1)
    if _relation(given) and not _relation(gold):
        parts = split_outside(given, "=")
        if len(parts) > 1 and all(_compare(parts[-1], part, depth + 1).same for part in parts[:-1]):
            return _compare(gold, parts[-1], depth + 1)  # 1200 + 34 = 1234
        return Outcome(False, "a relation where a value is asked for")
    if _relation(gold):
        return Outcome(False, "no relation")
    return _compare_text(gold, given) or _compare_quantities(gold, given)


def symbols_of(text: str) -> bool:
    """Whether a text has free variables; also where it cannot be read."""
    try:
        return bool(symbols(read(text)))
    except UnreadableError:
        return True


def _relation(text: str) -> tuple[str, str, str] | None:
    """(left, sign, right) of a single relation."""
    signs = re.findall(r"[=<>≤≥≠]", text)
    if len(signs) != 1:
        return ("", "", "") if signs else None
    left, right = re.split(r"[=<>≤≥≠]", text)
    return left.strip(), signs[0], right.strip()


def _compare_relations(gold: str, given: str) -> Outcome:
    one, other = _relation(gold), _relation(given)
    assert one is not None and other is not None
    if not one[1] or not other[1]:
        return Outcome(False, "chains of relations that differ")
    try:
        sides: list[Tree] = [("sub", read(left), read(right)) for left, _, right in (one, other)]
    except UnreadableError as error:
        return Outcome(None if _ADVANCED.search(gold + given) else False, str(error)[:80])
    ratio = proportion(*sides)
    if not ratio:
        return Outcome(False, "relations that differ")
    sign = other[1] if ratio > 0 else _FLIPPED[other[1]]
    return Outcome(sign == one[1], "the same relation" if sign == one[1] else f"{sign} and not {one[1]}")


def _is_text(text: str) -> bool:
    """Whether it is words: no digit, operator or command, and marked as text or with a longer word."""
    if not re.fullmatch(r"[A-Za-z«»\s'.,()-]+", text) or not re.search("[A-Za-z]{2}", text):
        return False
    words = re.findall("[A-Za-z]+", text)
    functions = ("sin", "cos", "tan", "log", "exp", "sqrt")
    marked = "«" in text and len(max(words, key=len)) > 1 and "-" not in re.sub("«[^»]*»", "", text)
    return marked or any(len(word) > 3 and not word.startswith(functions) for word in words)


def _fold(text: str) -> str:
    text = re.sub(r"[^a-z0-9 ]", "", text.casefold().replace("-", " "))
    return re.sub(r"^(?:the|a|an) ", "", " ".join(text.split()))


def _compare_text(gold: str, given: str) -> Outcome | None:
    """The verdict on words, times of day and numbers in a base; None where values are to be compared."""
    one, other = _TIME.fullmatch(gold), _TIME.fullmatch(given)
    if one and other:
        halves = [(match[3] or "").lower() for match in (one, other)]
        same = one[1].lstrip("0") == other[1].lstrip("0") and one[2] == other[2]
        same &= "" in halves or halves[0] == halves[1]
        return Outcome(same, "the same time" if same else "another time")
    one, other = _BASED.fullmatch(gold), _BASED.fullmatch(given)
    if one or other:
        same = bool(one and other and one[1].lstrip("0") == other[1].lstrip("0") and one[2] == other[2])
        return Outcome(same, "the same digits and base" if same else "other digits or another base")
    if not _is_text(gold) and not _is_text(given):
        return None
    same = _fold(gold) == _fold(given)
    if not same and re.search("[«»]", gold + given) is None and max(len(gold), len(given)) <= 6:
        return None  # short products of variables
    return Outcome(same, "the same words" if same else "other words")


def _compare_quantities(gold: str, given: str) -> Outcome:
    (value, unit), (other_value, other_unit) = split_unit(scaled(gold)), split_unit(scaled(given))
    factor = conversion(unit, other_unit)
    if factor is None:
        return Outcome(False, f"{other_unit.strip('«» ')} and not {unit.strip('«» ')}")
    value, other_value = _plain(value), _plain(other_value)
    for angle, other in ((value, other_unit), (other_value, unit)):
        if angle.endswith("°") and other and conversion("degree", other) is None:
            return Outcome(False, f"degrees and {other.strip('«» ')}")
    if "∞" in value + other_value:
        return Outcome(value == other_value, "infinity" if value == other_value else "infinity and a value")
    if _is_text(value) or _is_text(other_value):
        return Outcome(False, "words and a value")
    try:
        gold_tree, tree = _read_quantity(value, other_value), _read_quantity(other_value, value)
    except UnreadableError as error:
        if len(given) > 300 or "nested" in str(error):
            return Outcome(False, f"not read: {str(error)[:80]}")
        return Outcome(None, str(error)[:80])
    if factor != 1:
        tree = ("mul", tree, ("number", factor))
    return _compare_values(value, other_value, gold_tree, tree)


def _compare_values(value: str, other_value: str, gold_tree: Tree, tree: Tree) -> Outcome:
    """The verdict on two expressions, given as text and as tree."""
    if gold_tree == tree:
        return Outcome(True, "same expression")
    same = agree(gold_tree, tree)
    if same is None:
        return Outcome(False, "no value to compare")
    if same:
        return Outcome(True, "equal in value")
    if value.endswith("%") != other_value.endswith("%") and agree(
        *(read(text.rstrip("%")) for text in (value, other_value))
    ):
        return Outcome(True, "equal, percent sign left out")
    if _rounds(value, other_value, gold_tree, tree):
        return Outcome(True, f"equal when rounded, {SIGNIFICANT_DIGITS} or more digits")
    return Outcome(False, "different in value")


def _plain(value: str) -> str:
    """Without thousands commas, a lone degree sign at the end, or brackets around a single value."""
    if _THOUSANDS.search(value):
        value = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", value)
    value = re.sub(r"\s*«\s*(?:percent|percentage|pct)\s*»|(?<=\d)\s+(?:percent|percentage|pct)$", "%", value)
    while (inside := wrapped(value)) is not None and inside[0] in "([":
        value = inside[1]
    return re.sub(r"(?<=\d)\s*:\s*(?=\d)", "/", value.replace("\\%", "%")).strip()


def _read_quantity(value: str, other: str) -> Tree:
    r"""45° reads as 45 where the sign ends a plain number, unless the other side is in radians."""
    if not (r"\pi" in other and "°" not in other) and re.fullmatch(r"[-+\d./\s\\fracsqt{}]+°", value):
        value = value[:-1]
    return read(value)


def _rounds(value: str, other_value: str, gold_tree: Tree, tree: Tree) -> bool:
    """Whether one side is a decimal of six or more significant digits, to which the other, exact, rounds."""
    for text, exact_text, exact in ((value, other_value, tree), (other_value, value, gold_tree)):
        if not _DECIMAL.fullmatch(text) or "." in exact_text:
            continue
        mantissa = re.split("[eE]", text)[0]
        digits = mantissa.lstrip("-+0.").replace(".", "")
        if len(digits) < SIGNIFICANT_DIGITS or symbols(exact):
            return False
        try:
            number = constant(exact)
        except NoValueError:
            return False
        unit = Fraction(text) / Fraction(mantissa) if Fraction(mantissa) else Fraction(1)
        half = unit / 10 ** len(mantissa.partition(".")[2]) / 2
        error = abs(number - (Fraction(text) if isinstance(number, Fraction) else inexact(Fraction(text))))
        return bool(error <= (half if isinstance(number, Fraction) else inexact(half)))
    return False
