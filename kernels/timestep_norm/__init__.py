"""TimestepNorm: group normalisation by the mean and variance of everything seen so far."""

import torch
from torch import Tensor

from ..dispatch import use_triton
from ..segments import Segments, checked_segments
from .autograd import Normalize, Path, Statistics
from .naive import timestep_norm_naive
from .state import TimestepNormState

__all__ = [
    "TimestepNormState",
    "timestep_norm",
    "timestep_norm_naive",
    "timestep_statistics",
]


def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    segments: Segments | None = None,
    state: TimestepNormState | None = None,
    return_state: bool = False,
) -> tuple[Tensor, TimestepNormState | None]:
    """Normalise every step by the statistics of its group in its document up to and with that step.

    Per document and group, with mean_t and var_t (population) over all scalars of the group in
    steps 1..t (arXiv 2404.08801, section 3.2, as in the released source):

        y_t = (x_t - mean_t) / sqrt(var_t + eps) * (weight + 1) + bias

    Args:
        x: [length, batch, D], any floating type and strides.
        weight: [D], stored as an offset from one.
        bias: [D].
        num_groups: G, a divisor of D.
        eps: Added to the variance.
        segments: Which documents x's steps belong to; None: each row is the start of one.
        state: mean and var [S, G] of what came before each segment in its document; not read
            where a segment starts one.
        return_state: Whether to return the state after each segment.

    Returns:
        y like x, and the new state (None unless asked for) with mean and var in float32. It is
        computed in float32; float64 inputs are computed, and their states returned, in float64.
        Differentiable (once) in x, weight, bias, mean and var, through both results.

    Raises:
        ValueError: a shape or type does not fit, or a state is missing.
    """
    segments = checked_segments(x, segments)
    _check(x, weight, bias, num_groups, segments, state)
    before = state or (None, None)
    y, *after = Normalize.apply(_path(x), x, weight, bias, *before, num_groups, eps, segments)
    return y, TimestepNormState(*after) if return_state else None


def timestep_statistics(
    x: Tensor, num_groups: int, segments: Segments | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and population variance of every group over all steps of each segment.

    Args:
        x: [length, batch, D], any floating type and strides, length at least 1.
        num_groups: G, a divisor of D.
        segments: Which steps, not necessarily all of x; None: each row's.

    Returns:
        mean and var, float64 [S, G], differentiable in x.

    Raises:
        ValueError: x's shape or num_groups does not fit.
    """
    if x.dim() != 3 or x.shape[0] < 1 or num_groups < 1 or x.shape[2] % num_groups:
        raise ValueError(
            f"x is {list(x.shape)} and num_groups {num_groups}; x must be [length, batch, D] with "
            "length at least 1 and num_groups must divide D."
        )
    segments = checked_segments(x, segments)
    if not len(segments):
        nothing = x.new_zeros(0, num_groups, dtype=torch.float64)
        return nothing, nothing
    return Statistics.apply(_path(x), x, num_groups, segments)


def _path(x: Tensor) -> Path:
    if x.numel() and use_triton(x):
        from .triton import PATH
    else:
        from .portable import PATH
    return PATH


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    segments: Segments,
    state: TimestepNormState | None,
) -> None:
    channels = x.shape[-1]
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [length, batch, D].")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}; it must divide x's {channels} channels.")
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "weight": (weight, (channels,)),
        "bias": (bias, (channels,)),
    }
    if state is not None:
        shapes["state.mean"] = (state.mean, (len(segments), num_groups))
        shapes["state.var"] = (state.var, (len(segments), num_groups))
    elif segments.continued:
        raise ValueError("a segment goes on with its document; it needs the state before it.")
    for name, (tensor, expected) in shapes.items():
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {expected}.")
