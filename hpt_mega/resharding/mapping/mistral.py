"""Mistral: Llama's tensors, and in its first release a sliding window."""

from hpt_mega.resharding.mapping.blocks import ATTENTION, DENSE, ENDS
from hpt_mega.resharding.mapping.shape import Config, ModelShape, read_shape
from hpt_mega.resharding.mapping.table import Family


def _read_shape(config: Config) -> ModelShape:
    return read_shape(config, sliding_window=config.get("sliding_window"))


MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    read_shape=_read_shape,
    rows=(*ENDS, *ATTENTION, *DENSE),
)
