"""Which rank of a Megatron job holds which parameter: how a checkpoint's files are cut.

The format itself reads back at any layout; a job at the layout it was cut for reads whole files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from hpt_mega.resharding.mapping import Entry, ModelShape
from hpt_mega.resharding.mapping.fusion import Vocabulary, padded_vocab_size
from hpt_mega.resharding.mapping.table import EMBEDDING


@dataclass(frozen=True)
class TargetLayout:
    """Sizes of tensor, pipeline, interleaved pipeline, expert and expert-tensor parallelism."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1

    def check(self, shape: ModelShape) -> None:
        """Raise ValueError that lists what of the model cannot be cut so."""
        whole = {
            "tp": {
                "attention heads": shape.num_attention_heads,
                "key/value heads": shape.num_query_groups,
                "feed-forward rows": shape.ffn_hidden_size,
            },
            "ep": {},
            "etp": {},
        }
        if shape.experts:
            whole["ep"] = {"experts": shape.experts.count}
            whole["etp"] = {"rows of an expert": shape.experts.ffn_hidden_size}
        elif self.ep > 1:
            raise ValueError(f"--ep is {self.ep} and the model has no experts; leave it out")
        problems = [
            f"--{name} is {getattr(self, name)} and the model has {count} {what}: not a divisor"
            for name, counts in whole.items()
            for what, count in counts.items()
            if count % getattr(self, name)
        ]
        if self.pp * self.vpp > shape.num_layers:
            problems.append(
                f"--pp x --vpp is {self.pp * self.vpp} and the model has {shape.num_layers} layers"
            )
        if self.vpp > 1 and self.pp == 1:
            problems.append(f"--vpp is {self.vpp} and --pp is 1; an interleaved pipeline needs --pp above 1")
        if problems:
            raise ValueError("; ".join(problems))

    def files(self, entry: Entry, shape: ModelShape) -> list[int]:
        """The ranks that share a parameter, in tensor-parallel order (the first data-parallel replica's)."""
        first = self._stage(entry, shape) * max(self.tp, self.ep * self.etp)
        if entry.expert is None or shape.experts is None:
            return list(range(first, first + self.tp))
        first += entry.expert * self.ep // shape.experts.count * self.etp
        return list(range(first, first + self.etp))

    def whole_shape(self, entry: Entry, shape: ModelShape) -> tuple[int, ...]:
        """The shape of a whole parameter, the vocabulary padded until it has equal parts."""
        rows, *others = entry.fusion.fused_shape(entry.hf_shapes(shape).values())
        if isinstance(entry.fusion, Vocabulary):
            rows = padded_vocab_size(rows, len(self.files(entry, shape)))
        return (rows, *others)

    def cut(
        self, entry: Entry, whole: Tensor, shape: ModelShape
    ) -> Iterator[tuple[int, tuple[int, ...], Tensor]]:
        """The pieces of a whole parameter, as views: the rank that holds each, and where it begins."""
        dim, ranks = entry.fusion.dim, self.files(entry, shape)
        if dim is None:
            yield ranks[0], (0,) * whole.dim(), whole
            return
        blocks = whole.chunk(entry.fusion.blocks, dim)
        for number, rank in enumerate(ranks):
            for start, piece in entry.fusion.pieces(blocks, number, len(ranks)):
                yield rank, tuple(start if d == dim else 0 for d in range(whole.dim())), piece

    def _stage(self, entry: Entry, shape: ModelShape) -> int:
        if entry.layer is None:
            return 0 if entry.megatron == EMBEDDING else self.pp - 1
        return entry.layer * self.pp * self.vpp // shape.num_layers % self.pp
