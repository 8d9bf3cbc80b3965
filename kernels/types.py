"""The types that operators compute in."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float32, but float64 for float64 x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
