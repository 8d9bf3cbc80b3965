"""RMSNorm of few rows without autograd, in as few calls as it takes: for decoding."""

import torch
from torch import Tensor


def rms_norm_step(x: Tensor, gain: Tensor, eps: Tensor) -> Tensor:
    """What `rms_norm` makes of x, for any device, not differentiable; nothing is checked.

    Args:
        x: [..., D] of any floating type.
        gain: [D], (weight + 1) sqrt(D), float32 (float64 with float64 x).
        eps: sqrt(D eps), a single number of gain's type.
    """
    return (unit_rows(x.to(gain.dtype), eps) * gain).to(x.dtype)


def unit_rows(x: Tensor, eps: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + eps^2) over the last dimension."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), eps)
