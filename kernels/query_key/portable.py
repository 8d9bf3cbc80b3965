"""Queries and keys as a plain torch function, for any device."""

import math

import torch
from torch import Tensor

from ..plain import plain
from ..types import compute_dtype
from .turns import turns


def query_key_portable(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    base: float,
    offset: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `query_key`; nothing is checked here."""
    dtype = compute_dtype(z).to_complex()
    table = torch.view_as_real(turns(chunk_size, z.shape[-1], float(base), z.device, dtype))
    position = (offset % chunk_size + torch.arange(z.shape[1], device=z.device)) % chunk_size
    return _query_key(z, weight, bias, (table, position), eps)


@plain
def _query_key(
    z: Tensor, weight: Tensor, bias: Tensor, turn: tuple[Tensor, Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """turn: cosines and sines [chunk_size, width / 2, 2], and each step's place among them."""
    wide = z.to(compute_dtype(z))
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    scale = (weight.to(wide.dtype) + 1) / math.sqrt(z.shape[-1])
    cos, sin = turn[0][turn[1]][:, None].unbind(-1)
    results = []
    for gain, shift in zip(scale, bias.to(wide.dtype), strict=True):
        x = normed * gain.view(z.shape[2:]) + shift.view(z.shape[2:])
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = (first * cos - second * sin, first * sin + second * cos)
        results.append(torch.stack(rotated, dim=-1).flatten(-2).to(z.dtype).contiguous())
    return results[0], results[1]
