"""TimestepNorm: group normalisation by the mean and variance of everything seen so far."""

import torch
from torch import Tensor

from ..dispatch import use_triton
from .naive import timestep_norm_naive
from .portable import timestep_norm_portable, timestep_statistics_portable
from .state import TimestepNormState

__all__ = [
    "TimestepNormState",
    "timestep_norm",
    "timestep_norm_naive",
    "timestep_norm_portable",
    "timestep_statistics",
]


def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    state: TimestepNormState | None = None,
    return_state: bool = False,
) -> tuple[Tensor, TimestepNormState | None]:
    """Normalise every time step by the statistics of its group up to and including that step.

    Per batch row and group, with mean_t and var_t (population) over all scalars of the group in
    steps 1..t (arXiv 2404.08801, section 3.2, as in the released source):

        y_t = (x_t - mean_t) / sqrt(var_t + eps) * (weight + 1) + bias

    Args:
        x: [batch, length, D], any floating type and strides.
        weight: [D], stored as an offset from one.
        bias: [D].
        num_groups: G, a divisor of D.
        eps: Added to the variance.
        state: Statistics of what came before: count int64 [batch] in steps, mean and var
            [batch, G]. None, or a count of zero, starts a sequence.
        return_state: Whether to return the state after the last step.

    Returns:
        y like x, and the new state (None unless asked for) with mean and var in float32. It is
        computed in float32; float64 inputs are computed, and their states returned, in float64.
        Differentiable in x, weight, bias, mean and var, through both results.

    Raises:
        ValueError: a shape or type does not fit.
    """
    _check(x, weight, bias, num_groups, state)
    if x.numel() and use_triton(x):
        from .triton import timestep_norm_triton

        return timestep_norm_triton(x, weight, bias, num_groups, eps, state, return_state)
    return timestep_norm_portable(x, weight, bias, num_groups, eps, state, return_state)


def timestep_statistics(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and population variance of every group over all steps of x.

    Args:
        x: [batch, length, D], any floating type and strides, length at least 1.
        num_groups: G, a divisor of D.

    Returns:
        mean and var, float64 [batch, G], differentiable in x.

    Raises:
        ValueError: x's shape or num_groups does not fit.
    """
    if x.dim() != 3 or x.shape[1] < 1 or num_groups < 1 or x.shape[2] % num_groups:
        raise ValueError(
            f"x is {list(x.shape)} and num_groups {num_groups}; x must be [batch, length, D] with "
            "length at least 1 and num_groups must divide D."
        )
    if x.numel() and use_triton(x):
        from .triton import timestep_statistics_triton

        return timestep_statistics_triton(x, num_groups)
    return timestep_statistics_portable(x, num_groups)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    state: TimestepNormState | None,
) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; it must be floating, [batch, length, D]."
        )
    batch, _, channels = x.shape
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}; it must divide x's {channels} channels.")
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "weight": (weight, (channels,)),
        "bias": (bias, (channels,)),
    }
    if state is not None:
        shapes["state.count"] = (state.count, (batch,))
        shapes["state.mean"] = (state.mean, (batch, num_groups))
        shapes["state.var"] = (state.var, (batch, num_groups))
        if state.count.dtype != torch.int64:
            raise ValueError(f"state.count is {state.count.dtype}; it must be int64.")
    for name, (tensor, expected) in shapes.items():
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {expected}.")
