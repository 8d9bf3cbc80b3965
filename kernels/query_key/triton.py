"""Queries and keys in Triton: one pass forward, one backward, for a head's whole width at once.

A tile is T steps of one head, [T, width] in registers, inside one chunk; pairs are taken apart to
be turned and put together again. A position's turn is that of its tile's start times that of its
place in the tile. The T turns of the places stay in registers while a program walks a stretch of
tiles, so that a tile reads one row of a table, not T. Chunks are cut from their starts on; what
segments hold of them says which tiles there are, and which of a tile's steps. Backward normalizes z
again; its programs add up what weight and bias get in registers, which torch then sums over the
programs, in a fixed order.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import kernel, on_device_of, side_by_side
from ..segments import Segments, numbered
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
    chunk_size: int,
    segments: Segments,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `query_key`; nothing is checked here."""
    return _QueryKey.apply(z, weight, bias, eps, float(base), chunk_size, segments)


class Tiling(NamedTuple):
    """How z [length, batch, heads, width] is cut: tiles of `steps` steps, `stretch` a program."""

    steps: int
    padded: int
    chunk_tiles: int
    """Tiles in a chunk."""
    tiles: Tensor
    """int64 [tiles, fields]: row, step of the chunk's start, positions in the chunk from which and
    to before which there are steps, and the tile's number in the chunk."""
    stretch: int
    programs: int
    """Of a head."""
    warps: int

    @classmethod
    def of(cls, z: Tensor, chunk_size: int, segments: Segments) -> "Tiling":
        """The tiling of what segments hold of every chunk."""
        length, _, heads, width = z.shape
        padded = triton.next_power_of_2(width)
        longest = triton.next_power_of_2(min(length, chunk_size))
        steps = max(1, min(TILE // padded, longest))

        def make() -> Tensor:
            parts = [
                (part.row, part.start - part.before, part.before, part.before + part.length)
                for part in segments.chunk_parts(chunk_size)
            ]
            parts = torch.tensor(parts)
            stop = (parts[:, 3] + steps - 1) // steps
            return numbered(parts, parts[:, 2] // steps, stop).to(z.device)

        tiles = segments.kept(("query and key tiles", chunk_size, steps, z.device), make)
        stretch = triton.cdiv(len(tiles), min(len(tiles), triton.cdiv(PROGRAMS, heads)))
        warps = min(8, max(1, steps * padded // 256))
        programs = triton.cdiv(len(tiles), stretch)
        chunk_tiles = triton.cdiv(chunk_size, steps)
        return cls(steps, padded, chunk_tiles, tiles, stretch, programs, warps)

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
        chunk_size: int,
        segments: Segments,
    ) -> tuple[Tensor, Tensor]:
        z, weight, bias = side_by_side(z), weight.contiguous(), bias.contiguous()
        _, batch, heads, width = z.shape
        tiling = Tiling.of(z, chunk_size, segments)
        tables = tiling.tables(z, base)
        query, key = (torch.empty(z.shape, dtype=z.dtype, device=z.device) for _ in range(2))
        with on_device_of(z):
            forward_kernel[(heads * tiling.programs,)](
                *(z, weight, bias, *tables, tiling.tiles, query, key),
                *(heads, batch, len(tiling.tiles), tiling.stretch, 1.0 / math.sqrt(width), eps),
                *(*z.stride()[:3], width, tiling.padded, tiling.steps, STAGES),
                num_warps=tiling.warps,
            )
        ctx.save_for_backward(z, weight, *tables)
        ctx.eps, ctx.tiling = eps, tiling
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
        heads, width = z.shape[2:]
        tiling = ctx.tiling
        grad_z = torch.empty_like(z)
        partial = torch.empty(
            *(tiling.programs, 4, heads * width), dtype=torch.float32, device=z.device
        )
        with on_device_of(z):
            backward_kernel[(heads * tiling.programs,)](
                *(z, weight, *tables, tiling.tiles, grad_query, grad_key, grad_z, partial),
                *(heads, len(tiling.tiles), tiling.stretch, 1.0 / math.sqrt(width), ctx.eps),
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
def _tile(fields, T: tl.constexpr):
    """A tile's row, its number in its chunk, its steps [T] of z and which of them are there."""
    row, start, low = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    high, number = tl.load(fields + 3), tl.load(fields + 4)
    position = number * T + tl.arange(0, T)
    return row, number, start + position, (position >= low) & (position < high)


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
    table,
    query_ptr,
    key_ptr,
    heads,
    rows,
    tiles,
    stretch,
    root,
    eps,
    z_step,
    z_row,
    z_head,
    W: tl.constexpr,
    WP: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """q and k of a head in a stretch of tiles; root is 1/sqrt(W)."""
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
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

    last = tl.minimum((part + 1) * stretch, tiles)
    for tile in tl.range(part * stretch, last, num_stages=STAGES):
        row, number, t, real = _tile(table + tile * 5, T)
        there = real[:, None] & inside[None]
        wide = t[:, None]
        at = row * z_row + wide * z_step + wide_head * z_head + column[None]
        z = tl.load(z_ptr + at, mask=there, other=0.0).to(tl.float32)
        normed = z * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(z * z, 1) / W + eps))[:, None]
        cos, sin = _turns(coarse, number, column, fine_cos, fine_sin, W)
        to = ((wide * rows + row) * heads + head) * W + column[None]
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
    table,
    grad_query_ptr,
    grad_key_ptr,
    grad_z_ptr,
    partial,
    heads,
    tiles,
    stretch,
    root,
    eps,
    z_step,
    z_row,
    z_head,
    query_step,
    query_row,
    query_head,
    key_step,
    key_row,
    key_head,
    grad_z_step,
    grad_z_row,
    grad_z_head,
    W: tl.constexpr,
    WP: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """The gradient of z, and this program's [weight of q and k, bias of q and k]."""
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
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

    last = tl.minimum((part + 1) * stretch, tiles)
    for tile in tl.range(part * stretch, last, num_stages=STAGES):
        row, number, t, real = _tile(table + tile * 5, T)
        there = real[:, None] & inside[None]
        wide = t[:, None]
        at = row * z_row + wide * z_step + wide_head * z_head + column[None]
        z = tl.load(z_ptr + at, mask=there, other=0.0).to(tl.float32)
        at = row * query_row + wide * query_step + wide_head * query_head + column[None]
        query = tl.load(grad_query_ptr + at, mask=there, other=0.0).to(tl.float32)
        at = row * key_row + wide * key_step + wide_head * key_head + column[None]
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
        at = row * grad_z_row + wide * grad_z_step + wide_head * grad_z_head + column[None]
        tl.store(grad_z_ptr + at, grad.to(grad_z_ptr.dtype.element_ty), mask=there)

    to = partial + part.to(tl.int64) * 4 * heads * W + own
    tl.store(to, tl.sum(weight_query, 0) * root, mask=inside)
    tl.store(to + heads * W, tl.sum(weight_key, 0) * root, mask=inside)
    tl.store(to + 2 * heads * W, tl.sum(bias_query, 0), mask=inside)
    tl.store(to + 3 * heads * W, tl.sum(bias_key, 0), mask=inside)
