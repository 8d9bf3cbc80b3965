"""Tells whether tensors that were read are those that were written."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def tensor_digest(tensors: dict[str, Tensor], text: str = "") -> str:
    """Of a text, and of names, types, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
