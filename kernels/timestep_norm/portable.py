"""TimestepNorm with plain torch operations, for any device.

Everything of x's size is done in cache-sized blocks of time steps, or in fused loops, in float32.
The statistics, D/G times smaller, are kept in float64, and running sums are taken about a shift
near the data, so neither the length nor a large mean costs digits.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import place, row_blocks
from ..fuse import compiling, fused, pieces
from .naive import TimestepNormState
from .step import timestep_norm_step


def timestep_norm_portable(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    state: TimestepNormState | None = None,
    mask: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, TimestepNormState | None]:
    """Same arguments and results as `timestep_norm`; nothing is checked here."""
    batch, length, _ = x.shape
    dtype = _compute_dtype(x)
    if state is None:
        count = torch.zeros(batch, dtype=torch.int64, device=x.device)
        mean = var = torch.zeros(batch, num_groups, dtype=dtype, device=x.device)
    else:
        count, mean, var = state.count, state.mean.to(dtype), state.var.to(dtype)

    if length == 0:
        y = (x * (weight + 1) + bias).to(x.dtype)
    elif length == 1 and mask is None:
        started, share = (count > 0)[:, None], (count + 1).double().reciprocal()[:, None]
        y, mean, var = timestep_norm_step(
            x[:, 0].contiguous(),
            weight.to(dtype) + 1,
            bias.to(dtype),
            eps,
            # A state without steps may hold anything.
            torch.where(started, mean, 0.0),
            torch.where(started, var, 0.0),
            share,
        )
        y, count = y[:, None], count + 1
    else:
        y, mean, var = _TimestepNorm.apply(x, weight, bias, mean, var, count, mask, eps)
        count = count + (length if mask is None else mask.sum(1))
    return y, TimestepNormState(count, mean, var) if return_state else None


class _TimestepNorm(torch.autograd.Function):
    """Notation: A, V are the running mean and variance at a step, r = 1/sqrt(V + eps).

    With a shift K, S1 and S2 are the running sums over steps of the step's mean of (x - K) and of
    (x - K)^2, so that A = K + S1/count and V = S2/count - (S1/count)^2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean_in: Tensor,
        var_in: Tensor,
        count_in: Tensor,
        mask: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _compute_dtype(x)
        groups = mean_in.shape[1]
        step_mean, step_var = _step_statistics(x, groups, mask)

        started = (count_in > 0)[:, None]
        # The sums are taken about the first mean of the sequence. It is among the data, so
        # (A - K)^2 <= count * V, and S2/count - (S1/count)^2 keeps its digits in float64.
        shift = torch.where(started, mean_in.double(), _first_real(step_mean, mask))
        count = _running_count(x, count_in, mask)
        before = count_in[:, None].double()
        var_before = torch.where(started, var_in.double(), 0.0)

        u = step_mean.sub_(shift[:, None])
        if mask is not None:
            u.masked_fill_(~mask[..., None], 0.0)
        s2 = step_var.addcmul_(u, u)
        s2[:, 0].addcmul_(before, var_before)
        sums = (u.cumsum_(1), s2.cumsum_(1), count, shift[:, None])
        offset, var, *statistics = _averages(*sums, eps, dtype, like=x)
        gain, bias = weight.to(dtype) + 1, bias.to(dtype)
        y = None
        for steps in _blocks(x):
            parts = (z[:, steps] for z in statistics)
            block = _normalize(x[:, steps], _part(mask, steps), *parts, gain, bias)
            y = place(y, x, block, slice(None), steps)

        ctx.save_for_backward(x, weight, offset, shift, statistics[-1], count_in, mask)
        return y, (offset[:, -1] + shift).to(dtype), var[:, -1].to(dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_y: Tensor,
        grad_mean: Tensor,
        grad_var: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, weight, offset, shift, rstd, count_in, mask = ctx.saved_tensors
        dtype = _compute_dtype(x)
        channels, groups = x.shape[-1], shift.shape[1]
        size = channels // groups
        high, low = _rounded(offset, shift[:, None], dtype, like=x)
        low_rstd = (low * rstd).neg_()
        gain = weight.to(dtype) + 1

        to_mean = to_var = None
        grad_weight, grad_bias = offset.new_zeros(channels), offset.new_zeros(channels)
        for steps in _blocks(x):
            statistics = (z[:, steps] for z in (high, low_rstd, rstd))
            given = (x[:, steps], grad_y[:, steps], _part(mask, steps), *statistics)
            sums = _sums_over_groups(*given, gain)
            to_mean = place(to_mean, rstd, sums[0], slice(None), steps)
            to_var = place(to_var, rstd, sums[1], slice(None), steps)
            for total, sums in zip((grad_weight, grad_bias), _sums_over_steps(*given), strict=True):
                total += sums.sum((0, 1), dtype=torch.float64)

        # Every later step contains S1 and S2. Where there is a state K is mean_in, so S1 starts at
        # count * (mean_in - K): zero, with derivative count.
        count = _running_count(x, count_in, mask)
        through = (to_mean, to_var, grad_mean, grad_var)
        to_s1, to_s2 = (
            z.cumsum_(1) for z in _to_sums_reversed(*through, rstd, offset, count, like=x)
        )
        before = count_in[:, None].double()
        grad_var_in = (before * to_s2[:, -1]).to(dtype)
        grad_mean_in = (before * to_s1[:, -1]).to(dtype)

        slope, constant = _to_x(to_s1, to_s2, offset, low, size, like=x)
        grad_x = None
        for steps in _blocks(x):
            statistics = (z[:, steps] for z in (high, rstd, slope, constant))
            given = (x[:, steps], grad_y[:, steps], _part(mask, steps))
            grad_x = place(grad_x, x, _gradient(*given, *statistics, gain), slice(None), steps)

        grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
        return grad_x, grad_weight, grad_bias, grad_mean_in, grad_var_in, None, None, None


def timestep_statistics_portable(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Same argument and results as `timestep_statistics`; nothing is checked here."""
    return _TimestepStatistics.apply(x, num_groups)


class _TimestepStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        step_mean, step_var = _step_statistics(x, groups, None)
        mean = step_mean.mean(1)
        var = step_mean.sub_(mean[:, None]).square_().add_(step_var).mean(1)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_mean: Tensor,
        grad_var: Tensor,
    ) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        groups, dtype = mean.shape[1], _compute_dtype(x)
        scalars = x.shape[1] * (x.shape[2] // groups)
        slope = grad_var * (2 / scalars)
        # slope (x - mean) + grad_mean / scalars, about the rounded mean.
        rounded = mean.to(dtype)
        constant = grad_mean / scalars - slope * (mean - rounded)
        slope, constant = slope.to(dtype), constant.to(dtype)
        grad_x = None
        for steps in _blocks(x):
            part = _affine(x[:, steps], rounded, slope, constant)
            grad_x = place(grad_x, x, part, slice(None), steps)
        return grad_x, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(x: Tensor) -> Iterator[slice]:
    """Ranges of time steps that a stage takes at a time."""
    return row_blocks(x.shape[1], x)


def _part(mask: Tensor | None, steps: slice) -> Tensor | None:
    return None if mask is None else mask[:, steps, None]


def _grouped(x: Tensor, mask: Tensor | None, groups: int) -> Tensor:
    """x as [batch, steps, G, D/G] in the compute type, masked steps zero."""
    x = x.to(_compute_dtype(x))
    if mask is not None:
        x = torch.where(mask, x, 0.0)
    return x.unflatten(-1, (groups, x.shape[-1] // groups))


def _as_x(z: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[batch, steps, G, D/G] in x's shape and type, masked steps zero."""
    z = z.flatten(2)
    return (z if mask is None else torch.where(mask, z, 0.0)).to(dtype)


@fused
def _step_moments(x: Tensor, mask: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each step's groups: the mean rounded, what that lost, and the mean square from it."""
    x = _grouped(x, mask, groups)
    size = x.shape[-1]
    if compiling():
        # The compiler would sum float64 one number at a time; this loses 1e-8 of the deviation.
        rounded = x.sum(-1) / size
        centred = x - rounded[..., None]
        return rounded, centred.sum(-1) / size, (centred * centred).sum(-1) / size
    mean = x.sum(-1, dtype=torch.float64) / size
    rounded = mean.to(x.dtype)
    square = torch.linalg.vector_norm(x - rounded[..., None], dim=-1).square_() / size
    return rounded, mean - rounded, square


@fused
def _normalize(
    x: Tensor,
    mask: Tensor | None,
    high: Tensor,
    low: Tensor,
    rstd: Tensor,
    gain: Tensor,
    bias: Tensor,
) -> Tensor:
    """y; high, rstd and low, minus the mean's low part times rstd: [batch, steps, G]."""
    groups = high.shape[-1]
    normed = _normed(x, mask, high, low, rstd)
    y = torch.addcmul(bias.view(groups, -1), normed, gain.view(groups, -1))
    return _as_x(y, mask, x.dtype)


def _normed(x: Tensor, mask: Tensor | None, high: Tensor, low: Tensor, rstd: Tensor) -> Tensor:
    """What gain multiplies in y, [batch, steps, G, D/G]."""
    centred = _grouped(x, mask, high.shape[-1]) - high[..., None]
    return torch.addcmul(low[..., None], centred, rstd[..., None])


@fused
def _averages(
    s1: Tensor, s2: Tensor, count: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """A - K and V in float64, and what _normalize takes of them, all [batch, length, G]."""
    share = count.reciprocal()
    offset = s1 * share
    var = (s2 * share - offset * offset).clamp_min(0.0)
    rstd = (var + eps).to(dtype).rsqrt()
    high, low = _rounded.stage(offset, shift, dtype)
    return offset, var, high, -low * rstd, rstd


@fused
def _rounded(offset: Tensor, shift: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A in this type, and what that lost."""
    mean = offset + shift
    high = mean.to(dtype)
    return high, (mean - high).to(dtype)


@fused
def _to_sums_reversed(
    to_mean: Tensor,
    to_var: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    rstd: Tensor,
    offset: Tensor,
    count: Tensor,
) -> tuple[Tensor, Tensor]:
    """What a step alone gives to the gradients of S1 and S2, last step first, float64.

    dy/dA = -gain r and dy/dV = -gain r^2 normed / 2; grad_mean and grad_var [batch, G] are the
    last step's own.
    """
    last = torch.arange(offset.shape[1], device=offset.device) == offset.shape[1] - 1
    rstd = rstd.double()
    to_mean = torch.where(last[:, None], grad_mean[:, None], 0.0) - to_mean * rstd
    to_var = torch.where(last[:, None], grad_var[:, None], 0.0) - to_var * rstd * rstd / 2
    share = count.reciprocal()
    to_s2 = to_var * share
    to_s1 = to_mean * share - 2 * offset * to_s2
    return to_s1.flip(1), to_s2.flip(1)


@fused
def _to_x(
    to_s1: Tensor, to_s2: Tensor, offset: Tensor, low: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """What _gradient takes, from the gradients of S1 and S2 with the last step first.

    d(S1)/dx = 1/size and d(S2)/dx = 2 (x - K)/size, and x - K = (x - high) - low + offset.
    """
    slope = to_s2.flip(1) * (2 / size)
    constant = to_s1.flip(1) / size + offset * slope
    slope = slope.to(low.dtype)
    return slope, constant.to(low.dtype) - slope * low


@fused
def _sums_over_groups(
    x: Tensor,
    grad_y: Tensor,
    mask: Tensor | None,
    high: Tensor,
    low: Tensor,
    rstd: Tensor,
    gain: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sums of gain dL/dy, and of that times what gain multiplies in y: [batch, steps, G]."""
    groups = high.shape[-1]
    grad = _grouped(grad_y, mask, groups) * gain.view(groups, -1)
    return grad.sum(-1), (grad * _normed(x, mask, high, low, rstd)).sum(-1)


@fused
def _sums_over_steps(
    x: Tensor, grad_y: Tensor, mask: Tensor | None, high: Tensor, low: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums of dL/dy times what gain multiplies in y, and of dL/dy: [batch, pieces, D]."""
    grad = _grouped(grad_y, mask, high.shape[-1])
    return _step_sum(grad * _normed(x, mask, high, low, rstd)), _step_sum(grad)


def _step_sum(z: Tensor) -> Tensor:
    """[batch, steps, G, D/G] to sums of pieces of the steps, [batch, pieces, D]."""
    return pieces(z.flatten(2), 1).sum(2)


@fused
def _gradient(
    x: Tensor,
    grad_y: Tensor,
    mask: Tensor | None,
    high: Tensor,
    rstd: Tensor,
    slope: Tensor,
    constant: Tensor,
    gain: Tensor,
) -> Tensor:
    """dL/dx = gain rstd dL/dy + slope (x - high) + constant, the statistics [batch, steps, G]."""
    groups = high.shape[-1]
    centred = _grouped(x, mask, groups) - high[..., None]
    grad = _grouped(grad_y, mask, groups) * gain.view(groups, -1)
    grad = torch.addcmul(constant[..., None], grad, rstd[..., None])
    return _as_x(torch.addcmul(grad, centred, slope[..., None]), mask, x.dtype)


@fused
def _affine(x: Tensor, centre: Tensor, slope: Tensor, constant: Tensor) -> Tensor:
    """slope (x - centre) + constant, all three [batch, G]."""
    x, dtype = _grouped(x, None, centre.shape[-1]), x.dtype
    centre, slope, constant = (z[:, None, :, None] for z in (centre, slope, constant))
    return _as_x(torch.addcmul(constant, x - centre, slope), None, dtype)


def _step_statistics(x: Tensor, groups: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each step's groups, float64 [batch, length, groups]."""
    mean = torch.empty(*x.shape[:2], groups, dtype=torch.float64, device=x.device)
    var = torch.empty_like(mean)
    for steps in _blocks(x):
        moments = _step_moments(x[:, steps], _part(mask, steps), groups)
        parts = _mean_and_variance(*moments, like=x[:, steps])
        mean = place(mean, mean, parts[0], slice(None), steps)
        var = place(var, var, parts[1], slice(None), steps)
    return mean, var


@fused
def _mean_and_variance(rounded: Tensor, lost: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Of each step's groups in float64, from _step_moments."""
    lost = lost.double()
    return rounded.double() + lost, square.double() - lost * lost


def _first_real(step_mean: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return step_mean[:, 0].clone()
    first = mask.int().argmax(1)
    return step_mean[torch.arange(len(first), device=first.device), first]


def _running_count(x: Tensor, count_in: Tensor, mask: Tensor | None) -> Tensor:
    """Steps seen at each step, float64 [batch, length, 1]; 1 where none was, to divide by."""
    if mask is None:
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)
    else:
        steps = mask.cumsum(1)
    return (count_in[:, None] + steps).clamp_min(1).double()[..., None]
