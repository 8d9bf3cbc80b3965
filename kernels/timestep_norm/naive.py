"""TimestepNorm one step at a time in float64: the oracle the fast paths are tested against."""

import torch
from torch import Tensor

from ..segments import Segments
from .state import TimestepNormState


def timestep_norm_naive(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    segments: Segments | None = None,
    state: TimestepNormState | None = None,
    return_state: bool = False,
) -> tuple[Tensor, TimestepNormState | None]:
    """Same arguments as `timestep_norm`; the results are float64."""
    length, batch, channels = x.shape
    segments = segments or Segments.of_rows(length, batch)
    x, weight, bias = x.double(), weight.double(), bias.double()

    y, means, variances = torch.empty_like(x), [], []
    for number, segment in enumerate(segments):
        count = segment.position
        mean = var = x.new_zeros(num_groups)
        if count:
            mean, var = state.mean[number].double(), state.var[number].double()
        outputs = []
        for step in x[segment.steps, segment.row].unflatten(-1, (num_groups, -1)):
            step_mean = step.mean(-1)
            step_var = (step - step_mean[:, None]).square().mean(-1)
            # Chan et al. for two sets, of `count` steps and of one step (each D/G scalars).
            delta = step_mean - mean
            mean = mean + delta / (count + 1)
            var = (count * var + step_var + delta.square() * count / (count + 1)) / (count + 1)
            count = count + 1
            normed = (step - mean[:, None]) / (var[:, None] + eps).sqrt()
            outputs.append(normed.reshape(channels) * (weight + 1) + bias)
        y[segment.steps, segment.row] = torch.stack(outputs)
        means.append(mean)
        variances.append(var)

    if not return_state:
        return y, None
    return y, TimestepNormState(torch.stack(means), torch.stack(variances))
