"""Hostile answers, generated from a seed: what a policy under reward pressure or an attacker might write.

None of them is equal to GOLD. The marker is a file that appears if any of them is executed.
"""

from __future__ import annotations

import random
from collections.abc import Callable

GOLD = r"\sqrt{7}+\frac{1}{3}"
UNICODE = "𝟙٣②½Ⅷ∞ﬁ\u202e\u200b\u0000\ud7ff🙂é∑∫√π≤⟨⟩«»⦃⦄¤"


def hostile(count: int, seed: int, marker: str) -> list[str]:
    """`count` responses; every kind of attack in turn, with random sizes."""
    random_ = random.Random(seed)
    kinds = [lambda r: _code(r, marker), _tower, _nested, _huge, _unicode, _factorials, _operators, _fallback]
    found = []
    for index in range(count):
        answer = kinds[index % len(kinds)](random_)
        found.append(_long(random_, answer) if index % 97 == 0 else _placed(random_, answer))
    return found


def _placed(r: random.Random, answer: str) -> str:
    return (
        r.choice(["\\boxed{%s}", "The answer is $%s$.", "Answer: %s", "%s", "#### %s", "\\boxed{%s"]) % answer
    )


def _long(r: random.Random, answer: str) -> str:
    """1 MB in which the answer stands at an end, or of one character repeated in a box."""
    filler = r.choice(
        ["7", " ", "(", "{", "\\boxed{", "answer: ", "$", "answer is $1$,", "\\frac{", ",", "é"]
    )
    text = filler * (1_000_000 // len(filler))
    return r.choice([text + _placed(r, answer), "\\boxed{" + text + "}", text, "The answer is " + text])


def _code(r: random.Random, marker: str) -> str:
    call = r.choice(
        [
            f"__import__('os').system('touch {marker}')",
            f"open('{marker}', 'w').write('x')",
            f"exec(\"open('{marker}','w')\")",
            f"(lambda: open('{marker}', 'w'))()",
            f"\\text{{__import__('pathlib').Path('{marker}').touch()}}",
            f"\\input{{{marker}}}\\write18{{touch {marker}}}",
            f"print(open('{marker}','w'))",
            f"Integer(1).__class__.__base__.__subclasses__()[0] or open('{marker}','w')",
            "import sys; sys.exit(0)",
            '"}\n{"reward": 1, "why": "injected"}\n',
            "'; raise SystemExit; '",
            "$(touch " + marker + ")",
            "`touch " + marker + "`",
        ]
    )
    return r.choice(["", "1 + ", "\\sqrt{7} + "]) + call


def _tower(r: random.Random) -> str:
    base, height = r.choice(["9", "2", "1.0000001", "x", "(-1)", "e"]), r.randint(2, 60)
    if r.random() < 0.5:
        return r.choice(["^", "**"]).join([base] * height)
    return f"{base}^{{" * height + base + "}" * height


def _nested(r: random.Random) -> str:
    depth = r.randint(20, 400)
    left, right = r.choice(
        [("(", ")"), ("{", "}"), ("[", "]"), ("\\frac{1}{1+", "}"), ("\\sqrt{1+", "}"),
         ("|", "|"),
         ("\\left(", "\\right)"), ("\\sin(", ")"), ("-", ""), ("\\{", "\\}"), ("x_{", "}"), ("\\text{", "}")]
    )  # fmt: skip
    return left * depth + "7" + right * (depth - r.choice([0, 0, 1]))


def _huge(r: random.Random) -> str:
    digits = str(r.randint(1, 9)) * r.randint(100, 900)
    return r.choice(
        [digits, f"1e{digits[:3]}{r.randint(10**3, 10**6)}", f"10^{{{digits[:9]}}}",
         f"(1+x)^{{{digits[:6]}}}",
         f"{digits[:400]}^{{{digits[:400]}}}", f"\\frac{{1}}{{{digits}}}", f"2^{{{digits[:5]}}}\\sqrt{{7}}",
         f"\\sin({digits[:300]})", f"0.{digits}", f"\\binom{{{digits[:7]}}}{{{digits[:6]}}}",
         f"\\log_{{{digits[:3]}}}{digits[:300]}", f"\\exp({digits[:8]})", f"x^{{{digits[:12]}}}+1"]
    )  # fmt: skip


def _factorials(r: random.Random) -> str:
    number = r.choice(["9", "99999999", "1000000!", "(3!)", "170.5", "x"])
    return number + "!" * r.randint(1, 40)


def _unicode(r: random.Random) -> str:
    return "".join(r.choice(UNICODE + "17+^(){}\\") for _ in range(r.randint(1, 300)))


def _operators(r: random.Random) -> str:
    parts = ["\\frac", "\\sqrt", "^", "_", "{", "}", "(", ")", "\\pm", ",", "\\cup", "=", "<", "≤", "!",
             "|", "x", "7", "\\text{", "\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "&",
              "°", "%", "\\infty", ":", "-"]  # fmt: skip
    return " ".join(r.choice(parts) for _ in range(r.randint(1, 120)))


def _fallback(r: random.Random) -> str:
    """What math-verify would be asked to read."""
    many = r.choice(["10", "10^{6}", "10^{9}", "9^{9}", "n", "\\infty"])
    rare = [
        f"\\sum_{{k=1}}^{{{many}}} k^k",
        f"\\prod_{{k=1}}^{{{many}}} (k^2+1)",
        "\\int_0^1 \\frac{x^9 \\sin x}{1+e^{x^3}} dx",
        "\\lim_{x\\to 0} \\frac{\\sin^{50} x}{x^{50}}",
        "\\sum_{k=1}^{99} \\frac{1}{k^{k}}",
    ]
    common = [f"\\max({many}, x)", f"\\mathbb{{Z}} \\cap [0,{many}]",
              "\\pm" * r.randint(2, 30) + "1",
              ",".join(["1"] * r.randint(2, 300)), "x=" * r.randint(2, 100) + "1",
              "\\gcd(6, 9^9)"]  # fmt: skip
    choose: Callable[[list[str]], str] = r.choice
    return choose(rare) if r.random() < 0.1 else choose(common)
