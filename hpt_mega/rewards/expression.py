r"""Mathematical expressions read from normalised LaTeX, by recursive descent. Their values are in value.py.

Nothing is evaluated or executed here; length and depth are bounded. See UnreadableError.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

LENGTH = 1_000  # characters of an expression
DEPTH = 40  # of nested brackets

Tree = tuple[Any, ...]  # (operation, operands...)


class UnreadableError(Exception):
    """The text is no expression of the grammar here: sums, integrals, prose, unbalanced brackets."""


_TOKEN = re.compile(
    r"\s*(?:(?P<repeating>\d*\.\d*\\overline\s*\{\d+\})"
    r"|(?P<scientific>(?:\d+\.?\d*|\.\d+)[eE][-+]?\d{1,4}(?![\d.A-Za-z]))"
    r"|(?P<number>\d+\.\d+|\.\d+|\d+\.?)|(?P<command>\\[A-Za-z]+)|(?P<word>«[^»]*»)"
    r"|(?P<letter>[A-Za-z]'*)|(?P<sign>[-+*/^_!(){}\[\]|°%∞]))"
)
_FUNCTIONS = frozenset(
    re.findall(
        r"\S+",
        "sin cos tan cot sec csc arcsin arccos arctan ln log exp sinh cosh tanh lg ",
    )
)
_PLAIN_FUNCTION = re.compile(
    r"(?<![A-Za-z\\])(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi|frac)(?![A-Za-z])"
)
_LETTERS = frozenset(
    re.findall(
        r"\S+",
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon "
        "phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar ell ",
    )
)
_ACCENTS = frozenset(
    re.findall(
        r"\S+",
        "dot ddot hat bar vec tilde overline overrightarrow widehat ",
    )
)
_STARTS_OPERAND = frozenset({"number", "command", "letter", "word"})


@dataclass
class _Reader:
    """Recursive descent over tokens; each method reads one level of the grammar."""

    tokens: list[tuple[str, str]]
    at: int = 0
    depth: int = 0
    bars: int = 0

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")

    def take(self, text: str) -> bool:
        if self.peek()[1] != text or self.peek()[0] == "end":
            return False
        self.at += 1
        return True

    def need(self, text: str) -> None:
        if not self.take(text):
            raise UnreadableError(f"'{self.peek()[1]}' where '{text}' was expected")

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > DEPTH:
            raise UnreadableError(f"brackets nested deeper than {DEPTH}")
        negative = False
        while self.peek()[1] in ("+", "-") and self.peek()[0] == "sign":
            negative ^= self.peek()[1] == "-"
            self.at += 1
        tree = ("neg", self.product()) if negative else self.product()
        while self.peek() in (("sign", "+"), ("sign", "-")):
            sign = self.peek()[1]
            self.at += 1
            tree = ("add" if sign == "+" else "sub", tree, self.signed(self.product))
        self.depth -= 1
        return tree

    def signed(self, read: Any) -> Tree:
        if self.take("-"):
            return ("neg", self.signed(read))
        return self.signed(read) if self.take("+") else read()

    def product(self) -> Tree:
        tree = self.power()
        while True:
            if self.take("*"):
                tree = ("mul", tree, self.signed(self.power))
            elif self.take("/"):
                tree = ("div", tree, self.signed(self.power))
            elif self.starts_operand():
                tree = ("mul", tree, self.power())
            else:
                return tree

    def starts_operand(self) -> bool:
        kind, text = self.peek()
        return kind in _STARTS_OPERAND or text in ("(", "{", "[", "∞") or (text == "|" and not self.bars)

    def power(self) -> Tree:
        tree = self.postfix(self.operand())
        if self.take("^"):
            return self.postfix(("pow", tree, self.script()))
        return tree

    def script(self) -> Tree:
        self.depth += 1
        if self.depth > DEPTH:
            raise UnreadableError(f"powers nested deeper than {DEPTH}")
        tree: Tree
        if self.take("{"):
            tree = self.sum()
            self.need("}")
        else:
            tree = self.signed(self.operand)
        if self.take("^"):
            tree = ("pow", tree, self.script())
        self.depth -= 1
        return tree

    def postfix(self, tree: Tree) -> Tree:
        while True:
            if self.take("!"):
                tree = ("factorial", tree)
            elif self.take("°"):
                tree = ("mul", tree, ("degree",))
            elif self.take("%"):
                tree = ("div", tree, ("number", Fraction(100)))
            else:
                return tree

    def operand(self) -> Tree:
        kind, text = self.peek()
        self.at += 1
        if kind == "number":
            return self.mixed(Fraction(text))
        if kind == "letter":
            return self.name(text)
        if kind == "command":
            return self.command(text[1:])
        if kind == "word" and re.fullmatch(r"«[A-Za-z]'?»", text):
            return self.name(text[1:-1])
        if text in ("(", "{", "["):
            tree = self.sum()
            self.need({"(": ")", "{": "}", "[": "]"}[text])
            return tree
        if text == "|":
            self.bars += 1
            tree = self.sum()
            self.bars -= 1
            self.need("|")
            return ("abs", tree)
        if text == "∞":
            return ("infinity",)
        raise UnreadableError(
            f"'{text}' starts no operand" if text else "the end where an operand was expected"
        )

    def mixed(self, whole: Fraction) -> Tree:
        r"""3\frac{1}{2} and 3 1/2 are mixed numbers where the fraction is proper and of whole numbers."""
        ahead = [text for _, text in self.tokens[self.at : self.at + 7]]
        if (
            whole.denominator == 1
            and ahead[:1] == [r"\frac"]
            and ahead[1:7:3] == ["{", "{"]
            and "".join(ahead[3:7:3]) == "}}"
        ):
            top, bottom, used = ahead[2], ahead[5], 7
        elif whole.denominator == 1 and len(ahead) >= 3 and ahead[1] == "/":
            top, bottom, used = ahead[0], ahead[2], 3
        else:
            return ("number", whole)
        if not (top.isdecimal() and bottom.isdecimal() and 0 < int(top) < int(bottom)):
            return ("number", whole)
        self.at += used
        return ("number", whole + Fraction(int(top), int(bottom)))

    def name(self, name: str) -> Tree:
        if self.take("_"):
            name += "_" + self.raw()
        ahead = [text for _, text in self.tokens[self.at : self.at + 3]]
        if re.match("[A-Zfgh]", name) and ahead[:1] == ["("] and ahead[2:] == [")"] and ahead[1].isdecimal():
            self.at += 3
            return ("symbol", f"{name}({ahead[1]})")  # f(0) is the value of a function, no product with 0
        if name == "e":
            return ("e",)
        return ("i",) if name == "i" else ("symbol", name)

    def raw(self) -> str:
        """The text of a subscript."""
        if not self.take("{"):
            self.at += 1
            return self.tokens[self.at - 1][1] if self.at <= len(self.tokens) else ""
        depth, parts = 1, []
        while depth:
            kind, text = self.peek()
            if kind == "end":
                raise UnreadableError("a subscript that does not end")
            depth += (text == "{") - (text == "}")
            parts.append(text.strip("«»"))
            self.at += 1
        return "".join(parts[:-1])

    def argument(self) -> Tree:
        r"""What \frac or \sqrt takes: a group, else one character."""
        if self.take("{"):
            tree = self.sum()
            self.need("}")
            return tree
        kind, text = self.peek()
        if kind == "number" and len(text) > 1 and text.isdecimal():
            self.tokens[self.at] = ("number", text[1:])
            return ("number", Fraction(text[0]))
        return self.operand()

    def command(self, name: str) -> Tree:
        if name == "frac":
            return ("div", self.argument(), self.argument())
        if name == "binom":
            return ("binomial", self.argument(), self.argument())
        if name == "sqrt":
            degree: Tree = ("number", Fraction(2))
            if self.take("["):
                degree = self.sum()
                self.need("]")
            return ("root", self.argument(), degree)
        if name == "pi":
            return ("pi",)
        if name in _FUNCTIONS:
            return self.function(name)
        if name in _LETTERS:
            return self.name("\\" + name)
        if name in _ACCENTS:
            return self.name(f"{name}({self.raw()})")
        raise UnreadableError(f"\\{name} is not read here")

    def function(self, name: str) -> Tree:
        base = exponent = None
        for _ in range(2):
            if name == "log" and self.take("_"):
                base = self.argument()
            elif self.take("^"):
                exponent = self.script()
        if exponent == ("neg", ("number", Fraction(1))) and name in ("sin", "cos", "tan"):
            name, exponent = "arc" + name, None
        tree: Tree = ("function", name, self.function_argument())
        if base is not None:
            tree = ("div", tree, ("function", "log", base))
        return tree if exponent is None else ("pow", tree, exponent)

    def function_argument(self) -> Tree:
        r"""A bracketed group, else all that follows without an operator: \sin 2x, not \sin x \cos x."""
        if self.peek()[1] in ("(", "{", "["):
            return self.operand()
        tree = self.signed(self.power)
        while self.starts_operand() and self.peek()[1][1:] not in _FUNCTIONS and self.peek()[1] != "(":
            tree = ("mul", tree, self.power())
        return tree


def read(text: str) -> Tree:
    """The tree of a normalised expression; raises UnreadableError."""
    if len(text) > LENGTH:
        raise UnreadableError(f"an expression of {len(text)} characters, at most {LENGTH} are read")
    text = _PLAIN_FUNCTION.sub(r"\\\1 ", text)
    tokens: list[tuple[str, str]] = []
    position = 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            raise UnreadableError(f"'{text[position:].strip()[:1]}' is not read here")
        position = match.end()
        kind = str(match.lastgroup)
        tokens += _constant(match[kind]) if kind in ("repeating", "scientific") else [(kind, match[kind])]
    reader = _Reader(tokens)
    tree = reader.sum()
    if reader.at < len(tokens):
        raise UnreadableError(f"'{reader.peek()[1]}' is left over")
    return tree


def _constant(text: str) -> list[tuple[str, str]]:
    """Tokens of a repeating decimal or of scientific notation, which are one operand."""
    if "overline" not in text:
        mantissa, exponent = re.split("[eE]", text)
        power = [
            ("sign", "^"),
            ("sign", "{"),
            ("sign", "-" * exponent.startswith("-") or "+"),
            ("number", exponent.lstrip("-+")),
            ("sign", "}"),
        ]
        return [("sign", "("), ("number", mantissa), ("sign", "*"), ("number", "10"), *power, ("sign", ")")]
    start, period = re.split(r"\\overline\s*\{", text.rstrip("}"))
    digits = start.partition(".")[2]
    value = Fraction(start + "0" if digits == "" else start) if start != "." else Fraction(0)
    value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(digits))
    return [("number", f"{value.numerator}/{value.denominator}")]


def symbols(tree: Tree) -> frozenset[str]:
    """Names of the free variables."""
    if tree[0] == "symbol":
        return frozenset({tree[1]})
    return frozenset().union(*(symbols(part) for part in tree[1:] if isinstance(part, tuple)))
