"""The rows of a family's table and what they say of one model: which names belong together.

How tensors are cut is in fusion.py; reading and writing files is checkpoint/'s business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from hpt_mega.resharding.mapping.fusion import Fusion
from hpt_mega.resharding.mapping.shape import Config, ModelShape

OUTPUT_LAYER = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"
HF_OUTPUT_LAYER = "lm_head.weight"
HF_EMBEDDING = "model.embed_tokens.weight"

_DERIVED = (".rotary_emb.inv_freq",)  # stored by old checkpoints, computed from the config
_LISTED = 8  # leftovers named in an error


class MappingError(ValueError):
    """Names or shapes of two models that should match and do not; lists what is left over on each side."""


Shapes = Callable[[ModelShape], tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class Row:
    """One kind of Megatron parameter. "{layer}" and "{expert}" stand for indices in the whole model.

    `te` is the name under Transformer Engine's layer spec, where it is another one than under the local
    spec. `shapes` gives the shapes of the Hugging Face tensors in a model, `layers` says which decoder
    layers have it: "all", "dense" ones or those with "experts".
    """

    megatron: str
    hf: tuple[str, ...]
    fusion: Fusion
    shapes: Shapes
    te: str | None = None
    layers: str = "all"


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter of one model, with the Hugging Face tensors it is made of."""

    row: Row
    megatron: str  # global name under the local spec: layers and experts counted over the whole model
    te: str  # the same under Transformer Engine's spec
    hf: tuple[str, ...]
    layer: int | None  # None outside the decoder layers
    expert: int | None

    @property
    def fusion(self) -> Fusion:
        return self.row.fusion

    def hf_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """The shapes of its Hugging Face tensors, by name."""
        return dict(zip(self.hf, self.row.shapes(shape), strict=True))


@dataclass(frozen=True)
class Family:
    """Models that share tensor names: a table, and how their config.json reads."""

    name: str
    architectures: tuple[str, ...]
    rows: tuple[Row, ...]
    read_shape: Callable[[Config], ModelShape]

    def entries(self, shape: ModelShape) -> Iterator[Entry]:
        """Every Megatron parameter of a model of this shape: outside the layers, then layer by layer."""
        outside = [row for row in self.rows if "{layer}" not in row.megatron]
        for row in outside:
            if not (shape.tied and row.megatron == OUTPUT_LAYER):
                yield Entry(row, row.megatron, row.te or row.megatron, row.hf, layer=None, expert=None)
        for layer in range(shape.num_layers):
            kinds = ("all", "experts" if shape.has_experts(layer) else "dense")
            for row in self.rows:
                if row not in outside and row.layers in kinds:
                    yield from _entries_of_layer(row, layer, shape)

    def check_names(self, shape: ModelShape, hf_names: Iterable[str]) -> None:
        """Raise MappingError unless a checkpoint holds exactly the tensors that the table asks for."""
        expected = {name for entry in self.entries(shape) for name in entry.hf}
        given = {name for name in hf_names if not name.endswith(_DERIVED)}
        if shape.tied:
            given.discard(HF_OUTPUT_LAYER)  # some checkpoints store the tied tensor twice
        compare(f"{self.name} table", expected, "checkpoint", given)

    def check_shapes(self, shape: ModelShape, shape_of: Callable[[str], tuple[int, ...]]) -> None:
        """Raise MappingError unless each Hugging Face tensor has the shape that config.json asks for."""
        wrong = [
            f"  {name} is {list(given)}, expected {list(expected)}"
            for entry in self.entries(shape)
            for name, expected in entry.hf_shapes(shape).items()
            if (given := shape_of(name)) != expected
        ]
        if wrong:
            more = [f"  and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else []
            lines = ["the weights' shapes are not those of config.json", *wrong[:_LISTED], *more]
            raise MappingError("\n".join(lines))


def _entries_of_layer(row: Row, layer: int, shape: ModelShape) -> Iterator[Entry]:
    experts: Iterable[int | None] = (None,)
    if "{expert}" in row.megatron and shape.experts:
        experts = range(shape.experts.count)
    for expert in experts:

        def filled(name: str, expert: int | None = expert) -> str:
            return name.format(layer=layer, expert=expert)

        hf = tuple(filled(name) for name in row.hf)
        yield Entry(row, filled(row.megatron), filled(row.te or row.megatron), hf, layer, expert)


def canonical_name(parameter: str, first_layer: int, first_expert: int, tied: bool) -> str:
    """The global name of a pipeline stage's parameter, under the layer spec it was built with.

    first_layer, first_expert: indices in the whole model of the stage's decoder.layers.0 and of the rank's
    expert 0.
    """
    if tied and parameter == OUTPUT_LAYER:
        return EMBEDDING  # the last stage's copy
    for pattern, first in ((_LAYER, first_layer), (_LOCAL_EXPERT, first_expert), (_TE_EXPERT, first_expert)):
        if found := pattern.search(parameter):
            begin, end = found.span(1)
            parameter = f"{parameter[:begin]}{int(found[1]) + first}{parameter[end:]}"
    return parameter


_LAYER = re.compile(r"^decoder\.layers\.(\d+)")
_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)")
_TE_EXPERT = re.compile(r"\.experts\.linear_fc[12]\.weight(\d+)$")


def compare(what: str, expected: Collection[str], other: str, given: Collection[str]) -> None:
    """Raise MappingError that lists the names only one side has."""
    expected, given = set(expected), set(given)
    if expected == given:
        return
    lines = [
        f"  only in the {side} ({len(names)}): {', '.join(sorted(names)[:_LISTED])}"
        + (", ..." if len(names) > _LISTED else "")
        for side, names in ((what, expected - given), (other, given - expected))
        if names
    ]
    raise MappingError("\n".join([f"the {other} and the {what} do not name the same tensors", *lines]))
