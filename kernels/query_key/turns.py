"""The rotations of rotary position embedding (arXiv 2104.09864, equation 15)."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def turns(
    count: int,
    width: int,
    base: float,
    device: torch.device,
    dtype: torch.dtype,
    stride: int = 1,
) -> Tensor:
    """exp(i p base^(-2j/width)) for p = 0, stride, ..., (count - 1) stride.

    Complex [count, width/2], from angles in float64.
    """
    # A cached inference tensor would be refused by a later training step.
    with torch.inference_mode(False), torch.no_grad():
        frequency = base ** -(torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
        position = stride * torch.arange(count, dtype=torch.float64, device=device)
        angle = torch.outer(position, frequency)
        return torch.polar(torch.ones_like(angle), angle).to(dtype)
