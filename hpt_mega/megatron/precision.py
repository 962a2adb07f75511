"""FP8 training: Transformer Engine's recipes through megatron-core on GPUs, their emulation on the CPU.

The emulation acts on megatron-core's local linear layers; the rules themselves are in fp8.py.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.config import Fp8Config
from hpt_mega.megatron import cpu
from hpt_mega.megatron.fp8 import Operand, Role, Scaling, align_of, amax_of, product, scale_for

cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.fp8_utils import is_first_last_bf16_layer  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


def transformer_options(fp8: Fp8Config, experts: bool) -> dict[str, Any]:
    """The fields of megatron-core's TransformerConfig that make Transformer Engine compute in FP8.

    Off GPUs only those that say which layers stay in high precision: megatron-core would ask for
    Transformer Engine. Embeddings, output layer, router and core attention never are in FP8.
    """
    if not fp8.recipe:
        return {}
    options: dict[str, Any] = {
        "first_last_layers_bf16": bool(fp8.first_layers or fp8.last_layers),
        "num_layers_at_start_in_bf16": fp8.first_layers,
        "num_layers_at_end_in_bf16": fp8.last_layers,
    }
    if not torch.cuda.is_available():
        return options
    return options | {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": fp8.amax_algorithm,
        "fp8_param": fp8.param_gather,
        "moe_router_padding_for_quantization": experts,  # each expert's tokens, to what the kernels take
    }


def gathers_fp8(fp8: Fp8Config) -> bool:
    """Whether weights are kept and gathered in FP8; on GPUs only, the emulation's numbers do not change."""
    return fp8.param_gather and torch.cuda.is_available()


def tokens_multiple(fp8: Fp8Config) -> int:
    """What Transformer Engine needs a sequence's length to be a multiple of; the emulation takes any."""
    return align_of(fp8.recipe) if fp8.recipe and torch.cuda.is_available() else 1


def tolerate_empty_state(grouped: Any) -> None:
    """Let megatron-core's class of grouped products take apart the state of a recipe that has none.

    Only delayed scaling has one; elsewhere it is an empty tensor, which 0.16.1 unpickles once FP8 has run.
    """
    split = grouped._split_extra_state
    if split.__name__ == "split_or_repeat":
        return

    def split_or_repeat(self: Any, state: Any) -> Any:
        is_empty = torch.is_tensor(state) and not state.numel()
        return [state] * self.num_gemms if is_empty else split(self, state)

    grouped._split_extra_state = split_or_repeat


def emulate(model: Any, fp8: Fp8Config) -> None:
    """Let the linear layers of a model's transformer layers compute as the recipe would, off GPUs.

    Call it once, before the model is wrapped. Raises ValueError for weights the recipe's kernels refuse.
    """
    if not fp8.recipe or torch.cuda.is_available():
        return
    linears = {
        name: module
        for layer in model.decoder.layers
        if not is_first_last_bf16_layer(model.config, layer.layer_number - 1)
        for name, module in layer.named_modules(prefix=f"layer {layer.layer_number - 1}")
        if isinstance(module, ColumnParallelLinear | RowParallelLinear)
    }
    _refuse_unaligned(fp8, linears)
    scaling = Scaling(fp8.recipe, fp8.format)
    if fp8.recipe != "delayed":
        for linear in linears.values():
            linear._forward_impl = EmulatedProduct(linear, scaling)
        return
    history = AmaxHistory(fp8, len(linears))
    history.follow(model.decoder)
    for index, linear in enumerate(linears.values()):
        DelayedProduct(linear, scaling, history, index).attach()


def _refuse_unaligned(fp8: Fp8Config, linears: dict[str, Any]) -> None:
    align = align_of(fp8.recipe)
    for name, linear in linears.items():
        rows, columns = linear.weight.shape
        if rows % align or columns % align:
            raise ValueError(
                f"{name}: a weight of {rows} x {columns} on this rank; fp8 recipe {fp8.recipe!r} needs "
                f"multiples of {align}: change parallel.tp, or train in bf16"
            )


