"""A tensor as the bytes that files hold."""

from __future__ import annotations

import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values in row-major order and this machine's byte order; a view where that is one."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
