"""Queries and keys in Triton: one pass forward, one backward, for a head's whole width at once.

A tile is T steps of one head, [T, width] in registers, inside one chunk; pairs are taken apart to
be turned and put together again. A position's turn is that of its tile's start times that of its
place in the tile. The T turns of the places stay in registers while a program walks a stretch of
time, so that a tile reads one row of a table, not T. Backward normalizes z again; its programs add
up what weight and bias get in registers, which torch then sums over the programs, in a fixed order.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import kernel, on_device_of, side_by_side
from .turns import turns

# Numbers in a tile: enough bytes in flight, few enough to stay in registers.
TILE = 2048
# Tiles on their way from memory, with the one that is worked on.
STAGES = 3
# Programs: they fill a card, and what each of them reads and leaves to be summed is little.
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
    return _QueryKey.apply(z, weight, bias, eps, float(base), offset % chunk_size, chunk_size)


class Tiling(NamedTuple):
    """How z [batch, length, heads, width] is cut: tiles of `steps` steps, `segment` a program.

    Every chunk is cut from its start on; counting begins with the tile that holds z's first step.
    """

    steps: int
    padded: int
    chunk_tiles: int
    tiles: int
    segment: int
    segments: int
    warps: int

    @classmethod
    def of(cls, z: Tensor, first: int, chunk: int) -> "Tiling":
        """Cut for z that starts at position `first` of a chunk."""
        batch, length, heads, width = z.shape
        padded = triton.next_power_of_2(width)
        steps = max(1, min(TILE // padded, triton.next_power_of_2(min(length, chunk))))
        chunk_tiles = triton.cdiv(chunk, steps)
        chunks, position = divmod(first + length - 1, chunk)
        tiles = chunks * chunk_tiles + position // steps - first // steps + 1
        segment = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, batch * heads)))
        warps = min(8, max(1, steps * padded // 256))
        return cls(
            *(steps, padded, chunk_tiles, tiles, segment, triton.cdiv(tiles, segment), warps)
        )

    def tables(self, z: Tensor, base: float) -> tuple[Tensor, Tensor]:
        """Turns of the places in a tile and of the tiles' starts, [..., width / 2, (cos, sin)]."""
        sizes = ((self.steps, 1), (self.chunk_tiles, self.steps))
        fine, coarse = (
            turns(count, z.shape[-1], base, z.device, torch.complex64, stride)
            for count, stride in sizes
        )
        return torch.view_as_real(fine), torch.view_as_real(coarse)


class _QueryKey(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        base: float,
        first: int,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        z, weight, bias = side_by_side(z), weight.contiguous(), bias.contiguous()
        batch, length, heads, width = z.shape
        tiling = Tiling.of(z, first, chunk)
        tables = tiling.tables(z, base)
        query, key = (torch.empty(z.shape, dtype=z.dtype, device=z.device) for _ in range(2))
        with on_device_of(z):
            forward_kernel[(batch * heads, tiling.segments)](
                *(z, weight, bias, *tables, query, key),
                *(heads, length, first, chunk, tiling.chunk_tiles, tiling.tiles, tiling.segment),
                *(1.0 / math.sqrt(width), eps, *z.stride()[:3]),
                *(width, tiling.padded, tiling.steps, STAGES),
                num_warps=tiling.warps,
            )
        ctx.save_for_backward(z, weight, *tables)
        ctx.first, ctx.chunk, ctx.eps, ctx.tiling = first, chunk, eps, tiling
        return query, key

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_query: Tensor,
        grad_key: Tensor,
    ) -> tuple[Tensor | None, ...]:
        z, weight, *tables = ctx.saved_tensors
        grad_query, grad_key = side_by_side(grad_query), side_by_side(grad_key)
        batch, length, heads, width = z.shape
        tiling = ctx.tiling
        grad_z = torch.empty_like(z)
        partial = torch.empty(
            *(batch * tiling.segments, 4, heads * width), dtype=torch.float32, device=z.device
        )
        with on_device_of(z):
            backward_kernel[(batch * heads, tiling.segments)](
                *(z, weight, *tables, grad_query, grad_key, grad_z, partial),
                *(heads, length, ctx.first, ctx.chunk, tiling.chunk_tiles),
                *(tiling.tiles, tiling.segment),
                *(1.0 / math.sqrt(width), ctx.eps),
                *(*z.stride()[:3], *grad_query.stride()[:3], *grad_key.stride()[:3]),
                *(*grad_z.stride()[:3], width, tiling.padded, tiling.steps, STAGES),
                num_warps=tiling.warps,
            )
            grad_weight, grad_bias = partial.sum(0).to(weight.dtype).split(2)
        return grad_z, grad_weight, grad_bias, None, None, None, None