class EmulatedProduct:
    """What replaces a local linear layer's matrix product and its gradients.

    As in Transformer Engine, each of the three products (output, input gradient, weight gradient) quantises
    the high-precision tensors along the dimension it sums over. Rows need no padding here: a short last
    block of tokens has the amax of what is there, which zeros would not change.
    """

    def __init__(self, linear: Any, scaling: Scaling) -> None:
        self.linear = linear
        self.scaling = scaling
        self._served: tuple[int, Operand] | None = None

    def __call__(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **unused: Any,
    ) -> Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        out: Tensor = _Product.apply(input, weight, self)
        return out if bias is None else out + bias

    def quantise(self, x: Tensor, role: Role, contracted: int) -> Operand:
        return self.scaling.quantise(x, role, contracted)

    def weight(self, weight: Tensor) -> Operand:
        """For the output. While rollouts decode, weights stand still and are quantised once."""
        if self.linear.training:
            self._served = None
            return self.quantise(weight, "weight", 1)
        if self._served is None or self._served[0] != weight._version:
            self._served = weight._version, self.quantise(weight, "weight", 1)
        return self._served[1]

    def after_backward(self) -> None:
        """The gradients of this layer for one micro-batch are done."""


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, emulated: EmulatedProduct) -> Tensor:
        x_MK = x.reshape(-1, x.shape[-1])
        rows = emulated.quantise(x_MK, "input", 1)
        weight_NK = emulated.weight(weight)
        ctx.emulated, ctx.input_scale = emulated, rows.scale
        ctx.weight_scale = weight_NK.scale
        keep = emulated.scaling.is_symmetric("weight")
        ctx.save_for_backward(x, weight, weight_NK.values if keep else None)
        out_MN = product(rows, Operand(weight_NK.values.t(), weight_NK.scale))
        return out_MN.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, quantised = ctx.saved_tensors
        emulated: EmulatedProduct = ctx.emulated
        scaling = emulated.scaling
        grad_MN, x_MK = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x, grad_weight = None, None
        rows = emulated.quantise(grad_MN, "gradient", 1)
        if ctx.needs_input_grad[0]:
            weight_NK = (
                scaling.quantise(weight, "weight", 0)
                if quantised is None
                else Operand(quantised, ctx.weight_scale)
            )
            grad_x = product(rows, weight_NK).view(x.shape)
        if ctx.needs_input_grad[1]:
            columns = rows if scaling.is_symmetric("gradient") else scaling.quantise(grad_MN, "gradient", 0)
            x_columns = scaling.quantise(x_MK, "input", 0, 1.0 / ctx.input_scale)
            grad_weight = product(Operand(columns.values.t(), columns.scale), x_columns)
        emulated.after_backward()
        return grad_x, grad_weight, None


