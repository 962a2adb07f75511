"""Inside a vLLM worker: the weight-transfer engine that loads the trainer's buckets into vLLM's model.

The trainer's side of it is vllm.py; vllm_plugin.py makes it known to vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from hpt_mega.resharding.assembly import Assembly
from hpt_mega.resharding.manifest import Ledger, TransferError
from hpt_mega.resharding.network import Meeting, NetworkBuckets
from hpt_mega.resharding.planner import Plan
from hpt_mega.resharding.transport import SharedBuckets


@dataclass
class InitInfo(WeightTransferInitInfo):
    plan: dict[str, Any]
    digest: str
    path: str = ""  # of the trainer's shared memory, on its host
    meeting: dict[str, Any] | None = None  # of the trainer and all workers, on another host


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    index: int  # of the bucket
    checksums: list[str]


class BucketTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads weights from shared memory or from the network, checked bucket by bucket."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self._plan = Plan.parse(init_info.plan)
        if self._plan.digest != init_info.digest:
            raise TransferError(
                f"the plan's digest is {self._plan.digest}, announced {init_info.digest}; install the same "
                "version of hpt_mega for this server as for the trainer"
            )
        self._buckets: SharedBuckets | NetworkBuckets
        if init_info.meeting is None:
            self._buckets = SharedBuckets(init_info.path, self._plan.bucket_bytes)
        else:
            rank = 1 + self.parallel_config.rank
            self._buckets = NetworkBuckets(Meeting(**init_info.meeting), rank, self._plan)

    def start_weight_update(self) -> None:
        self._ledger = Ledger(self._plan)
        self._loaded: set[str] = set()
        self._assembly = Assembly()
        if current_platform.is_cpu():
            _forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        buffer = self._buckets.buffer(update_info.index)
        bucket = self._ledger.receive(update_info.index, buffer, update_info.checksums)
        self._loaded |= cast(Any, self.model).load_weights(self._assembly.take(bucket, buffer))
        _keep_pending(self.model, buffer)

    def finish_weight_update(self) -> None:
        self._ledger.finish()
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            _pack_tied_output(self.model)
        if absent := {name for name, _ in self.model.named_parameters()} - self._loaded:
            raise TransferError(
                f"vLLM's model has parameters that nothing was sent for: {sorted(absent)[:8]}"
            )

    def shutdown(self) -> None:
        self._buckets.close()


def _keep_pending(model: torch.nn.Module, buffer: Tensor) -> None:
    """Copy what vLLM holds back of the buffer until a layer is whole: its memory is filled anew meanwhile."""
    borrowed = buffer.untyped_storage().data_ptr()
    for module in model.modules():
        for _, given in get_layerwise_info(module).loaded_weights:
            for name, value in given.arguments.items():
                if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == borrowed:
                    given.arguments[name] = value.clone()


def _forget_packed_experts(model: torch.nn.Module) -> None:
    """Have vLLM pack the experts of a mixture again: it does so where they have no kernel yet, and otherwise
    takes the new weights, unpacked, for packed ones."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _pack_tied_output(model: torch.nn.Module) -> None:
    """Pack the linear layers again that keep their weight beside the packed copy.

    That is the output layer of a tied model. It shares the embedding's tensor, which was loaded, and
    finalize_layerwise_reload leaves its packed copy: vLLM would sample from a mixture of old and new.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
