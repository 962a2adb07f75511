"""Results that others published, to stand beside ours in a table: arXiv 2509.04419, tables 2 and 3.

Percent right. Never mixed with what was measured here.
"""

from __future__ import annotations

import re

COLUMNS = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiad", "arc_c", "gpqa")
TITLES = {
    "aime24": "AIME24",
    "aime25": "AIME25",
    "amc23": "AMC",
    "math500": "MATH-500",
    "minerva": "Minerva",
    "olympiad": "Olympiad",
    "arc_c": "ARC-c",
    "gpqa": "GPQA",
}
IN_DISTRIBUTION = COLUMNS[:6]  # what the papers' average is over

_QWEN_7B = {
    "Qwen2.5-Math-7B": (12.3, 4.7, 33.0, 43.6, 8.8, 13.6, 30.9, 28.3),
    "SFT": (25.1, 22.8, 56.1, 84.2, 33.8, 44.7, 67.4, 25.3),
    "GRPO": (19.4, 13.8, 59.1, 81.8, 38.2, 46.2, 81.2, 36.4),
    "SFT→GRPO": (25.7, 21.6, 62.2, 84.6, 38.2, 46.8, 67.7, 30.8),
    "LUFFY": (26.1, 21.8, 66.2, 88.4, 41.9, 54.1, 80.8, 39.4),
    "SRFT": (18.4, 15.5, 55.9, 83.8, 42.6, 48.9, 80.5, 36.8),
    "HPT": (33.0, 21.9, 69.4, 89.2, 46.0, 56.9, 81.6, 42.9),
}
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "qwen2_5_math_7b": {name: dict(zip(COLUMNS, figures, strict=True)) for name, figures in _QWEN_7B.items()},
    "qwen2_5_math_1_5b": {
        name: {"average": value}
        for name, value in (
            ("Qwen2.5-Math-1.5B", 15.6),
            ("SFT", 36.9),
            ("GRPO", 34.0),
            ("LUFFY", 34.7),
            ("HPT", 41.9),
        )
    },
    "llama3_1_8b": {
        name: {"average": value}
        for name, value in (
            ("LLaMA3.1-8B", 4.6),
            ("SFT", 5.9),
            ("GRPO", 9.6),
            ("LUFFY", 13.2),
            ("HPT", 18.2),
        )
    },
}

_ALIASES = {
    "amc": "amc23",
    "math": "math500",
    "minervamath": "minerva",
    "arcc": "arc_c",
    "arcchallenge": "arc_c",
}
_ALIASES |= {"olympiadbench": "olympiad", "gpqadiamond": "gpqa", "aime2024": "aime24", "aime2025": "aime25"}


def column(benchmark: str) -> str:
    """The published column that a benchmark's name means (MATH-500: math500), else the name itself."""
    plain = re.sub(r"[^a-z0-9]", "", benchmark.lower())
    named = _ALIASES.get(plain, plain)
    return named if named in COLUMNS else benchmark
