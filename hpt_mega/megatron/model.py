"""The GPT model of one pipeline stage: config, layer spec (TE on GPUs, local on CPU), construction.

Weights come from checkpoint/; what is computed from the hidden states is in step.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from hpt_mega.config import Fp8Config, ParallelConfig
from hpt_mega.megatron import cpu

cpu.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.transformer import MLATransformerConfig, TransformerConfig  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402
from megatron.core.transformer.utils import set_model_to_sequence_parallel  # noqa: E402

from hpt_mega.megatron import precision  # noqa: E402
from hpt_mega.megatron.attention import CoreAttention  # noqa: E402
from hpt_mega.megatron.decoding import Decoding, with_decoding  # noqa: E402
from hpt_mega.megatron.runtime import Layout  # noqa: E402
from hpt_mega.megatron.variants import LatentCoreAttention, WindowAttention  # noqa: E402
from hpt_mega.resharding.mapping.fusion import padded_vocab_size  # noqa: E402
from hpt_mega.resharding.mapping.shape import (  # noqa: E402
    Experts,
    LatentAttention,
    ModelShape,
    RopeScaling,
)
from hpt_mega.resharding.mapping.table import canonical_name  # noqa: E402

T = TypeVar("T", bound=Tensor)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class PolicyModel(GPTModel):
    """A GPTModel whose last stage returns hidden states, and whose rotary embedding follows position_ids.

    Log-probabilities are computed from the hidden states in chunks (objective/logprob.py), so logits of a
    whole batch never exist. Positions given per token let one forward serve padded batches and decoding.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # the model chunks of this rank, of which this is the first; several in an interleaved pipeline
        self.chunks: tuple[PolicyModel, ...] = (self,)

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        decoder_input: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        if self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
            # recomputed layers above a frozen embedding would get no gradient
            if torch.is_grad_enabled() and not decoder_input.requires_grad:
                decoder_input.requires_grad_()
        if self.config.multi_latent_attention:
            if packed_seq_params is None:
                _refuse_other_positions(position_ids)
            return decoder_input, None, None, None, None, None
        if self.config.apply_rope_fusion:  # TE's kernel counts from each segment's start itself
            device = position_ids.device
            position_ids = torch.arange(packed_seq_params.max_seqlen_q, device=device)[None]
        return decoder_input, self.rotary_angles(position_ids), None, None, None, None

    def rotary_angles(self, position_ids_BS: Tensor) -> Tensor:
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
        """Evaluation mode of all chunks, without what cannot take a few decoded positions: sequence
        parallelism splits them, TE's FP8 products want multiples of 8, its rotation one row."""
        sequence_parallel, training = self.config.sequence_parallel, self.training
        fp8, fused_rotation = self.config.fp8, self.config.apply_rope_fusion
        # without FP8 a TE module thinks that it has no history of scales to save
        scaled = [m.fp8_meta for chunk in self.chunks for m in chunk.modules() if hasattr(m, "fp8_meta")]
        saved = [meta["fp8_checkpoint"] for meta in scaled]
        self.config.fp8, self.config.apply_rope_fusion = None, False
        for chunk in self.chunks:
            if sequence_parallel:
                set_model_to_sequence_parallel(chunk, set_to=False)
            chunk.eval()
        try:
            yield
        finally:
            for chunk in self.chunks:
                if sequence_parallel:
                    set_model_to_sequence_parallel(chunk, set_to=True)
                chunk.train(training)
            self.config.fp8, self.config.apply_rope_fusion = fp8, fused_rotation
            for meta, flag in zip(scaled, saved, strict=True):
                meta["fp8_checkpoint"] = flag

    def attention_share(self) -> float:
        """Attention's work on a sequence of L tokens is this times L of the work of the layers' matrices.

        Two products of 2 * L**2 / 2 * (heads * channels) multiply-adds beside 2 * L a matrix entry.
        """
        config = self.config
        width = config.num_attention_heads * config.kv_channels
        keys = config.num_query_groups * config.kv_channels
        forward = config.ffn_hidden_size
        if config.num_moe_experts:
            shared = config.moe_shared_expert_intermediate_size or 0
            forward = config.moe_router_topk * config.moe_ffn_hidden_size + shared
        return width / (config.hidden_size * (2 * width + 2 * keys + 3 * forward))

    @property
    def shares_prompts(self) -> bool:
        """Whether its attention reads rows in which a prompt stands once for several responses."""
        core, config = self.decoder.layers[0].self_attention.core_attention, self.config
        plain = isinstance(core, CoreAttention) and not config.multi_latent_attention
        return plain and config.context_parallel_size == 1

    @property
    def first_layer(self) -> int:
        """The index in the whole model of this chunk's first layer."""
        return int(self.decoder.layers[0].layer_number) - 1

    def expert_place(self) -> tuple[int, int, int]:
        """(index of the first expert held here, rank and size of the experts' tensor parallelism)."""
        mixtures = [layer.mlp for layer in self.decoder.layers if isinstance(layer.mlp, MoELayer)]
        if not mixtures:
            return 0, 0, 1
        group = mixtures[0].experts.tp_group
        return mixtures[0].local_expert_indices[0], group.rank(), group.size()

    def in_whole_model(self, named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """What this chunk names, by the names of the whole model; a tied output layer is the embedding."""
        first_expert, _, _ = self.expert_place()
        tied = self.share_embeddings_and_output_weights
        for name, tensor in named:
            yield canonical_name(name, self.first_layer, first_expert, tied), tensor

    def core_attentions(self) -> list[Decoding]:
        """Those of this chunk's layers. Raises ValueError where they cannot decode."""
        found = [layer.self_attention.core_attention for layer in self.decoder.layers]
        if not all(isinstance(core, Decoding) for core in found):
            kind = "latent attention" if self.config.multi_latent_attention else "a sliding window"
            raise ValueError(f"decoding with {kind} is not implemented here; sample with rollout=vllm")
        return found


def _refuse_other_positions(position_ids_BS: Tensor) -> None:
    """Latent attention rotates inside its layers, by the place in the sequence or in the segment of a packed
    row; nothing else reaches in there."""
    if not (position_ids_BS == torch.arange(position_ids_BS.shape[1], device=position_ids_BS.device)).all():
        raise ValueError(
            "latent attention counts positions from the sequence's start; given were other position_ids"
        )


def transformer_config(
    shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype, fp8: Fp8Config | None = None
) -> TransformerConfig:
    """Megatron's config of the model and the layout."""
    on_gpu = torch.cuda.is_available()
    window = shape.sliding_window
    options: dict[str, Any] = dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        layernorm_epsilon=shape.norm_epsilon,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm or shape.latent is not None,
        window_size=(window - 1, 0) if window else None,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        pipeline_model_parallel_layout=_stages(shape.num_layers, parallel),
        # over gloo, megatron-core's default exchange gives wrong gradients in an interleaved pipeline
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        variable_seq_lengths=parallel.pp > 1,  # each micro-batch has its own length
        moe_token_dispatcher_type="alltoall",  # the one that allows those varying lengths
        calculate_per_token_loss=True,  # the objective brings its own global denominator
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,  # weights are always read from a checkpoint
        deterministic_mode=on_gpu and torch.are_deterministic_algorithms_enabled(),
        persist_layer_norm=on_gpu,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=on_gpu
        and find_spec("fused_weight_gradient_mlp_cuda") is not None,  # apex
        apply_rope_fusion=on_gpu and shape.latent is None,  # else a GPU waits for the host at every segment
        **precision.transformer_options(fp8 or Fp8Config(), experts=shape.experts is not None),
    )
    options |= _RECOMPUTE[parallel.recompute]
    if shape.experts:
        options |= _expert_options(shape.experts, shape.num_layers)
    if shape.latent:
        return MLATransformerConfig(**options, **_latent_options(shape.latent, shape.rotary_base))
    return TransformerConfig(**options)


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _stages(num_layers: int, parallel: ParallelConfig) -> list[list[str]] | None:
    """What each model chunk holds, where the layers do not divide evenly or the config says how they do."""
    count = parallel.pp * parallel.vpp
    if not parallel.stage_layers and num_layers % count == 0:
        return None
    stages = [["decoder"] * layers for layers in parallel.stage_layers or even_split(num_layers, count)]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def _expert_options(experts: Experts, num_layers: int) -> dict[str, Any]:
    """Routing is that of the checkpoint: no balancing loss, and a selection bias that stays as it is."""
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.top_k,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_layer_freq": [int(layer >= experts.first_layer) for layer in range(num_layers)]
        if experts.first_layer
        else 1,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_router_score_function": experts.score,
        # a softmax over all experts leaves the chosen ones' weights short of one
        "moe_router_pre_softmax": experts.score == "softmax" and not experts.normalized,
        "moe_router_dtype": "fp32" if experts.score == "sigmoid" else None,
        "moe_router_enable_expert_bias": experts.selection_bias,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_num_groups": experts.groups,
        "moe_router_group_topk": experts.top_groups,
        "moe_router_topk_scaling_factor": experts.scaling,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": torch.cuda.is_available(),
    }


