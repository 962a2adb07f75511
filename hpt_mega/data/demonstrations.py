r"""Demonstrations (worked solutions) of reasoning-gym questions, each ending in a line with \boxed{answer}.

One writer a task; the questions themselves, their splits and tokens are in questions.py.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

Entry = Mapping[str, Any]  # reasoning-gym's dictionary: question, answer, metadata

_OPERATORS: dict[type[ast.operator], tuple[str, Callable[[Decimal, Decimal], Decimal]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}


def demonstration(task: str, entry: Entry) -> str:
    r"""Worked solution of one question of a task, ending in "\boxed{answer}".

    task is a key of WRITERS. Raises ValueError where the work does not reach the entry's answer.
    """
    return f"{WRITERS[task](entry)}\n\\boxed{{{entry['answer']}}}"


def _arithmetic_steps(entry: Entry) -> str:
    """One line an operation, in the order of evaluation; products by partial products."""
    expression = entry["metadata"]["expression"]
    lines: list[str] = []
    value = _reduce(ast.parse(expression, mode="eval").body, lines)
    if value != Decimal(entry["answer"]):
        raise ValueError(f"{expression!r} was worked out as {value}, expected {entry['answer']}")
    return "\n".join(lines)


def _reduce(node: ast.expr, lines: list[str]) -> Decimal:
    """The value of an arithmetic syntax tree; appends to lines one line for each operation."""
    if isinstance(node, ast.Constant):
        return Decimal(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_reduce(node.operand, lines)
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS:
        raise ValueError(f"cannot work out {ast.unparse(node)!r}; only numbers and + - * / are known")
    left, right = _reduce(node.left, lines), _reduce(node.right, lines)
    symbol, apply = _OPERATORS[type(node.op)]
    value = apply(left, right)
    partial = _partial_products(left, right) if symbol == "*" else ""
    lines.append(f"{_show(left)} {symbol} {_operand(right)} = {partial}{_show(value)}")
    return value


def _partial_products(left: Decimal, right: Decimal) -> str:
    """ "20 * 4 + 3 * 4 = 80 + 12 = " for 23 * 4; "" where neither factor is a positive two-digit integer."""
    if 10 < left < 100 and left % 10 and left % 1 == 0 and 1 < right < 10:
        tens, ones = left - left % 10, left % 10
        return f"{tens} * {right} + {ones} * {right} = {tens * right} + {ones * right} = "
    return ""


def _show(value: Decimal) -> str:
    return str(int(value)) if value % 1 == 0 else str(value)


def _operand(value: Decimal) -> str:
    return f"({_show(value)})" if value < 0 else _show(value)


def _word_problem_steps(entry: Entry) -> str:
    """reasoning-gym's own solution of a word problem, without its closing '#### answer'."""
    solution, _, closing = entry["metadata"]["answer_cot"].rpartition("####")
    if not solution or Decimal(closing.strip().replace(",", "")) != Decimal(entry["answer"]):
        raise ValueError(f"answer_cot ends in {closing.strip()!r}, expected #### {entry['answer']}")
    return str(solution.strip())


def _euclid_steps(entry: Entry) -> str:
    """Euclid's algorithm on two numbers, one division a line."""
    larger, smaller = sorted(entry["metadata"]["numbers"], reverse=True)
    lines = []
    while smaller:
        quotient, remainder = divmod(larger, smaller)
        lines.append(f"{larger} = {quotient} * {smaller} + {remainder}")
        larger, smaller = smaller, remainder
    return "\n".join(lines)


WRITERS: dict[str, Callable[[Entry], str]] = {
    "basic_arithmetic": _arithmetic_steps,
    "chain_sum": _arithmetic_steps,
    "decimal_chain_sum": _arithmetic_steps,
    "gcd": _euclid_steps,
    "gsm_symbolic": _word_problem_steps,
    "products": _arithmetic_steps,
}

_TERMS = ("min_terms", "max_terms", "min_digits", "max_digits", "allow_negation")
# What can be set of a task: the fields of its config in reasoning-gym, whose import takes seconds.
OPTIONS: dict[str, tuple[str, ...]] = {
    "basic_arithmetic": (*_TERMS, "operators", "allow_parentheses", "format_style", "whitespace"),
    "chain_sum": _TERMS,
    "decimal_chain_sum": (*_TERMS, "min_decimal_places", "max_decimal_places"),
    "gcd": ("min_numbers", "max_numbers", "min_value", "max_value"),
    "gsm_symbolic": ("difficulty",),
    "products": _TERMS,
}
