"""Queries and keys one position and pair at a time in float64: the oracle of the fast paths."""

import math

import torch
from torch import Tensor


def query_key_naive(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    base: float,
    offset: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Same arguments as `query_key`; the results are float64."""
    z, weight, bias = z.double(), weight.double(), bias.double()
    heads, width = z.shape[2:]
    normed = z / (z.square().mean(-1, keepdim=True) + eps).sqrt()
    results = []
    for row in range(2):
        scale = ((weight[row] + 1) / math.sqrt(width)).view(heads, width)
        results.append(
            _rotate(normed * scale + bias[row].view(heads, width), base, offset, chunk_size)
        )
    return results[0], results[1]


def _rotate(x: Tensor, base: float, offset: int, chunk_size: int) -> Tensor:
    width = x.shape[-1]
    rotated = torch.empty_like(x)
    for t in range(x.shape[1]):
        position = (offset + t) % chunk_size
        for i in range(0, width, 2):
            angle = position * base ** (-i / width)
            first, second = x[:, t, :, i], x[:, t, :, i + 1]
            rotated[:, t, :, i] = first * math.cos(angle) - second * math.sin(angle)
            rotated[:, t, :, i + 1] = first * math.sin(angle) + second * math.cos(angle)
    return rotated
