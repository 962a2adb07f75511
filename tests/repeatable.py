"""Refuses on a CPU what a GPU refuses in torch's deterministic mode.

The operations are those that raise on CUDA by the documentation of torch.use_deterministic_algorithms,
without those of images.
"""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_REFUSED = {"put", "histc", "kthvalue", "nll_loss_forward", "nll_loss2d_forward", "_embedding_bag"}


class OnlyRepeatable(TorchDispatchMode):
    """A context in which such an operation raises, backward passes included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        kwargs = kwargs or {}
        refused = (
            name in _REFUSED
            or (name == "cumsum" and (kwargs.get("dtype") or args[0].dtype).is_floating_point)
            or (name == "bincount" and len(args) > 1 and args[1] is not None)
            or (name == "median" and len(args) > 1)
            or (name == "scatter_reduce" and "prod" in args)
        )
        if refused:
            raise AssertionError(f"{func} is refused on GPUs where trainer.deterministic is true")
        return func(*args, **kwargs)