@triton.jit
def _fine(table, column, W: tl.constexpr, T: tl.constexpr):
    """Cosines and sines [T, WP / 2] of the places in a tile."""
    at = tl.arange(0, T)[:, None] * W + column[None]
    pairs = tl.load(table + at, mask=(column < W)[None], other=0.0)
    return tl.split(tl.reshape(pairs, [T, column.shape[0] // 2, 2]))


@triton.jit
def _turns(coarse, number, column, fine_cos, fine_sin, W: tl.constexpr):
    """Cosines and sines [T, WP / 2] of the positions in a chunk's tile of that number."""
    pairs = tl.load(coarse + number * W + column, mask=column < W, other=0.0)
    cos, sin = tl.split(tl.reshape(pairs, [column.shape[0] // 2, 2]))
    cos, sin = cos[None], sin[None]
    return fine_cos * cos - fine_sin * sin, fine_sin * cos + fine_cos * sin


@triton.jit
def _steps(tile, length, first, chunk, chunk_tiles, T: tl.constexpr):
    """A tile's number in its chunk, its steps [T] of z and which of them are there."""
    tile += first // T
    number = tile % chunk_tiles
    position = number * T + tl.arange(0, T)
    t = (tile // chunk_tiles) * chunk + position - first
    return number, t, (position < chunk) & (t >= 0) & (t < length)


@triton.jit
def _turn(x, cos, sin):
    """Pairs of x [T, WP] turned."""
    T: tl.constexpr = x.shape[0]
    WP: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.reshape(x, [T, WP // 2, 2]))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, [T, WP])


@kernel
def forward_kernel(
    z_ptr,
    weight_ptr,
    bias_ptr,
    fine,
    coarse,
    query_ptr,
    key_ptr,
    heads,
    length,
    first,
    chunk,
    chunk_tiles,
    tiles,
    segment,
    root,
    eps,
    z_batch,
    z_step,
    z_head,
    W: tl.constexpr,
    WP: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """q and k of a head in one segment; root is 1/sqrt(W)."""
    head = tl.program_id(0) % heads
    part = tl.program_id(1)
    row = (tl.program_id(0) // heads).to(tl.int64)
    wide_head = head.to(tl.int64)
    column = tl.arange(0, WP)
    inside = column < W
    own = head * W + column
    other = own + heads * W
    gain_query = (tl.load(weight_ptr + own, mask=inside, other=0.0).to(tl.float32) + 1.0) * root
    gain_key = (tl.load(weight_ptr + other, mask=inside, other=0.0).to(tl.float32) + 1.0) * root
    bias_query = tl.load(bias_ptr + own, mask=inside, other=0.0).to(tl.float32)
    bias_key = tl.load(bias_ptr + other, mask=inside, other=0.0).to(tl.float32)
    fine_cos, fine_sin = _fine(fine, column, W, T)

    last = tl.minimum((part + 1) * segment, tiles)
    for tile in tl.range(part * segment, last, num_stages=STAGES):
        number, t, real = _steps(tile, length, first, chunk, chunk_tiles, T)
        there = real[:, None] & inside[None]
        wide = t.to(tl.int64)[:, None]
        at = row * z_batch + wide * z_step + wide_head * z_head + column[None]
        z = tl.load(z_ptr + at, mask=there, other=0.0).to(tl.float32)
        normed = z * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(z * z, 1) / W + eps))[:, None]
        cos, sin = _turns(coarse, number, column, fine_cos, fine_sin, W)
        to = ((row * length + wide) * heads + head) * W + column[None]
        query = _turn(normed * gain_query[None] + bias_query[None], cos, sin)
        tl.store(query_ptr + to, query.to(query_ptr.dtype.element_ty), mask=there)
        key = _turn(normed * gain_key[None] + bias_key[None], cos, sin)
        tl.store(key_ptr + to, key.to(key_ptr.dtype.element_ty), mask=there)


@kernel
def backward_kernel(
    z_ptr,
    weight_ptr,
    fine,
    coarse,
    grad_query_ptr,
    grad_key_ptr,
    grad_z_ptr,
    partial,
    heads,
    length,
    first,
    chunk,
    chunk_tiles,
    tiles,
    segment,
    root,
    eps,
    z_batch,
    z_step,
    z_head,
    query_batch,
    query_step,
    query_head,
    key_batch,
    key_step,
    key_head,
    grad_z_batch,
    grad_z_step,
    grad_z_head,
    W: tl.constexpr,
    WP: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """The gradient of z, and this program's [weight of q and k, bias of q and k]."""
    head = tl.program_id(0) % heads
    part = tl.program_id(1)
    row = (tl.program_id(0) // heads).to(tl.int64)
    wide_head = head.to(tl.int64)
    column = tl.arange(0, WP)
    own = head * W + column
    inside = column < W
    gain_query = (tl.load(weight_ptr + own, mask=inside, other=0.0).to(tl.float32) + 1.0) * root
    gain_key = tl.load(weight_ptr + heads * W + own, mask=inside, other=0.0).to(tl.float32)
    gain_key = (gain_key + 1.0) * root
    weight_query = tl.zeros([T, WP], tl.float32)
    weight_key = tl.zeros([T, WP], tl.float32)
    bias_query = tl.zeros([T, WP], tl.float32)
    bias_key = tl.zeros([T, WP], tl.float32)
    fine_cos, fine_sin = _fine(fine, column, W, T)

    last = tl.minimum((part + 1) * segment, tiles)
    for tile in tl.range(part * segment, last, num_stages=STAGES):
        number, t, real = _steps(tile, length, first, chunk, chunk_tiles, T)
        there = real[:, None] & inside[None]
        wide = t.to(tl.int64)[:, None]
        at = row * z_batch + wide * z_step + wide_head * z_head + column[None]
        z = tl.load(z_ptr + at, mask=there, other=0.0).to(tl.float32)
        at = row * query_batch + wide * query_step + wide_head * query_head + column[None]
        query = tl.load(grad_query_ptr + at, mask=there, other=0.0).to(tl.float32)
        at = row * key_batch + wide * key_step + wide_head * key_head + column[None]
        key = tl.load(grad_key_ptr + at, mask=there, other=0.0).to(tl.float32)

        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(z * z, 1) / W + eps))[:, None]
        normed = z * rstd
        cos, sin = _turns(coarse, number, column, fine_cos, fine_sin, W)
        query = _turn(query, cos, -sin)
        key = _turn(key, cos, -sin)
        bias_query += query
        bias_key += key
        weight_query += query * normed
        weight_key += key * normed
        grad = query * gain_query[None] + key * gain_key[None]
        grad = (grad - normed * (tl.sum(grad * normed, 1) / W)[:, None]) * rstd
        at = row * grad_z_batch + wide * grad_z_step + wide_head * grad_z_head + column[None]
        tl.store(grad_z_ptr + at, grad.to(grad_z_ptr.dtype.element_ty), mask=there)

    to = partial + (row * tl.num_programs(1) + part) * 4 * heads * W + own
    tl.store(to, tl.sum(weight_query, 0) * root, mask=inside)
    tl.store(to + heads * W, tl.sum(weight_key, 0) * root, mask=inside)
    tl.store(to + 2 * heads * W, tl.sum(bias_query, 0), mask=inside)
    tl.store(to + 3 * heads * W, tl.sum(bias_key, 0), mask=inside)
