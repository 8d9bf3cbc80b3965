"""Tensors as bytes, and whether those that were read are those that were written."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values in row-major order and this machine's byte order; a view where that is one."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def tensor_digest(tensors: dict[str, Tensor], text: str = "") -> str:
    """Of a text, and of names, types, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
