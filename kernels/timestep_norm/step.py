"""TimestepNorm of one step, in as few calls as it takes: what decoding spends its time on."""

import torch
from torch import Tensor


def timestep_norm_step(
    x: Tensor, gain: Tensor, bias: Tensor, eps: float, mean: Tensor, var: Tensor, share: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `timestep_norm` makes of a single unmasked step, for any device; nothing is checked.

    Args:
        x: [batch, D] of any floating type, contiguous.
        gain: [D], weight + 1, float32 as bias is (float64 with float64 x).
        bias: See gain.
        eps: Added to the variance.
        mean: [batch, groups] as var, of the steps before; finite also where there was none.
        var: See mean.
        share: float64 [batch, 1], of this step among all so far: 1 where it is the first.

    Returns:
        y like x, and mean and var after the step in gain's type. They are computed in float64: a
        long stream loses only what the states' type rounds off. Differentiable.
    """
    dtype = gain.dtype
    step = x.double().view(*mean.shape, -1)
    step_var, step_mean = torch.var_mean(step, -1, correction=0)
    # Chan et al. for a set and one step.
    delta = step_mean - mean
    shifted = torch.addcmul(delta, delta, share, value=-1)
    mean = step_mean - shifted
    var = torch.lerp(var.double(), torch.addcmul(step_var, shifted, delta), share)
    normed = (step - mean.unsqueeze(-1)) * (var + eps).rsqrt().unsqueeze(-1)
    y = torch.addcmul(bias, normed.view(x.shape).to(dtype), gain)
    return y.to(x.dtype), mean.to(dtype), var.to(dtype)
