"""One declarative table per model family: Hugging Face names, Megatron names, and how tensors are cut.

The same table drives import, export and live resharding. A new family is a new file and a line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpt_mega.resharding.mapping.deepseek import DEEPSEEK_V3
from hpt_mega.resharding.mapping.llama import LLAMA
from hpt_mega.resharding.mapping.mistral import MISTRAL
from hpt_mega.resharding.mapping.mixtral import MIXTRAL
from hpt_mega.resharding.mapping.qwen2 import QWEN2
from hpt_mega.resharding.mapping.qwen3 import QWEN3, QWEN3_MOE
from hpt_mega.resharding.mapping.shape import ModelShape
from hpt_mega.resharding.mapping.table import Entry, Family, MappingError

__all__ = ["FAMILIES", "Entry", "Family", "MappingError", "ModelShape", "family_for"]

FAMILIES = (LLAMA, QWEN2, QWEN3, QWEN3_MOE, MISTRAL, MIXTRAL, DEEPSEEK_V3)


def family_for(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config.json, by its `architectures`.

    Raises MappingError, listing the known architectures, for any other.
    """
    given = config.get("architectures") or []
    for family in FAMILIES:
        if set(given) & set(family.architectures):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise MappingError(f"architectures is {given} in the model's config.json; known: {known}")
