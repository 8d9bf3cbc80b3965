"""TimestepNorm one step at a time in float64: the oracle the fast paths are tested against."""

from typing import NamedTuple

import torch
from torch import Tensor


class TimestepNormState(NamedTuple):
    """What TimestepNorm knows about a sequence so far; see `timestep_norm`."""

    count: Tensor
    mean: Tensor
    var: Tensor


def timestep_norm_naive(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    state: TimestepNormState | None = None,
    mask: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, TimestepNormState | None]:
    """Same arguments as `timestep_norm`; everything but the count is returned in float64."""
    batch, length, channels = x.shape
    x, weight, bias = x.double(), weight.double(), bias.double()
    if state is None:
        count = torch.zeros(batch, dtype=torch.int64, device=x.device)
        mean = var = x.new_zeros(batch, num_groups)
    else:
        # A state without steps may hold anything.
        count, started = state.count, (state.count > 0)[:, None]
        mean, var = (torch.where(started, z.double(), 0.0) for z in (state.mean, state.var))
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=x.device)

    outputs = []
    for t in range(length):
        real = mask[:, t, None]
        step = x[:, t].reshape(batch, num_groups, channels // num_groups)
        step_mean = step.mean(-1)
        step_var = (step - step_mean[..., None]).square().mean(-1)

        # Chan et al. for two sets, of `count` steps and of one step (each D/G scalars).
        seen = count[:, None].double()
        delta = step_mean - mean
        merged_mean = mean + delta / (seen + 1)
        merged_var = (seen * var + step_var + delta.square() * seen / (seen + 1)) / (seen + 1)

        count = count + mask[:, t].long()
        mean = torch.where(real, merged_mean, mean)
        var = torch.where(real, merged_var, var)
        normed = (step - mean[..., None]) / (var[..., None] + eps).sqrt()
        y = normed.reshape(batch, channels) * (weight + 1) + bias
        outputs.append(torch.where(real, y, 0.0))

    y = torch.stack(outputs, dim=1) if outputs else x
    return y, TimestepNormState(count, mean, var) if return_state else None