class AmaxHistory:
    """Delayed scaling's memory for one pipeline stage: amax of the last micro-batches, and the scales.

    Row 0 of a history is the micro-batch in progress. At the end of a stage's forward the largest amax over
    the tensor- and data-parallel ranks enters the history of inputs and weights, at the end of its backward
    that of the gradients; the scales that follow serve the next micro-batch. The first one has scale 1.
    """

    def __init__(self, fp8: Fp8Config, linears: int) -> None:
        self.fp8 = fp8
        self.scaling = Scaling(fp8.recipe, fp8.format)
        self.history: dict[Role, Tensor] = {}
        self.scale: dict[Role, Tensor] = {}
        for role in _ROLES:
            self.history[role] = torch.zeros(fp8.amax_history, linears)
            self.scale[role] = torch.ones(linears)
        self.in_training_forward = False
        self.first: DelayedProduct | None = None  # its gradients are the stage's last

    def follow(self, decoder: torch.nn.Module) -> None:
        """Update at the end of each forward that will be trained on."""
        decoder.register_forward_pre_hook(lambda *_: self._enter())
        decoder.register_forward_hook(lambda *_: self._leave())

    def _enter(self) -> None:
        self.in_training_forward = torch.is_grad_enabled()
        self.first = None if self.in_training_forward else self.first

    def _leave(self) -> None:
        if self.in_training_forward:
            self.update("input", "weight")
        self.in_training_forward = False

    def record(self, role: Role, index: int, x: Tensor) -> None:
        current = self.history[role][0]
        current[index] = torch.maximum(current[index], amax_of(x))

    def update(self, *roles: Role) -> None:
        """End a micro-batch for these roles; every tensor- and data-parallel rank calls it."""
        amax = torch.cat([self.history[role][0] for role in roles])
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        if dist.get_world_size(group) > 1:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
        for role, current in zip(roles, amax.chunk(len(roles)), strict=True):
            self._advance(role, current)

    def _advance(self, role: Role, current: Tensor) -> None:
        history, scale = self.history[role], self.scale[role]
        history[0] = current
        chosen = history.amax(0) if self.fp8.amax_algorithm == "max" else current
        found = scale_for(chosen, self.scaling.dtype(role), self.fp8.margin)
        known = torch.isfinite(chosen) & (chosen > 0)
        scale.copy_(torch.where(known, found, scale))
        rolled = history.roll(-1, 0)
        rolled[0] = 0.0
        history.copy_(torch.where(current != 0, rolled, history))  # a layer that saw no tokens has no entry


_ROLES: tuple[Role, ...] = ("input", "weight", "gradient")


class DelayedProduct(EmulatedProduct):
    """The product of layer `index` of a stage, with the scales of its AmaxHistory.

    Recomputed activations must be what the first forward made: outside a forward in training, a layer that
    ran without autograd inside one takes the scales it had then.
    """

    def __init__(self, linear: Any, scaling: Scaling, history: AmaxHistory, index: int) -> None:
        super().__init__(linear, scaling)
        self.history = history
        self.index = index
        self._to_recompute: deque[dict[Role, float]] = deque()
        self._recomputing: dict[Role, float] | None = None

    def attach(self) -> None:
        """Compute for the layer, and save its part of the history where the layer saves its state."""
        self.linear._forward_impl = self
        self.linear.get_extra_state = self.state
        self.linear.set_extra_state = self.set_state

    def state(self) -> dict[str, Tensor]:
        columns = {f"amax_{role}": t[:, self.index].clone() for role, t in self.history.history.items()}
        return columns | {f"scale_{role}": t[self.index].clone() for role, t in self.history.scale.items()}

    def set_state(self, state: dict[str, Tensor] | None) -> None:
        """Go on from `state`; None, of a run without FP8, begins anew."""
        if state is None:
            return
        for role in _ROLES:
            saved, mine = state[f"amax_{role}"], self.history.history[role]
            if len(saved) != len(mine):
                raise ValueError(
                    f"the checkpoint's amax history has {len(saved)} entries, "
                    f"precision.fp8.amax_history is {len(mine)}; set it to {len(saved)}"
                )
            mine[:, self.index] = saved
            self.history.scale[role][self.index] = state[f"scale_{role}"]

    def __call__(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        history = self.history
        if history.in_training_forward:
            history.first = history.first or self
            if not torch.is_grad_enabled():
                self._to_recompute.append(self._scales())
        elif torch.is_grad_enabled() and self._to_recompute:
            self._recomputing = self._to_recompute.popleft()
        try:
            return super().__call__(input, weight, **options)
        finally:
            self._recomputing = None

    def _scales(self) -> dict[Role, float]:
        return {role: float(self.history.scale[role][self.index]) for role in _ROLES}

    def quantise(self, x: Tensor, role: Role, contracted: int) -> Operand:
        if role == "gradient" or self.history.in_training_forward:
            self.history.record(role, self.index, x)
        scales = self._recomputing or self._scales()
        return self.scaling.quantise(x, role, contracted, scales[role])

    def after_backward(self) -> None:
        if self.history.first is self:
            self.history.update("gradient")
