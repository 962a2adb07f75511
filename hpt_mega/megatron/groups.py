"""Which parameters a pattern of optimizer.frozen and optimizer.groups means, by names of the whole model.

The optimizer's side is in optimizer.py; validation/optimizer.py refuses patterns that mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from hpt_mega.config import ParameterGroup


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means a parameter: its name, a module above it, or either with wildcards.

    `name` counts layers and experts over the whole model. decoder.layers.3.mlp.linear_fc1.weight is meant by
    itself, by decoder.layers.3 and by *.mlp, but not by decoder.layers.1.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def is_frozen(name: str, patterns: Iterable[str]) -> bool:
    return any(matches(pattern, name) for pattern in patterns)


def group_of(name: str, groups: Iterable[ParameterGroup]) -> ParameterGroup | None:
    """The group with settings for the parameter; there is at most one."""
    return next((group for group in groups if matches(group.match, name)), None)
