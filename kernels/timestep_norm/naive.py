"""TimestepNorm one step at a time in float64: the oracle the fast paths are tested against."""

import torch
from torch import Tensor

from .state import TimestepNormState


def timestep_norm_naive(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    state: TimestepNormState | None = None,
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

    outputs = []
    for t in range(length):
        step = x[:, t].reshape(batch, num_groups, channels // num_groups)
        step_mean = step.mean(-1)
        step_var = (step - step_mean[..., None]).square().mean(-1)

        # Chan et al. for two sets, of `count` steps and of one step (each D/G scalars).
        seen = count[:, None].double()
        delta = step_mean - mean
        mean = mean + delta / (seen + 1)
        var = (seen * var + step_var + delta.square() * seen / (seen + 1)) / (seen + 1)
        count = count + 1
        normed = (step - mean[..., None]) / (var[..., None] + eps).sqrt()
        outputs.append(normed.reshape(batch, channels) * (weight + 1) + bias)

    y = torch.stack(outputs, dim=1) if outputs else x
    return y, TimestepNormState(count, mean, var) if return_state else None
