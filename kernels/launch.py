"""How Triton kernels are compiled and launched."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

# What differs from batch to batch; specialized, every new length would wait for the compiler.
LENGTHS = ("length", "positions", "before", "first", "rows", "inner", "tiles", "segment")
LENGTHS += ("segments", "programs", "stretch")

# Decorates what is launched. Grids have one long side, the first: the others end at 65,535.
kernel = triton.jit(do_not_specialize=LENGTHS)


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's CUDA device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def side_by_side(x: Tensor) -> Tensor:
    """With the last dimension's numbers next to each other, and no memory that places share."""
    return x if x.stride(-1) == 1 and min(x.stride()) > 0 else x.contiguous()


def exact_float32() -> bool:
    """True if torch's settings ask for float32 products of full precision (no TF32) on CUDA.

    Both ways to say it count: torch.set_float32_matmul_precision and fp32_precision.
    """
    return torch.backends.cuda.matmul.fp32_precision != "tf32"