def _latent_options(latent: LatentAttention, rotary_base: float) -> dict[str, Any]:
    options: dict[str, Any] = {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_head_dim,
        "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "rope_type": "yarn" if latent.yarn else "rope",
        "rotary_base": rotary_base,
    }
    if latent.yarn:
        scaling = asdict(latent.yarn)
        options |= {"rotary_scaling_factor": scaling.pop("factor"), **scaling}
    return options


def block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Transformer Engine's layers where there is a GPU, megatron-core's own with our attention elsewhere."""
    on_gpu = torch.cuda.is_available()
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=on_gpu, normalization="RMSNorm", vp_stage=vp_stage
    )
    plain = not config.multi_latent_attention and not config.window_size
    for layer in spec.layer_specs:
        attention = layer.submodules.self_attention.submodules
        if not on_gpu:
            attention.core_attention = _core_attention(config)
            layer.submodules.sharded_state_dict_keys_map = _keys_of_transformer_engine(
                latent=config.multi_latent_attention, experts=layer.submodules.mlp.module is MoELayer
            )
        if plain:
            attention.core_attention = with_decoding(attention.core_attention)
    return spec


def _core_attention(config: TransformerConfig) -> type[CoreAttention]:
    if config.multi_latent_attention:
        return LatentCoreAttention
    return WindowAttention if config.window_size else CoreAttention


def _keys_of_transformer_engine(*, latent: bool, experts: bool) -> dict[str, str]:
    """Prefixes under which a checkpoint holds the norms that Transformer Engine fuses into linear layers.

    megatron-core's own table is wrong for layers with experts, whose norm is not fused, and knows nothing of
    latent attention; a checkpoint written on the CPU would not load on a GPU.
    """
    if latent:
        keys = {
            f"self_attention.{part}_layernorm.": f"self_attention.linear_{part}_up_proj.layer_norm_"
            for part in ("q", "kv")
        }
    else:
        keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not experts:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return keys


def build_model(
    shape: ModelShape,
    parallel: ParallelConfig,
    layout: Layout,
    dtype: torch.dtype,
    kind: type[PolicyModel] = PolicyModel,
    fp8: Fp8Config | None = None,
) -> PolicyModel:
    """This rank's pipeline stage, with uninitialised weights, on the CPU or the current GPU: its first
    chunk, which knows the others."""
    config = transformer_config(shape, parallel, dtype, fp8)
    if torch.cuda.is_available() and shape.experts:
        from megatron.core.extensions.transformer_engine import TEGroupedLinear

        precision.tolerate_empty_state(TEGroupedLinear)
    stages = range(parallel.vpp) if parallel.vpp > 1 else [None]
    chunks = tuple(build_stage(shape, config, layout.tp_size, stage, kind) for stage in stages)
    for chunk in chunks:
        precision.emulate(chunk, fp8 or Fp8Config())
    chunks[0].chunks = chunks
    return chunks[0]


def even_split(layers: int, chunks: int) -> list[int]:
    """Layers of each pipeline chunk; those in the middle get the ones left over, as the ends have the
    embedding and the output layer."""
    counts = [layers // chunks] * chunks
    by_distance = sorted(range(chunks), key=lambda chunk: (abs(2 * chunk - chunks + 1), chunk))
    for chunk in by_distance[: layers % chunks]:
        counts[chunk] += 1
    return counts


def build_stage(
    shape: ModelShape,
    config: TransformerConfig,
    tp_size: int,
    vp_stage: int | None = None,
    kind: type[PolicyModel] = PolicyModel,
) -> PolicyModel:
    """One model chunk of this rank, the only one unless the pipeline is interleaved."""
    model = kind(
        config,
        block_spec(config, vp_stage),
        vocab_size=padded_vocab_size(shape.vocab_size, tp_size),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        vp_stage=vp_stage,
        **_rope_scaling(shape.rope_scaling),
    )
    # torch's norms are made in fp32, which megatron-core's bf16 optimizer cannot checkpoint
    model.to(config.params_dtype)
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module._maintain_float32_expert_bias()
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
