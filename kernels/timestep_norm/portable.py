"""TimestepNorm with plain torch operations, for any device.

Everything of x's size is done in cache-sized blocks of time steps, in float32. The statistics,
D/G times smaller, are kept in float64, and running sums are taken about a shift near the data,
so neither the length nor a large mean costs digits.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import row_blocks
from .naive import TimestepNormState


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
        y, mean, var = _one_step(x, weight, bias, mean, var, count, eps)
        count = count + 1
    else:
        y, mean, var = _TimestepNorm.apply(x, weight, bias, mean, var, count, mask, eps)
        count = count + (length if mask is None else mask.sum(1))
    return y, TimestepNormState(count, mean, var) if return_state else None


def _one_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What decoding asks for, in as few calls as it takes (Chan et al. for a set and one step)."""
    dtype, groups = _compute_dtype(x), mean.shape[1]
    step = x[:, 0].double().unflatten(-1, (groups, -1))
    step_var, step_mean = torch.var_mean(step, -1, correction=0)
    seen = count.double()[:, None]
    delta = torch.where(seen > 0, step_mean - mean, 0.0)
    share = seen / (seen + 1)
    mean = step_mean - delta * share
    var = torch.where(seen > 0, var, 0.0) * share + (step_var + delta * delta * share) / (seen + 1)
    normed = (step - mean[..., None]) * (var + eps).rsqrt()[..., None]
    y = torch.addcmul(bias.to(dtype), normed.flatten(1).to(dtype), weight.to(dtype) + 1)
    return y[:, None].to(x.dtype), mean.to(dtype), var.to(dtype)


class _TimestepNorm(torch.autograd.Function):
    """Notation: A, V are the running mean and variance at a step, r = 1/sqrt(V + eps).

    With a shift K, S1 and S2 are the running sums over steps of the step's mean of (x - K) and of
    (x - K)^2, so that A = K + S1/count and V = S2/count - (S1/count)^2.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
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
        offset = u.cumsum_(1).div_(count)
        var = s2.cumsum_(1).div_(count).addcmul_(offset, offset, value=-1).clamp_min_(0.0)
        rstd = (var + eps).rsqrt_().to(dtype)
        mean = offset + shift[:, None]

        high = mean.to(dtype)
        low = (mean - high).to(dtype).mul_(rstd).neg_()
        gain, bias = weight.to(dtype) + 1, bias.to(dtype)
        y = torch.empty_like(x)
        for steps in _blocks(x):
            centred = _grouped(x, steps, groups, mask) - high[:, steps, :, None]
            normed = torch.addcmul(low[:, steps, :, None], centred, rstd[:, steps, :, None])
            _write(y, steps, torch.addcmul(bias, normed.flatten(2), gain), mask)

        ctx.save_for_backward(x, weight, offset, shift, rstd, count_in, mask)
        return y, mean[:, -1].to(dtype), var[:, -1].to(dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401
        grad_y: Tensor,
        grad_mean: Tensor,
        grad_var: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, weight, offset, shift, rstd, count_in, mask = ctx.saved_tensors
        dtype = _compute_dtype(x)
        channels, groups = x.shape[-1], shift.shape[1]
        size = channels // groups
        mean = offset + shift[:, None]
        high = mean.to(dtype)
        low = (mean - high).to(dtype)
        low_rstd = (low * rstd).neg_()
        gain = weight.to(dtype) + 1
        group_gain = gain.view(groups, size)

        # Through A and V at every step: dy/dA = -gain r, dy/dV = -gain r^2 normed / 2.
        to_mean, to_var = torch.empty_like(mean), torch.empty_like(mean)
        grad_weight, grad_bias = mean.new_zeros(channels), mean.new_zeros(channels)
        for steps in _blocks(x):
            centred = _grouped(x, steps, groups, mask) - high[:, steps, :, None]
            normed = torch.addcmul(low_rstd[:, steps, :, None], centred, rstd[:, steps, :, None])
            grad = _grouped(grad_y, steps, groups, mask)
            normed.mul_(grad)
            # One dimension at a time: both at once are slow where they lie apart in memory.
            grad_bias += grad.flatten(2).sum(1).sum(0)
            grad_weight += normed.flatten(2).sum((0, 1))
            to_mean[:, steps] = (grad * group_gain).sum(-1)
            to_var[:, steps] = normed.mul_(group_gain).sum(-1)
        to_mean.mul_(rstd).neg_()
        to_var.mul_(rstd).mul_(rstd).mul_(-0.5)
        to_mean[:, -1] += grad_mean
        to_var[:, -1] += grad_var

        # Through S1 and S2, which every later step contains. Where there is a state K is mean_in,
        # so S1 starts at count * (mean_in - K): zero, with derivative count.
        count = _running_count(x, count_in, mask)
        to_s2 = to_var.div_(count)
        to_s1 = to_mean.div_(count).addcmul_(offset, to_s2, value=-2)
        to_s1, to_s2 = _reverse_cumsum(to_s1), _reverse_cumsum(to_s2)
        before = count_in[:, None].double()
        grad_var_in = (before * to_s2[:, 0]).to(dtype)
        grad_mean_in = (before * to_s1[:, 0]).to(dtype)

        # d(S1)/dx = 1/size, d(S2)/dx = 2 (x - K)/size, and x - K = (x - high) - low + offset.
        slope = to_s2.mul_(2 / size)
        constant = to_s1.div_(size).addcmul_(offset, slope)
        slope = slope.to(dtype)
        constant = constant.to(dtype).addcmul_(slope, low, value=-1)
        grad_x = torch.empty_like(x)
        for steps in _blocks(x):
            centred = _grouped(x, steps, groups, mask) - high[:, steps, :, None]
            grad = _grouped(grad_y, steps, groups, mask) * group_gain
            grad.mul_(rstd[:, steps, :, None]).addcmul_(centred, slope[:, steps, :, None])
            grad.add_(constant[:, steps, :, None])
            _write(grad_x, steps, grad.flatten(2), mask)

        grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
        return grad_x, grad_weight, grad_bias, grad_mean_in, grad_var_in, None, None, None


def timestep_statistics_portable(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Same argument and results as `timestep_statistics`; nothing is checked here."""
    return _TimestepStatistics.apply(x, num_groups)


