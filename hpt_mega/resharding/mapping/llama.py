"""Llama 1 to 3.1 and models of its architecture (SmolLM2)."""

from hpt_mega.resharding.mapping.blocks import ATTENTION, DENSE, ENDS
from hpt_mega.resharding.mapping.shape import read_shape
from hpt_mega.resharding.mapping.table import Family

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    read_shape=read_shape,
    rows=(*ENDS, *ATTENTION, *DENSE),
)
