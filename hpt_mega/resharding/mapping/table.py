"""The rows of a family's table and what they say of one model: which names belong together.

How tensors are cut is in fusion.py; reading and writing files is checkpoint/'s business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpt_mega.resharding.mapping.fusion import Fusion
from hpt_mega.resharding.mapping.shape import ModelShape


class MappingError(ValueError):
    """Names or shapes of two models that should match and do not; lists what is left over on each side."""


@dataclass(frozen=True)
class Row:
    """One kind of Megatron parameter. "{layer}" stands for the layer's index in the whole model."""

    megatron: str
    hf: tuple[str, ...]
    fusion: Fusion


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter of one model, with the Hugging Face tensors it is made of."""

    megatron: str  # global name: layers counted over the whole model
    hf: tuple[str, ...]
    fusion: Fusion
    layer: int | None  # None outside the decoder layers


# Transformer Engine fuses a norm into the linear layer that follows it, and so names its weight anew.
_TE_NAMES = {
    ".self_attention.linear_qkv.layer_norm_weight": ".input_layernorm.weight",
    ".mlp.linear_fc1.layer_norm_weight": ".pre_mlp_layernorm.weight",
}
_LISTED = 8  # leftovers named in an error
OUTPUT_LAYER = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Family:
    """Models that share tensor names: a table, and how their config.json reads."""

    name: str
    architectures: tuple[str, ...]
    rows: tuple[Row, ...]
    read_shape: Callable[[Mapping[str, Any]], ModelShape]

    def entries(self, shape: ModelShape) -> Iterator[Entry]:
        """Every Megatron parameter of a model of this shape, in the order of its layers."""
        per_layer = [row for row in self.rows if "{layer}" in row.megatron]
        for row in self.rows:
            if row not in per_layer and not (shape.tied and row.megatron == OUTPUT_LAYER):
                yield Entry(row.megatron, row.hf, row.fusion, layer=None)
        for layer in range(shape.num_layers):
            for row in per_layer:
                names = tuple(name.format(layer=layer) for name in row.hf)
                yield Entry(row.megatron.format(layer=layer), names, row.fusion, layer)

    def check_names(self, shape: ModelShape, hf_names: Iterable[str]) -> None:
        """Raise MappingError unless a checkpoint holds exactly the tensors that the table asks for."""
        expected = {name for entry in self.entries(shape) for name in entry.hf}
        given = {name for name in hf_names if not name.endswith(_DERIVED)}
        if shape.tied:
            given.discard("lm_head.weight")  # some checkpoints store the tied tensor twice
        compare(f"{self.name} table", expected, "checkpoint", given)


_DERIVED = (".rotary_emb.inv_freq",)  # stored by old checkpoints, computed from the config


def canonical_name(parameter: str, first_layer: int, tied: bool) -> str:
    """The global name of a pipeline stage's parameter, for either layer spec.

    first_layer: index in the whole model of the stage's decoder.layers.0.
    """
    for theirs, ours in _TE_NAMES.items():
        parameter = parameter.replace(theirs, ours)
    if tied and parameter == OUTPUT_LAYER:
        return EMBEDDING  # the last stage's copy
    return re.sub(
        r"^decoder\.layers\.(\d+)", lambda found: f"decoder.layers.{int(found[1]) + first_layer}", parameter
    )


def compare(what: str, expected: set[str], other: str, given: set[str]) -> None:
    """Raise MappingError that lists the names only one side has."""
    if expected == given:
        return
    lines = [
        f"  only in the {side} ({len(names)}): {', '.join(sorted(names)[:_LISTED])}"
        + (", ..." if len(names) > _LISTED else "")
        for side, names in ((what, expected - given), (other, given - expected))
        if names
    ]
    raise MappingError("\n".join([f"the {other} and the {what} do not name the same tensors", *lines]))
