"""Queries and keys one position and pair at a time in float64: the oracle of the fast paths."""

import math

import torch
from torch import Tensor

from ..segments import Segments


def query_key_naive(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    base: float,
    chunk_size: int,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments as `query_key`; the results are float64."""
    z, weight, bias = z.double(), weight.double(), bias.double()
    length, batch, heads, width = z.shape
    segments = segments or Segments.of_rows(length, batch)
    normed = z / (z.square().mean(-1, keepdim=True) + eps).sqrt()
    results = []
    for row in range(2):
        scale = ((weight[row] + 1) / math.sqrt(width)).view(heads, width)
        x = normed * scale + bias[row].view(heads, width)
        results.append(_rotate(x, base, chunk_size, segments))
    return results[0], results[1]


def _rotate(x: Tensor, base: float, chunk_size: int, segments: Segments) -> Tensor:
    width = x.shape[-1]
    rotated = torch.empty_like(x)
    for row, start, length, before in segments:
        for t in range(length):
            position = (before + t) % chunk_size
            for i in range(0, width, 2):
                angle = position * base ** (-i / width)
                first, second = x[start + t, row, :, i], x[start + t, row, :, i + 1]
                turned = first * math.cos(angle) - second * math.sin(angle)
                rotated[start + t, row, :, i] = turned
                turned = first * math.sin(angle) + second * math.cos(angle)
                rotated[start + t, row, :, i + 1] = turned
    return rotated