class _TimestepStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        step_mean, step_var = _step_statistics(x, groups, None)
        mean = step_mean.mean(1)
        var = step_mean.sub_(mean[:, None]).square_().add_(step_var).mean(1)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401
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
        slope, constant = (z.to(dtype)[:, None, :, None] for z in (slope, constant))
        grad_x = torch.empty_like(x)
        for steps in _blocks(x):
            centred = _grouped(x, steps, groups, None) - rounded[:, None, :, None]
            grad_x[:, steps] = torch.addcmul(constant, centred, slope).flatten(2)
        return grad_x, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(x: Tensor) -> Iterator[slice]:
    """Ranges of time steps that fit a CPU's cache, or a bounded share of a GPU's memory."""
    batch, length, channels = x.shape
    return row_blocks(length, batch * channels, x.device)


def _grouped(x: Tensor, steps: slice, groups: int, mask: Tensor | None) -> Tensor:
    """These steps as [batch, steps, groups, D/G] in the compute type, masked ones zero."""
    block = x[:, steps].to(_compute_dtype(x))
    if mask is not None:
        block = block.masked_fill(~mask[:, steps, None], 0.0)
    return block.unflatten(-1, (groups, -1))


def _write(target: Tensor, steps: slice, block: Tensor, mask: Tensor | None) -> None:
    if mask is not None:
        block.masked_fill_(~mask[:, steps, None], 0.0)
    target[:, steps] = block


def _step_statistics(x: Tensor, groups: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each step's groups, float64 [batch, length, groups]."""
    mean = torch.empty(*x.shape[:2], groups, dtype=torch.float64, device=x.device)
    var = torch.empty_like(mean)
    size = x.shape[-1] // groups
    for steps in _blocks(x):
        block = _grouped(x, steps, groups, mask)
        exact = block.sum(-1, dtype=torch.float64).div_(size)
        rounded = exact.to(block.dtype)
        norm = torch.linalg.vector_norm(block - rounded[..., None], dim=-1).double()
        mean[:, steps] = exact
        var[:, steps] = norm.square_().div_(size).sub_((exact - rounded).square_())
    return mean, var


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


def _reverse_cumsum(z: Tensor) -> Tensor:
    return z.flip(1).cumsum_(1).flip(1)
