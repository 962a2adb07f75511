"""The GPT model of one pipeline stage: config, layer spec (TE on GPUs, local on CPU), construction.

Weights come from checkpoint/; what is computed from the hidden states is in step.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hpt_mega.config import ParallelConfig
from hpt_mega.megatron import cpu

cpu.install()

from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.utils import set_model_to_sequence_parallel  # noqa: E402

from hpt_mega.megatron.attention import CoreAttention  # noqa: E402
from hpt_mega.megatron.runtime import Layout  # noqa: E402
from hpt_mega.resharding.mapping.fusion import padded_vocab_size  # noqa: E402
from hpt_mega.resharding.mapping.shape import ModelShape, RopeScaling  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class PolicyModel(GPTModel):
    """A GPTModel whose last stage returns hidden states, and whose rotary embedding follows position_ids.

    Log-probabilities are computed from the hidden states in chunks (objective/logprob.py), so logits of a
    whole batch never exist. Positions given per token let one forward serve padded batches and decoding.
    """

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, decoder_input: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        if self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        return decoder_input, self._rotary_frequencies(position_ids), None, None, None, None

    def _rotary_frequencies(self, position_ids_BS: Tensor) -> Tensor:
        """[S, B or 1, 1, D] angles; megatron-core broadcasts them over heads."""
        inverse = self.rotary_pos_emb.inv_freq.to(position_ids_BS.device)
        angles_SBD = position_ids_BS.t()[..., None].float() * inverse
        return torch.cat((angles_SBD, angles_SBD), dim=-1)[:, :, None, :]

    def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if self.post_process and self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        return hidden_states

    def output_weight(self) -> Tensor:
        """This tensor-parallel rank's rows of the output projection [V / tp, H] (last stage only)."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode without sequence parallelism, which cannot split a single decoded position."""
        sequence_parallel, training = self.config.sequence_parallel, self.training
        if sequence_parallel:
            set_model_to_sequence_parallel(self, set_to=False)
        self.eval()
        try:
            yield
        finally:
            if sequence_parallel:
                set_model_to_sequence_parallel(self, set_to=True)
            self.train(training)

    def core_attentions(self) -> list[CoreAttention]:
        return [layer.self_attention.core_attention for layer in self.decoder.layers]


def transformer_config(shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's config of the model and the layout."""
    on_gpu = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        layernorm_epsilon=shape.norm_epsilon,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        variable_seq_lengths=parallel.pp > 1,  # each micro-batch is padded to its own longest sequence
        moe_token_dispatcher_type="alltoall",  # the one that allows those varying lengths
        calculate_per_token_loss=True,  # the objective brings its own global denominator
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,  # weights are always read from a checkpoint
        persist_layer_norm=on_gpu,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Transformer Engine's layers where there is a GPU, megatron-core's own with our attention elsewhere."""
    if torch.cuda.is_available():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    spec.submodules.self_attention.submodules.core_attention = CoreAttention
    return spec


def build_model(
    shape: ModelShape, parallel: ParallelConfig, layout: Layout, dtype: torch.dtype
) -> PolicyModel:
    """This rank's pipeline stage, with uninitialised weights, on the CPU or the current GPU."""
    config = transformer_config(shape, parallel, dtype)
    model = PolicyModel(
        config,
        layer_spec(config),
        vocab_size=padded_vocab_size(shape.vocab_size, layout.tp_size),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=layout.is_first_stage,
        post_process=layout.is_last_stage,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        **_rope_scaling(shape.rope_scaling),
    )
    model.to(dtype)  # torch's norms are made in fp32, which megatron-core's bf16 optimizer cannot checkpoint
    return model.cuda() if torch.cuda.is_available() else model


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    """Llama 3.1's scaling; megatron-core takes its factor and fixes the other numbers.

    Raises ValueError for other numbers than those.
    """
    if scaling is None:
        return {}
    fixed = RopeScaling(
        scaling.factor, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192
    )
    if scaling != fixed:
        raise ValueError(f"rope scaling is {scaling}, megatron-core computes {fixed}")
    return {"rope_scaling": True, "rope_scaling_factor": scaling.factor}
