"""Queries and keys in Triton: one pass forward, one backward, for a head's whole width at once.

A tile is T steps of one head, [T, width] in registers; pairs are taken apart to be turned and put
together again. Cosines and sines come from a table [chunk size, width / 2], which all sequences,
heads and chunks share and a card's cache holds. Backward normalizes z again; its programs walk
a stretch of time each and add up what weight and bias get in registers, which torch then sums over
the programs, in a fixed order.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import on_device_of
from .turns import turns

# Numbers in a tile: enough bytes in flight, few enough to stay in registers.
TILE = 2048
# Tiles on their way from memory while one is worked on.
STAGES = 2
# Programs of the backward pass: they fill a card, and what they leave to be summed is little.
PROGRAMS = 256


def query_key_triton(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    base: float,
    offset: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `query_key`; nothing is checked here."""
    table = turns(chunk_size, z.shape[-1], float(base), z.device, torch.complex64)
    return _QueryKey.apply(z, weight, bias, torch.view_as_real(table), offset % chunk_size, eps)


class Tiling(NamedTuple):
    """How [batch, length, heads, width] is cut: tiles of `steps` steps, `segment` a program."""

    steps: int
    padded: int
    tiles: int
    segment: int
    segments: int
    warps: int

    @classmethod
    def of(cls, z: Tensor) -> "Tiling":
        """Cut for z."""
        batch, length, heads, width = z.shape
        padded = triton.next_power_of_2(width)
        steps = max(1, min(TILE // padded, triton.next_power_of_2(length)))
        tiles = triton.cdiv(length, steps)
        segment = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, batch * heads)))
        warps = min(8, max(1, steps * padded // 512))
        return cls(steps, padded, tiles, segment, triton.cdiv(tiles, segment), warps)


class _QueryKey(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        z: Tensor,
        weight: Tensor,
        bias: Tensor,
        table: Tensor,
        first: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        z, weight, bias = _side_by_side(z), weight.contiguous(), bias.contiguous()
        batch, length, heads, width = z.shape
        tiling = Tiling.of(z)
        query, key = (torch.empty(z.shape, dtype=z.dtype, device=z.device) for _ in range(2))
        with on_device_of(z):
            # Tiles and heads together, since only a grid's first side can be long.
            forward_kernel[(tiling.tiles * heads, batch)](
                *(z, weight, bias, table, query, key, length, first, len(table)),
                *(1.0 / math.sqrt(width), eps, *z.stride()[:3]),
                *(heads, width, tiling.padded, tiling.steps),
                num_warps=tiling.warps,
            )
        ctx.save_for_backward(z, weight, table)
        ctx.first, ctx.eps = first, eps
        return query, key

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401
        grad_query: Tensor,
        grad_key: Tensor,
    ) -> tuple[Tensor | None, ...]:
        z, weight, table = ctx.saved_tensors
        grad_query, grad_key = _side_by_side(grad_query), _side_by_side(grad_key)
        batch, length, heads, width = z.shape
        tiling = Tiling.of(z)
        grad_z = torch.empty_like(z)
        partial = torch.empty(
            *(batch * tiling.segments, 4, heads * width), dtype=torch.float32, device=z.device
        )
        with on_device_of(z):
            backward_kernel[(heads, tiling.segments, batch)](
                *(z, weight, table, grad_query, grad_key, grad_z, partial),
                *(length, ctx.first, len(table), tiling.segment),
                *(1.0 / math.sqrt(width), ctx.eps),
                *(*z.stride()[:3], *grad_query.stride()[:3], *grad_key.stride()[:3]),
                *(*grad_z.stride()[:3], width, tiling.padded, tiling.steps, STAGES),
                num_warps=tiling.warps,
            )
            grad_weight, grad_bias = partial.sum(0).to(weight.dtype).split(2)
        return grad_z, grad_weight, grad_bias, None, None, None


def _side_by_side(x: Tensor) -> Tensor:
    """With the numbers of a head side by side, and no memory shared by heads or steps."""
    return x if x.stride(3) == 1 and min(x.stride()) > 0 else x.contiguous()


@triton.jit
def _turns(table, t, first, chunk, column, there, W: tl.constexpr):  # noqa: ANN001, ANN202
    """Cosines and sines [T, WP / 2] of steps t, and first + t their positions."""
    T: tl.constexpr = t.shape[0]
    HALF: tl.constexpr = column.shape[0] // 2
    at = ((first + t) % chunk)[:, None] * W + column[None]
    pairs = tl.load(table + at, mask=there, other=0.0)
    return tl.split(tl.reshape(pairs, [T, HALF, 2]))


@triton.jit
def _turn(x, cos, sin):  # noqa: ANN001, ANN202
    """Pairs of x [T, WP] turned."""
    T: tl.constexpr = x.shape[0]
    WP: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.reshape(x, [T, WP // 2, 2]))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, [T, WP])


@triton.jit
def forward_kernel(
    z_ptr,  # noqa: ANN001
    weight_ptr,  # noqa: ANN001
    bias_ptr,  # noqa: ANN001
    table,  # noqa: ANN001
    query_ptr,  # noqa: ANN001
    key_ptr,  # noqa: ANN001
    length,  # noqa: ANN001
    first,  # noqa: ANN001
    chunk,  # noqa: ANN001
    root,  # noqa: ANN001
    eps,  # noqa: ANN001
    z_batch,  # noqa: ANN001
    z_step,  # noqa: ANN001
    z_head,  # noqa: ANN001
    H: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """q and k of T steps of a head; root is 1/sqrt(W)."""
    head = tl.program_id(0) % H
    row = tl.program_id(1).to(tl.int64)
    t = (tl.program_id(0) // H) * T + tl.arange(0, T)
    column = tl.arange(0, WP)
    there = (t < length)[:, None] & (column < W)[None]
    wide = t.to(tl.int64)[:, None]
    z_at = row * z_batch + wide * z_step + head.to(tl.int64) * z_head + column[None]
    z = tl.load(z_ptr + z_at, mask=there, other=0.0).to(tl.float32)
    normed = z * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(z * z, 1) / W + eps))[:, None]
    cos, sin = _turns(table, t, first, chunk, column, there, W)
    to = ((row * length + wide) * H + head) * W + column[None]

    own = head * W + column
    gain = (tl.load(weight_ptr + own, mask=column < W, other=0.0).to(tl.float32) + 1.0) * root
    bias = tl.load(bias_ptr + own, mask=column < W, other=0.0).to(tl.float32)
    query = _turn(normed * gain[None] + bias[None], cos, sin)
    tl.store(query_ptr + to, query.to(query_ptr.dtype.element_ty), mask=there)

    own += H * W
    gain = (tl.load(weight_ptr + own, mask=column < W, other=0.0).to(tl.float32) + 1.0) * root
    bias = tl.load(bias_ptr + own, mask=column < W, other=0.0).to(tl.float32)
    key = _turn(normed * gain[None] + bias[None], cos, sin)
    tl.store(key_ptr + to, key.to(key_ptr.dtype.element_ty), mask=there)


@triton.jit
def backward_kernel(
    z_ptr,  # noqa: ANN001
    weight_ptr,  # noqa: ANN001
    table,  # noqa: ANN001
    grad_query_ptr,  # noqa: ANN001
    grad_key_ptr,  # noqa: ANN001
    grad_z_ptr,  # noqa: ANN001
    partial,  # noqa: ANN001
    length,  # noqa: ANN001
    first,  # noqa: ANN001
    chunk,  # noqa: ANN001
    segment,  # noqa: ANN001
    root,  # noqa: ANN001
    eps,  # noqa: ANN001
    z_batch,  # noqa: ANN001
    z_step,  # noqa: ANN001
    z_head,  # noqa: ANN001
    query_batch,  # noqa: ANN001
    query_step,  # noqa: ANN001
    query_head,  # noqa: ANN001
    key_batch,  # noqa: ANN001
    key_step,  # noqa: ANN001
    key_head,  # noqa: ANN001
    grad_z_batch,  # noqa: ANN001
    grad_z_step,  # noqa: ANN001
    grad_z_head,  # noqa: ANN001
    W: tl.constexpr,
    WP: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """The gradient of z, and this program's [weight of q and k, bias of q and k]."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    part = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    wide_head = head.to(tl.int64)
    column = tl.arange(0, WP)
    own = head * W + column
    inside = column < W
    gain_query = (tl.load(weight_ptr + own, mask=inside, other=0.0).to(tl.float32) + 1.0) * root
    gain_key = tl.load(weight_ptr + heads * W + own, mask=inside, other=0.0).to(tl.float32)
    gain_key = (gain_key + 1.0) * root
    weight_query = tl.zeros([WP], tl.float32)
    weight_key = tl.zeros([WP], tl.float32)
    bias_query = tl.zeros([WP], tl.float32)
    bias_key = tl.zeros([WP], tl.float32)

    last = tl.minimum((part + 1) * segment, tl.cdiv(length, T))
    for tile in tl.range(part * segment, last, num_stages=STAGES):
        t = tile * T + tl.arange(0, T)
        there = (t < length)[:, None] & inside[None]
        wide = t.to(tl.int64)[:, None]
        at = row * z_batch + wide * z_step + wide_head * z_head + column[None]
        z = tl.load(z_ptr + at, mask=there, other=0.0).to(tl.float32)
        at = row * query_batch + wide * query_step + wide_head * query_head + column[None]
        query = tl.load(grad_query_ptr + at, mask=there, other=0.0).to(tl.float32)
        at = row * key_batch + wide * key_step + wide_head * key_head + column[None]
        key = tl.load(grad_key_ptr + at, mask=there, other=0.0).to(tl.float32)

        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(z * z, 1) / W + eps))[:, None]
        normed = z * rstd
        cos, sin = _turns(table, t, first, chunk, column, there, W)
        query = _turn(query, cos, -sin)
        key = _turn(key, cos, -sin)
        bias_query += tl.sum(query, 0)
        bias_key += tl.sum(key, 0)
        weight_query += tl.sum(query * normed, 0)
        weight_key += tl.sum(key * normed, 0)
        grad = query * gain_query[None] + key * gain_key[None]
        grad = (grad - normed * (tl.sum(grad * normed, 1) / W)[:, None]) * rstd
        at = row * grad_z_batch + wide * grad_z_step + wide_head * grad_z_head + column[None]
        tl.store(grad_z_ptr + at, grad.to(grad_z_ptr.dtype.element_ty), mask=there)

    to = partial + (row * tl.num_programs(1) + part) * 4 * heads * W + own
    tl.store(to, weight_query * root, mask=inside)
    tl.store(to + heads * W, weight_key * root, mask=inside)
    tl.store(to + 2 * heads * W, bias_query, mask=inside)
    tl.store(to + 3 * heads * W, bias_key, mask=inside)
