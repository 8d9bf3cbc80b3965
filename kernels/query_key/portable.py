"""Queries and keys as a plain torch function, for any device."""

import math

import torch
from torch import Tensor

from ..plain import plain
from ..segments import Segments
from ..types import compute_dtype
from .turns import turns


def query_key_portable(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    base: float,
    chunk_size: int,
    segments: Segments,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `query_key`; nothing is checked here."""
    dtype = compute_dtype(z).to_complex()
    table = torch.view_as_real(turns(chunk_size, z.shape[-1], float(base), z.device, dtype))

    def make() -> Tensor:
        rows = 1 if segments.whole_rows else None
        return (segments.positions(z.device)[:, :rows] % chunk_size).contiguous()

    position = segments.kept(("positions in chunks", chunk_size, z.device), make)
    return _query_key(z, weight, bias, (table, position), eps)


@plain
def _query_key(
    z: Tensor, weight: Tensor, bias: Tensor, turn: tuple[Tensor, Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """turn: cosines and sines [chunk_size, width / 2, 2], and places among them.

    Those are of each step, [length, batch], or [length, 1] where rows have the same.
    """
    wide = z.to(compute_dtype(z))
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    scale = (weight.to(wide.dtype) + 1) / math.sqrt(z.shape[-1])
    cos, sin = turn[0][turn[1]][:, :, None].unbind(-1)
    results = []
    for gain, shift in zip(scale, bias.to(wide.dtype), strict=True):
        x = normed * gain.view(z.shape[2:]) + shift.view(z.shape[2:])
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = (first * cos - second * sin, first * sin + second * cos)
        results.append(torch.stack(rotated, dim=-1).flatten(-2).to(z.dtype).contiguous())
    return results[0], results[1]
