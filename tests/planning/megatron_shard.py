"""Prints one rank's parameters of a real megatron-core model: fake process group, meta device.

python megatron_shard.py WORLD RANK TP PP EP CONFIG_JSON VOCAB
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from hpt_mega.megatron import cpu

cpu.install()

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

world, rank, tp, pp, ep = map(int, sys.argv[1:6])
sizes, vocab = json.loads(sys.argv[6]), int(sys.argv[7])
dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
parallel_state.initialize_model_parallel(
    tp,
    pp,
    expert_model_parallel_size=ep,
    expert_tensor_parallel_size=1,
    create_gloo_process_groups=False,
)
config = TransformerConfig(
    **sizes,
    tensor_model_parallel_size=tp,
    pipeline_model_parallel_size=pp,
    expert_model_parallel_size=ep,
    sequence_parallel=tp > 1,
    add_bias_linear=False,
    normalization="RMSNorm",
    pipeline_dtype=torch.bfloat16,
    params_dtype=torch.bfloat16,
    use_cpu_initialization=False,
    perform_initialization=False,
)
spec = get_gpt_layer_local_spec(
    num_experts=sizes.get("num_moe_experts"),
    moe_grouped_gemm=False,
    qk_layernorm=sizes.get("qk_layernorm", False),
    normalization="RMSNorm",
)
with torch.device("meta"):
    model = GPTModel(
        config,
        spec,
        vocab_size=vocab,
        max_sequence_length=4096,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
counts = {"dense": 0, "experts": 0}
for name, parameter in model.named_parameters():
    counts["experts" if ".experts." in name else "dense"] += parameter.numel()
print(json.dumps(counts))
