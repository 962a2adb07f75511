"""Lets megatron-core 0.16.1 run on a CPU-only torch over gloo; does nothing where a GPU is present.

All patches of third-party code live here and nowhere else. Each says which assumption it lifts.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = (
    *("zeros", "empty", "ones", "full", "tensor", "arange", "rand", "randn", "linspace"),
    *("zeros_like", "empty_like", "ones_like", "full_like"),
)
_installed = False


def install() -> None:
    """Patch torch.cuda's bookkeeping and megatron-core's CUDA assumptions, once, where there is no GPU.

    Must run before the first import of megatron.core.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _import_megatron_uncompiled()
    _answer_for_cuda_runtime()
    _redirect_cuda_tensors()
    _patch_random_state()
    _patch_norm_under_sequence_parallel()
    _patch_moe()
    _patch_unequal_parts()
    _patch_latent_attention()
    _patch_optimizer()
    _patch_distributed_optimizer()


class _Stream:
    """A stream that is always done: CPU kernels run in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _import_megatron_uncompiled() -> None:
    """megatron.core.jit calls torch.compile at import; on CPU that costs minutes and gains nothing."""
    compile_fn = torch.compile
    torch.compile = lambda fn=None, **kwargs: fn if fn is not None else (lambda f: f)  # type: ignore[assignment]
    try:
        for name in ("models.gpt.gpt_layer_specs", "transformer.moe.moe_layer", "optimizer"):
            importlib.import_module(f"megatron.core.{name}")
    finally:
        torch.compile = compile_fn


def _answer_for_cuda_runtime() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.current_device = lambda: _CPU
    for name in ("set_device", "synchronize", "empty_cache"):  # one function each: dynamo forbids aliases
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *args, **kwargs: stream)
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, lambda *args, **kwargs: None)


def _redirect_cuda_tensors() -> None:
    """Literal device="cuda", .cuda() and pinned memory mean the CPU here."""
    _device_constructors()  # cached now, with the originals: `with torch.device(...)` must still know them
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args: self
    tensor.record_stream = lambda self, *args: None
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self
    original_to = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return original_to(self, *args, **kwargs)

    tensor.to = to


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return (isinstance(device, int) and not isinstance(device, bool)) or (
        isinstance(device, str) and device.startswith("cuda")
    )


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    wrapped.__wrapped__ = factory  # type: ignore[attr-defined]
    return wrapped


def _patch_random_state() -> None:
    """The RNG tracker forks the CPU generator instead of the CUDA one."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # type: ignore[attr-defined]
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # type: ignore[attr-defined]
    # it warns that the CPU state changes inside a CUDA fork, which is the point here
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _patch_norm_under_sequence_parallel() -> None:
    """The torch norm refuses sequence parallel; its maths is the same, only its weights need the mark."""
    norm: Any = importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    build = norm.__new__

    def build_marked(cls: Any, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        sequence_parallel, config.sequence_parallel = config.sequence_parallel, False
        try:
            module: torch.nn.Module = build(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for parameter in module.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        return module

    norm.__new__ = build_marked


def _patch_moe() -> None:
    """moe_utils reads a name that only TE defines, and split sizes become numpy only for CUDA tensors."""
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = dispatcher.maybe_move_tensor_to_cpu = to_host


def _patch_unequal_parts() -> None:
    """Gloo gathers and scatters equal parts only; the ranks of an expert have different numbers of tokens."""
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_any(part: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or group.size() == 1:
            return gather(part, group, None, use_global_buffer)
        padded = part.new_zeros(max(sizes), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([whole[:size] for whole, size in zip(parts, sizes, strict=True)])

    def scatter_any(whole: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or group.size() == 1:
            return scatter(whole, group, None, use_global_buffer)
        total = whole.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split(list(sizes))[group.rank()].clone()

    mappings._gather_along_first_dim = gather_any
    mappings._reduce_scatter_along_first_dim = scatter_any


def _patch_latent_attention() -> None:
    """It takes TE for installed wherever megatron-core's own wrappers, then mocks, can be imported."""
    module: Any = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    if not isinstance(module.TELinear, type):
        module.HAVE_TE = False


def _patch_optimizer() -> None:
    """Optimizers recognise parameters by the type name torch.cuda.*."""
    original_type = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None:
            return original_type(self, dtype, **kwargs)
        name = original_type(self)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return (
            name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.core.optimizer") else name
        )

    torch.Tensor.type = type_name  # type: ignore[assignment, method-assign]


def _patch_distributed_optimizer() -> None:
    """Its state with torch's AdamW, which has a step a parameter, and no state before the first step."""
    module = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    optimizer: Any = module.DistributedOptimizer
    set_states = optimizer._set_main_param_and_optimizer_states

    def set_states_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        group, index = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()  # loaded as one tensor, which every parameter would advance
            # the one in `tensors`, of dp_reshardable, is that of before the loading
            tensors = {**tensors, "step": state["step"]}
        return set_states(self, model_param, tensors)

    optimizer._set_main_param_and_optimizer_states = set_states_with_step
    state_dict = optimizer.state_dict

    def state_dict_of_any(self: Any) -> Any:
        """A new process loads before it steps; a rank whose parameters are all frozen never has a state."""
        inner = self.optimizer
        for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
            if not inner.state[parameter]:
                moments = {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[parameter] = {"step": torch.tensor(0.0), **moments}
        if inner.state:
            return state_dict(self)
        groups = [
            {**{name: value for name, value in group.items() if name != "params"}, "step": 0.0}
            for group in inner.param_groups
        ]
        scaler = {"grad_scaler": self.grad_scaler.state_dict()} if self.grad_scaler else {}
        return {"optimizer": {"param_groups": groups}, **scaler}

    optimizer.state_dict = state_dict_of_any
