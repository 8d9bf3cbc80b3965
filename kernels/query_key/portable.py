"""Queries and keys with plain torch operations, for any device, in cache-sized blocks of steps."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import row_blocks
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
    dtype = torch.complex128 if z.dtype == torch.float64 else torch.complex64
    table = turns(chunk_size, z.shape[-1], float(base), z.device, dtype)
    return _QueryKey.apply(z, weight, bias, table, offset % chunk_size, eps)


class _QueryKey(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        bias: Tensor,
        table: Tensor,
        first: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        dtype = table.dtype.to_real()
        scale, shift = _affine(weight, bias, z, dtype)
        results = [torch.empty(z.shape, dtype=z.dtype, device=z.device) for _ in range(2)]
        for steps, turn in _blocks(z, table, first):
            normed, _ = _normalize(z[:, steps], dtype, eps)
            for result, gain, bias_ in zip(results, scale, shift, strict=True):
                block = torch.addcmul(bias_, normed, gain)
                _pairs(block).mul_(turn)
                result[:, steps] = block
        ctx.save_for_backward(z, weight, bias, table)
        ctx.first, ctx.eps = first, eps
        return results[0], results[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, bias, table = ctx.saved_tensors
        dtype = table.dtype.to_real()
        scale, _ = _affine(weight, bias, z, dtype)
        grad_z = torch.empty_like(z)
        to_gain, to_bias = torch.zeros(2, *scale.shape, dtype=torch.float64, device=z.device)
        back = table.conj().resolve_conj()
        for steps, turn in _blocks(z, back, ctx.first):
            normed, rstd = _normalize(z[:, steps], dtype, ctx.eps)
            to_normed = torch.zeros_like(normed)
            for row, grad in enumerate(grads):
                # A copy, whose strides view_as_complex takes.
                block = torch.empty(normed.shape, dtype=dtype, device=z.device)
                block.copy_(grad[:, steps])
                _pairs(block).mul_(turn)
                to_normed.addcmul_(block, scale[row])
                to_bias[row] += block.sum((0, 1))
                to_gain[row] += block.mul_(normed).sum((0, 1))
            along = (to_normed * normed).mean(-1, keepdim=True)
            grad_z[:, steps] = to_normed.addcmul_(normed, along, value=-1).mul_(rstd)
        grad_weight = to_gain.div_(math.sqrt(z.shape[-1])).view(weight.shape).to(weight.dtype)
        return grad_z, grad_weight, to_bias.view(bias.shape).to(bias.dtype), None, None, None


def _affine(weight: Tensor, bias: Tensor, z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factor and summand, [2, heads, width]."""
    scale = (weight.to(dtype) + 1) / math.sqrt(z.shape[-1])
    return scale.view(2, *z.shape[2:]), bias.to(dtype).view(2, *z.shape[2:])


def _normalize(z: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    z = z.to(dtype)
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    rstd = norm.square_().div_(z.shape[-1]).add_(eps).rsqrt_()
    # Contiguous, whatever z's strides are.
    return torch.mul(z, rstd, out=torch.empty(z.shape, dtype=dtype, device=z.device)), rstd


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _blocks(z: Tensor, table: Tensor, first: int) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of steps, with the turns [steps, 1, width / 2] of their positions."""
    batch, length, heads, width = z.shape
    for steps in row_blocks(length, z):
        start, stop = (first + steps.start) % len(table), steps.stop - steps.start
        stop += start
        if stop <= len(table):
            turn = table[start:stop]
        else:
            turn = table[torch.arange(start, stop, device=z.device) % len(table)]
        yield steps, turn[:, None]
