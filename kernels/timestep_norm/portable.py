"""TimestepNorm as plain torch functions, for any device.

What has x's size is computed in float32. The statistics, D/G times smaller, are float64, and the
running sums are taken about a shift near the data, so neither the length nor a large mean costs
digits.
"""

import torch
from torch import Tensor

from ..plain import plain
from ..types import compute_dtype
from .state import TimestepNormState


def timestep_norm_portable(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    state: TimestepNormState | None = None,
    return_state: bool = False,
) -> tuple[Tensor, TimestepNormState | None]:
    """Same arguments and results as `timestep_norm`; nothing is checked here."""
    batch, length, _ = x.shape
    dtype = compute_dtype(x)
    if state is None:
        count = torch.zeros(batch, dtype=torch.int64, device=x.device)
        mean = var = torch.zeros(batch, num_groups, dtype=dtype, device=x.device)
    else:
        count, mean, var = state.count, state.mean.to(dtype), state.var.to(dtype)
    if length:
        y, mean, var = _timestep_norm(x, weight, bias, mean, var, count, eps)
    else:
        y = (x * (weight + 1) + bias).to(x.dtype)
    return y, TimestepNormState(count + length, mean, var) if return_state else None


@plain
def _timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean_in: Tensor,
    var_in: Tensor,
    count_in: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and var after the last step.

    With a shift K, the sums S1 and S2 of (x - K) and (x - K)^2 over all scalars up to a step, both
    divided by D/G, give mean = K + S1/count and var = S2/count - (S1/count)^2.
    """
    dtype = compute_dtype(x)
    wide = _grouped(x, mean_in.shape[1])
    step_mean, step_var = _moments(wide)

    # A state without steps may hold anything.
    started = (count_in > 0)[:, None]
    # The first mean of the sequence is among the data, so (mean - K)^2 <= count * var, and
    # S2/count - (S1/count)^2 keeps its digits in float64.
    shift = torch.where(started, mean_in.double(), step_mean[:, 0]).detach()
    before = count_in.double()[:, None]
    s1_in = before * torch.where(started, mean_in.double() - shift, 0.0)
    s2_in = before * torch.where(started, var_in.double(), 0.0)
    steps = torch.arange(1, x.shape[1] + 1, device=x.device)
    share = (count_in[:, None] + steps).double().reciprocal()[..., None]
    u = step_mean - shift[:, None]
    offset = (s1_in[:, None] + u.cumsum(1)) * share
    var = (s2_in[:, None] + (step_var + u * u).cumsum(1)) * share - offset * offset
    # Not below zero, whatever rounding did; the gradient is that of what should be there.
    var = var - var.detach().clamp_max(0.0)
    mean = offset + shift[:, None]

    high = mean.detach().to(dtype)
    low = (mean - high).to(dtype)
    rstd = (var + eps).to(dtype).rsqrt()
    normed = (wide - high[..., None]) * rstd[..., None] - (low * rstd)[..., None]
    y = normed.flatten(2) * (weight.to(dtype) + 1) + bias.to(dtype)
    return y.to(x.dtype), mean[:, -1].to(dtype), var[:, -1].to(dtype)


@plain
def timestep_statistics_portable(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Same argument and results as `timestep_statistics`; nothing is checked here."""
    step_mean, step_var = _moments(_grouped(x, num_groups))
    mean = step_mean.mean(1)
    return mean, ((step_mean - mean[:, None]).square() + step_var).mean(1)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[batch, length, G, D/G] in the type to compute in."""
    return x.to(compute_dtype(x)).unflatten(-1, (groups, -1))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each step's groups, float64 [batch, length, G].

    The mean is taken twice, so that what it is off by is small beside the group's own deviation: a
    compiled sum in float64 would take as long as all the rest.
    """
    rough = x.mean(-1).detach()
    centred = x - rough[..., None]
    rest = centred.mean(-1).double()
    return rough + rest, centred.square().mean(-1).double() - rest * rest
