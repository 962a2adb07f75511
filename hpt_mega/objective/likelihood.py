"""Part 4 of the estimator: the shaping f of the likelihood ratio x = π_θ / π_ref.

The gradient runs through it; the ratio itself is made in surrogate.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hpt_mega.objective.options import Options

Likelihood = Callable[[Tensor, Options], Tensor]


def identity(ratio: Tensor, options: Options) -> Tensor:
    """f(x) = x."""
    return ratio


def shaped(ratio: Tensor, options: Options) -> Tensor:
    """f(x) = x / (x + gamma): rare tokens learn faster (LUFFY, arXiv 2504.14945)."""
    return ratio / (ratio + options.shaping_gamma)


def square_root(ratio: Tensor, options: Options) -> Tensor:
    """f(x) = √x."""
    return ratio.sqrt()


def log(ratio: Tensor, options: Options) -> Tensor:
    """f(x) = log x: the gradient is ∇log π_θ whatever π_ref is."""
    return ratio.log()


def power(ratio: Tensor, options: Options) -> Tensor:
    """f(x) = x ** shaping_power."""
    return ratio.pow(options.shaping_power)


LIKELIHOODS: dict[str, Likelihood] = {
    "identity": identity,
    "shaped": shaped,
    "square_root": square_root,
    "log": log,
    "power": power,
}
