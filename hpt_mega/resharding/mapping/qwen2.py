"""Qwen2 and Qwen2.5: Llama's tensors and a bias on query, key and value."""

from hpt_mega.resharding.mapping.blocks import ATTENTION, DENSE, ENDS, QKV_BIAS
from hpt_mega.resharding.mapping.shape import Config, ModelShape, read_shape, refuse_other_values
from hpt_mega.resharding.mapping.table import Family


def _read_shape(config: Config) -> ModelShape:
    # with the window on, it holds for some layers only
    refuse_other_values(config, use_sliding_window=False)
    return read_shape(config, qkv_bias=True)


QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    read_shape=_read_shape,
    rows=(*ENDS, *ATTENTION, *QKV_BIAS, *DENSE),
)
