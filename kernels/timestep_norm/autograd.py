"""How TimestepNorm is differentiated, whichever path computes it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..segments import Segments


class Path(NamedTuple):
    """What computes TimestepNorm, without autograd."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    """x, weight, bias, G, eps, segments, mean and var before (or None) to y, every step's running
    mean and var as `backward` takes them, and mean and var after each segment [S, G]."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    """x, weight, the running mean and var, mean before (or None), G, eps, segments, and gradients
    of y and of both states to those of x, weight, bias and mean and var before each segment."""
    statistics: Callable[[Tensor, int, Segments], tuple[Tensor, Tensor]]
    """As `timestep_statistics`."""
    spread: Callable[[Tensor, Tensor, Tensor, Tensor, Segments], Tensor]
    """slope (x - mean) + constant, all three [S, G], of each segment's steps; 0 of others."""


class Normalize(torch.autograd.Function):
    """A path, and arguments as its `forward` takes them, to y and mean and var after segments."""

    @staticmethod
    def forward(
        ctx: Any,
        path: Path,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean_in: Tensor | None,
        var_in: Tensor | None,
        groups: int,
        eps: float,
        segments: Segments,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var, mean_after, var_after = path.forward(
            x, weight, bias, groups, eps, segments, mean_in, var_in
        )
        ctx.save_for_backward(x, weight, mean, var, mean_in)
        ctx.rest = path, groups, eps, segments
        return y, mean_after, var_after

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor, grad_mean: Tensor, grad_var: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, mean_in = ctx.saved_tensors
        path, groups, eps, segments = ctx.rest
        grad_x, grad_weight, grad_bias, *before = path.backward(
            x, weight, mean, var, mean_in, groups, eps, segments, grad_y, grad_mean, grad_var
        )
        if mean_in is None:
            before = [None, None]
        return None, grad_x, grad_weight, grad_bias, *before, None, None, None


class Statistics(torch.autograd.Function):
    """A path, and arguments as its `statistics` takes them, to mean and var of segments."""

    @staticmethod
    def forward(
        ctx: Any, path: Path, x: Tensor, groups: int, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        mean, var = path.statistics(x, groups, segments)
        ctx.save_for_backward(x, mean)
        ctx.rest = path, segments
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        x, mean = ctx.saved_tensors
        path, segments = ctx.rest
        groups = mean.shape[1]
        scalars = segments.tensor("length", x.device)[:, None] * (x.shape[2] // groups)
        slope = 2 * grad_var / scalars
        return None, path.spread(x, mean, slope, grad_mean / scalars, segments), None, None
