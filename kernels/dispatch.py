"""Chooses an operator's implementation: the portable torch path or the Triton kernels."""

import os
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

VARIABLE = "MEGALODON_KERNELS"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The oldest cards whose tensor cores take what the kernels multiply.
OLDEST_CAPABILITY = (8, 0)


def use_triton(*tensors: Tensor | None) -> bool:
    """True if an operator on these floating tensors should run its Triton kernels.

    By itself it does where all of them (None is passed over) are on a CUDA device of capability
    8.0 or newer, of type float32, bfloat16 or float16, and Triton is installed. The environment
    variable MEGALODON_KERNELS=torch never does and MEGALODON_KERNELS=triton always does, but for
    types that no kernel takes (float64), which stay on the portable path; tensors of the meta
    device then show what would be launched, to who intercepts it.

    Raises:
        ValueError: MEGALODON_KERNELS is neither torch, triton nor empty.
        RuntimeError: it is triton, and Triton is missing or a tensor is where it cannot run.
    """
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", "torch", "triton"):
        raise ValueError(f"{VARIABLE} is {choice!r}; it must be torch, triton or unset.")
    given = [tensor for tensor in tensors if tensor is not None]
    if choice == "torch" or any(tensor.dtype not in DTYPES for tensor in given):
        return False
    if choice == "triton":
        _require(given)
        return True
    return _installed() and all(
        tensor.is_cuda and _new_enough(tensor.get_device()) for tensor in given
    )


def _require(tensors: list[Tensor]) -> None:
    if not _installed():
        raise RuntimeError(f"{VARIABLE} is triton, but Triton is not installed.")
    if not all(tensor.is_cuda or tensor.is_meta for tensor in tensors) and not interpreted():
        raise RuntimeError(
            f"{VARIABLE} is triton, but a tensor is not on a CUDA device, where Triton runs only "
            "with TRITON_INTERPRET=1."
        )


def interpreted() -> bool:
    """True if kernels run in Triton's interpreter, which takes tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def _installed() -> bool:
    return find_spec("triton") is not None


@lru_cache
def _new_enough(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
