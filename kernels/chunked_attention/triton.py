"""Chunked causal attention in Triton: forward flash-style, backward by weights written once.

The values are up to 8 times wider than the keys, so an accumulator of whole value rows does not
fit in registers. The forward pass cuts the values into slices, one program each, and every slice
takes the scores anew: with slices of S columns that multiplies the tensor cores' work by
(1 + dk/S) / (1 + dk/dv), which at S = 2 dk is cheaper than any traffic of accumulators through
memory.

Backward needs the weights and the scores' gradients, whose product over all dv columns is most of
the work, three times: for q, k and v. A chunk's are computed once and written in the inputs' type,
and plain products of matrices do the rest. A WORKSPACE holds as many chunks' as fit at a time.

Scores and sums are float32; the softmax works in powers of 2. Kept for backward: the inputs, the
output and a float32 per query and head. Every sum has a fixed order; there are no atomics. The
mask of dropout is a function of a seed and of the places of query and key, the same in every
kernel.

Inside a chunk a position is local, 0 to chunk_size - 1. The first chunk may begin with keys that
have no queries (`before` of them, out of a state), the last one may end early.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import kernel, on_device_of, side_by_side
from .state import AttentionState

LOG2_E = tl.constexpr(1.4426950408889634)


def chunked_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    state: AttentionState | None = None,
    dropout_p: float = 0.0,
    return_state: bool = False,
) -> tuple[Tensor, AttentionState | None]:
    """Same arguments and results as `chunked_attention`; nothing is checked here."""
    before = 0 if state is None else state.key.shape[1]
    if before:
        k = torch.cat([state.key, k], dim=1)
        v = torch.cat([state.value, v], dim=1)
    out = _ChunkedAttention.apply(q, k, v, chunk_size, dropout_p)
    if not return_state:
        return out, None
    positions = k.shape[1]
    last = slice(positions - positions % chunk_size, positions)
    # Copies: a slice would keep the whole sequence's memory alive.
    key, value = (z[:, last].clone(memory_format=torch.contiguous_format) for z in (k, v))
    return out, AttentionState(key, value)


class Tile(NamedTuple):
    """Sizes of a program's work: its own rows, and those it takes at a time of the others.

    width counts columns of values, depth columns of keys and queries in a product that gives
    scores. A depth of all columns keeps the own rows at hand; less reads them again and again.
    """

    own: int
    other: int
    width: int
    depth: int
    warps: int
    stages: int

    def within(self, chunk_size: int, dk: int, dv: int) -> "Tile":
        """Cut down to a small problem; a side of a product of tensor cores has 16 at least."""
        chunk = max(16, triton.next_power_of_2(chunk_size))
        return self._replace(
            own=min(self.own, chunk),
            other=min(self.other, chunk),
            width=min(self.width, max(16, triton.next_power_of_2(dv))),
            depth=min(self.depth, max(16, triton.next_power_of_2(dk))),
        )


class Tiles(NamedTuple):
    """The tiles of the three kernels; scores are squares, of which product's rows are a part."""

    forward: Tile
    scores: Tile
    product: Tile

    @classmethod
    def of(cls, q: Tensor, chunk_size: int, dv: int, dropped: bool) -> "Tiles":
        """Large enough for the tensor cores, small enough for 255 registers and shared memory."""
        choices = TILES[q.element_size()]
        least, there = min(choices), shared_memory(q.device)
        tiles = choices[max(size for size in choices if size <= max(there, least))]
        if dropped:
            # The random numbers take registers, too.
            tiles = tiles._replace(
                forward=tiles.forward._replace(other=32),
                scores=tiles.scores._replace(
                    own=min(64, tiles.scores.own), other=min(64, tiles.scores.other)
                ),
                product=tiles.product._replace(own=min(64, tiles.product.own)),
            )
        return cls(*(tile.within(chunk_size, q.shape[-1], dv) for tile in tiles))


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a block may ask for; what is no CUDA device counts as Hopper."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


WHOLE = 2**30
# By bytes of a scalar and by the shared memory that they fit in: that of 9.0 and 10.0, of 8.0, and
# of the rest (8.6, 8.9, 12.0).
TILES = {
    2: {
        227 * 1024: Tiles(
            forward=Tile(128, 64, 256, WHOLE, 8, 2),
            scores=Tile(128, 128, 64, 64, 8, 4),
            product=Tile(128, 64, 256, WHOLE, 8, 3),
        ),
        163 * 1024: Tiles(
            forward=Tile(64, 64, 256, WHOLE, 8, 2),
            scores=Tile(128, 128, 32, 32, 8, 3),
            product=Tile(128, 32, 256, WHOLE, 8, 3),
        ),
        99 * 1024: Tiles(
            forward=Tile(64, 32, 256, WHOLE, 8, 2),
            scores=Tile(128, 128, 32, 32, 8, 2),
            product=Tile(128, 32, 256, WHOLE, 8, 2),
        ),
    },
    4: {
        99 * 1024: Tiles(
            forward=Tile(32, 32, 128, 32, 4, 2),
            scores=Tile(32, 32, 32, 32, 4, 2),
            product=Tile(32, 32, 128, 32, 4, 2),
        ),
    },
}
# Bytes that backward holds weights and scores' gradients in.
WORKSPACE = 2**29


class _ChunkedAttention(torch.autograd.Function):
    """q [batch, length, heads, dk]; k and v hold `before` positions more, where q starts."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chunk_size: int,
        dropout_p: float,
    ) -> Tensor:
        q, k, v = (side_by_side(z) for z in (q, k, v))
        batch, length, heads, _ = q.shape
        out = _empty_in_order_of(q, v.shape[-1])
        lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
        seed = lse
        if dropout_p > 0:
            seed = torch.randint(2**62, (1,), dtype=torch.int64, device=q.device)
        if out.numel():
            call = _Call(q, k, v, chunk_size, dropout_p)
            tile = call.tiles.forward
            slices = triton.cdiv(v.shape[-1], tile.width)
            with on_device_of(q):
                forward_kernel[call.grid(tile, slices)](
                    *(q, k, v, out, lse, seed),
                    *(*call.sizes, *_strides(q), *_strides(k), *_strides(v), *_strides(out)),
                    **call.constants(tile),
                )
        ctx.chunk_size, ctx.dropout_p = chunk_size, dropout_p
        ctx.save_for_backward(q, k, v, out, lse, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, seed = ctx.saved_tensors
        if not out.numel():
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None, None
        grad_out = side_by_side(grad_out)
        grad_q, grad_k, grad_v = (side_by_side(torch.empty_like(z)) for z in (q, k, v))
        delta = torch.empty_like(lse)
        call = _Call(q, k, v, ctx.chunk_size, ctx.dropout_p)
        scores, product = call.tiles.scores, call.tiles.product
        with on_device_of(q):
            delta_kernel[(q.shape[0] * q.shape[2] * triton.cdiv(q.shape[1], DELTA_ROWS),)](
                *(out, grad_out, delta, q.shape[2], q.shape[1]),
                *(*_strides(out), *_strides(grad_out)),
                DV=v.shape[-1],
                ROWS=DELTA_ROWS,
                WIDTH=DELTA_WIDTH,
                num_warps=4,
            )
            weights, grad_scores = call.workspace(q)
            for first in range(0, call.rows * call.chunks, len(weights)):
                chunks = min(len(weights), call.rows * call.chunks - first)
                scores_kernel[(chunks * triton.cdiv(ctx.chunk_size, scores.own) ** 2,)](
                    *(q, k, v, grad_out, lse, delta, weights, grad_scores, seed),
                    *(*call.sizes, first, weights.shape[-1]),
                    *(s for z in (q, k, v, grad_out) for s in _strides(z)),
                    **call.constants(scores),
                )
                for matrix, z, grad, of_queries in (
                    (grad_scores, k, grad_q, True),
                    (grad_scores, q, grad_k, False),
                    (weights, grad_out, grad_v, False),
                ):
                    tile = product.within(ctx.chunk_size, z.shape[-1], z.shape[-1])
                    slices = triton.cdiv(z.shape[-1], tile.width)
                    product_kernel[(chunks * slices * triton.cdiv(ctx.chunk_size, tile.own),)](
                        *(matrix, z, grad, *call.sizes[:-2], first, matrix.shape[-1]),
                        *(*_strides(z), *_strides(grad)),
                        COLUMNS=z.shape[-1],
                        OF_QUERIES=of_queries,
                        OWN=tile.own,
                        OTHER=tile.other,
                        WIDTH=tile.width,
                        num_warps=tile.warps,
                        num_stages=tile.stages,
                    )
        return grad_q, grad_k, grad_v, None, None


class _Call:
    """The arguments that the kernels share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, chunk_size: int, dropout_p: float) -> None:
        self.rows = q.shape[0] * q.shape[2]
        self.chunk_size = chunk_size
        self.chunks = triton.cdiv(k.shape[1], chunk_size)
        self.dropped = dropout_p > 0
        self.widths = {"DK": q.shape[-1], "DV": v.shape[-1]}
        self.tiles = Tiles.of(q, chunk_size, v.shape[-1], self.dropped)
        threshold = min(round(dropout_p * 2**32), 2**32 - 1)
        self.sizes = (q.shape[2], k.shape[1], k.shape[1] - q.shape[1], chunk_size)
        self.sizes += (threshold, 1 / (1 - dropout_p))

    def grid(self, tile: Tile, slices: int = 1) -> tuple[int]:
        return (self.rows * slices * self.chunks * triton.cdiv(self.chunk_size, tile.own),)

    def workspace(self, q: Tensor) -> Tensor:
        """Weights and scores' gradients of as many chunks at a time as fit, all at most.

        [2, chunks, side, side] of whole tiles; scores_kernel writes those that have a key that is
        no later than a query, and product_kernel reads no others.
        """
        side = self.tiles.scores.own * triton.cdiv(self.chunk_size, self.tiles.scores.own)
        whole = self.rows * self.chunks
        at_once = max(1, WORKSPACE // (2 * side * side * q.element_size()))
        # Groups of one size, or nearly.
        at_once = triton.cdiv(whole, triton.cdiv(whole, at_once))
        return q.new_empty(2, at_once, side, side)

    def constants(self, tile: Tile) -> dict[str, Any]:
        return self.widths | {
            "DROPOUT": self.dropped,
            "KEY_WIDTH": max(16, triton.next_power_of_2(self.widths["DK"])),
            "OWN": tile.own,
            "OTHER": tile.other,
            "WIDTH": tile.width,
            "DEPTH": tile.depth,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


DELTA_ROWS = 8
DELTA_WIDTH = 256


def _empty_in_order_of(q: Tensor, width: int) -> Tensor:
    """[batch, length, heads, width], with batch and length in memory as q has them."""
    batch, length, heads, _ = q.shape
    if q.stride(0) < q.stride(1):
        return q.new_empty(length, batch, heads, width).transpose(0, 1)
    return q.new_empty(batch, length, heads, width)


def _strides(z: Tensor) -> tuple[int, int, int]:
    return z.stride()[:3]


@triton.jit
def _load(
    base,
    rows,
    low,
    high,
    stride,
    columns,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows of a matrix by columns; zeros outside [low, high) (if MASKED) and from COLUMNS on."""
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None]
    # BLOCK is how many columns there are; whole blocks need no mask.
    RAGGED: tl.constexpr = COLUMNS % BLOCK != 0
    if MASKED:
        mask = ((rows >= low) & (rows < high))[:, None]
        if RAGGED:
            mask = mask & (columns < COLUMNS)[None]
        return tl.load(pointers, mask=mask, other=0.0)
    elif RAGGED:
        return tl.load(pointers, mask=(columns < COLUMNS)[None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _own(
    base,
    rows,
    low,
    high,
    stride,
    DK: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The own queries or keys, where they are to be kept at hand; else anything."""
    if DEPTH < KEY_WIDTH:
        return 0
    else:
        return _load(base, rows, low, high, stride, tl.arange(0, KEY_WIDTH), DK, KEY_WIDTH, True)


@triton.jit
def _scores(
    mine,
    base,
    own,
    low,
    high,
    stride,
    other_base,
    other,
    other_low,
    other_high,
    other_stride,
    DK: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scores of powers of 2, [OWN, OTHER]; `mine` is what `_own` gave for the first matrix."""
    scores = tl.zeros([OWN, OTHER], tl.float32)
    if DEPTH < KEY_WIDTH:
        for start in tl.range(0, DK, DEPTH):
            d = start + tl.arange(0, DEPTH)
            left = _load(base, own, low, high, stride, d, DK, DEPTH, True)
            right = _load(
                *(other_base, other, other_low, other_high, other_stride, d, DK, DEPTH, MASKED)
            )
            scores = tl.dot(left, right.T, scores, input_precision="tf32x3")
    else:
        d = tl.arange(0, KEY_WIDTH)
        right = _load(
            *(other_base, other, other_low, other_high, other_stride, d, DK, KEY_WIDTH, MASKED)
        )
        scores = tl.dot(mine, right.T, scores, input_precision="tf32x3")
    return scores * LOG2_E


@triton.jit
def _keep(seed, chunk, queries, keys, row, threshold):
    """True for weights to keep, by a counter-based generator; queries and keys broadcast."""
    zero = queries * 0 + keys * 0
    c0, c1 = zero + keys, zero + queries
    bits, _, _, _ = tl.philox(seed, c0, c1, zero + chunk, zero + row.to(tl.int32))
    return bits.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32)


@triton.jit
def _place(positions, before, chunk_size, first, OWN: tl.constexpr, slices):
    """Where a program works: row (of batch and heads), slice, chunk, and tile of so many tiles.

    Then the chunk's first query and its filled length. `first` chunks of all rows are left out.
    """
    tiles = tl.cdiv(chunk_size, OWN)
    chunks = tl.cdiv(positions, chunk_size)
    part = tl.program_id(0) % slices
    program = tl.program_id(0) // slices
    tile = program % tiles
    place = program // tiles + first
    chunk = place % chunks
    row = (place // chunks).to(tl.int64)
    filled = tl.minimum(chunk_size, positions - chunk * chunk_size)
    ahead = tl.maximum(before - chunk * chunk_size, 0)
    return row, part, chunk, tile, tiles, ahead, filled


@triton.jit
def _forward_blocks(
    acc,
    total,
    top,
    q,
    q_base,
    queries,
    ahead,
    q_step,
    k_base,
    v_base,
    k_step,
    v_step,
    first,
    stop,
    filled,
    seed,
    chunk,
    row,
    threshold,
    rescale,
    e,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the keys first..stop of this chunk."""
    for start in tl.range(first, stop, OTHER):
        keys = start + tl.arange(0, OTHER)
        scores = _scores(
            *(q, q_base, queries, ahead, filled, q_step, k_base, keys, 0, filled, k_step),
            *(DK, KEY_WIDTH, DEPTH, OWN, OTHER, MASKED),
        )
        if MASKED:
            scores = tl.where(keys[None] <= queries[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            keep = _keep(seed, chunk, queries[:, None], keys[None], row, threshold)
            weights = tl.where(keep, weights * rescale, 0.0)
        v = _load(v_base, keys, 0, filled, v_step, e, DV, WIDTH, MASKED)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        top = new_top
    return acc, total, top


@kernel
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    seed_ptr,
    heads,
    positions,
    before,
    chunk_size,
    threshold,
    rescale,
    q_batch,
    q_step,
    q_head,
    k_batch,
    k_step,
    k_head,
    v_batch,
    v_step,
    v_head,
    out_batch,
    out_step,
    out_head,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """WIDTH columns of the output of OWN queries; the first slice leaves the log2-sum-exp2."""
    SLICES: tl.constexpr = (DV + WIDTH - 1) // WIDTH
    row, part, chunk, tile, tiles, ahead, filled = _place(
        *(positions, before, chunk_size, 0, OWN, SLICES)
    )
    b, h = row // heads, row % heads
    # The longest rows first.
    first = (tiles - 1 - tile) * OWN
    if (first >= filled) | (first + OWN <= ahead):
        return
    origin = chunk.to(tl.int64) * chunk_size
    queries = first + tl.arange(0, OWN)
    e = part * WIDTH + tl.arange(0, WIDTH)
    q_base = q_ptr + b * q_batch + h * q_head + (origin - before) * q_step
    k_base = k_ptr + b * k_batch + h * k_head + origin * k_step
    v_base = v_ptr + b * v_batch + h * v_head + origin * v_step
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    # A row that is not there is a query of zeros: finite, and never stored.
    q = _own(q_base, queries, ahead, filled, q_step, DK, KEY_WIDTH, DEPTH)
    acc = tl.zeros([OWN, WIDTH], tl.float32)
    total = tl.zeros([OWN], tl.float32)
    top = tl.full([OWN], float("-inf"), tl.float32)
    acc, total, top = _forward_blocks(
        *(acc, total, top, q, q_base, queries, ahead, q_step, k_base, v_base, k_step, v_step),
        *(0, first, filled),
        *(seed, chunk, row, threshold, rescale, e),
        *(DK, DV, DROPOUT, KEY_WIDTH, OWN, OTHER, WIDTH, DEPTH, False),
    )
    acc, total, top = _forward_blocks(
        *(acc, total, top, q, q_base, queries, ahead, q_step, k_base, v_base, k_step, v_step),
        *(first, tl.minimum(first + OWN, filled), filled),
        *(seed, chunk, row, threshold, rescale, e),
        *(DK, DV, DROPOUT, KEY_WIDTH, OWN, OTHER, WIDTH, DEPTH, True),
    )

    there = (queries >= ahead) & (queries < filled)
    out_base = out_ptr + b * out_batch + h * out_head + (origin - before) * out_step
    tl.store(
        out_base + queries.to(tl.int64)[:, None] * out_step + e[None],
        (acc / total[:, None]).to(out_ptr.dtype.element_ty),
        mask=there[:, None] & (e < DV)[None],
    )
    if part == 0:
        lse_base = lse_ptr + row * (positions - before) + origin - before
        tl.store(lse_base + queries, top + tl.log2(total), mask=there)


@kernel
def delta_kernel(
    out_ptr,
    grad_ptr,
    delta_ptr,
    heads,
    length,
    out_batch,
    out_step,
    out_head,
    grad_batch,
    grad_step,
    grad_head,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """delta_t = out_t . grad_out_t, which is the weighted mean of the weights' gradients."""
    blocks = tl.cdiv(length, ROWS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = row // heads, row % heads
    t = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    out_base = out_ptr + b * out_batch + h * out_head
    grad_base = grad_ptr + b * grad_batch + h * grad_head
    delta = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, DV, WIDTH):
        e = start + tl.arange(0, WIDTH)
        out = _load(out_base, t, 0, length, out_step, e, DV, WIDTH, True).to(tl.float32)
        grad = _load(grad_base, t, 0, length, grad_step, e, DV, WIDTH, True).to(tl.float32)
        delta += tl.sum(out * grad, 1)
    tl.store(delta_ptr + row * length + t, delta, mask=t < length)


@kernel
def scores_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    weights_ptr,
    grad_scores_ptr,
    seed_ptr,
    heads,
    positions,
    before,
    chunk_size,
    threshold,
    rescale,
    first,
    side,
    q_batch,
    q_step,
    q_head,
    k_batch,
    k_step,
    k_head,
    v_batch,
    v_step,
    v_head,
    grad_out_batch,
    grad_out_step,
    grad_out_head,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Weights w and gradients of scores of OWN queries and OTHER keys of a chunk from `first` on.

    With g = grad_out v^T the scores' gradient is w (g - delta), where dropout acts on g and on the
    weights that are written. Both are [chunks, side, side], queries in rows.
    """
    row, part, chunk, tile, _tiles, ahead, filled = _place(
        *(positions, before, chunk_size, first, OWN, tl.cdiv(chunk_size, OTHER))
    )
    if (part > tile) | (tile * OWN >= filled) | (tile * OWN + OWN <= ahead):
        return
    b, h = row // heads, row % heads
    origin = chunk.to(tl.int64) * chunk_size
    queries = tile * OWN + tl.arange(0, OWN)
    keys = part * OTHER + tl.arange(0, OTHER)
    q_base = q_ptr + b * q_batch + h * q_head + (origin - before) * q_step
    k_base = k_ptr + b * k_batch + h * k_head + origin * k_step
    v_base = v_ptr + b * v_batch + h * v_head + origin * v_step
    grad_out_base = (
        grad_out_ptr + b * grad_out_batch + h * grad_out_head + (origin - before) * grad_out_step
    )
    rows = row * (positions - before) + origin - before
    # A query that is not there gives weights of zero.
    there = (queries >= ahead) & (queries < filled)
    lse = tl.load(lse_ptr + rows + queries, mask=there, other=float("inf"))
    delta = tl.load(delta_ptr + rows + queries, mask=there, other=0.0)

    grad_weights = tl.zeros([OWN, OTHER], tl.float32)
    for column in tl.range(0, DV, WIDTH):
        e = column + tl.arange(0, WIDTH)
        grad_out = _load(grad_out_base, queries, ahead, filled, grad_out_step, e, DV, WIDTH, True)
        v = _load(v_base, keys, 0, filled, v_step, e, DV, WIDTH, True)
        grad_weights = tl.dot(grad_out, v.T, grad_weights, input_precision="tf32x3")
    q = _own(q_base, queries, ahead, filled, q_step, DK, KEY_WIDTH, DEPTH)
    scores = _scores(
        *(q, q_base, queries, ahead, filled, q_step, k_base, keys, 0, filled, k_step),
        *(DK, KEY_WIDTH, DEPTH, OWN, OTHER, True),
    )
    weights = tl.where(keys[None] <= queries[:, None], tl.exp2(scores - lse[:, None]), 0.0)
    dropped = weights
    if DROPOUT:
        seed = tl.load(seed_ptr)
        keep = _keep(seed, chunk, queries[:, None], keys[None], row, threshold)
        dropped = tl.where(keep, weights * rescale, 0.0)
        grad_weights = tl.where(keep, grad_weights * rescale, 0.0)
    grad_scores = weights * (grad_weights - delta[:, None])

    place = row * tl.cdiv(positions, chunk_size) + chunk - first
    at = (place * side + queries)[:, None] * side + keys[None]
    tl.store(weights_ptr + at, dropped.to(weights_ptr.dtype.element_ty))
    tl.store(grad_scores_ptr + at, grad_scores.to(weights_ptr.dtype.element_ty))


@kernel
def product_kernel(
    matrix_ptr,
    x_ptr,
    out_ptr,
    heads,
    positions,
    before,
    chunk_size,
    first,
    side,
    x_batch,
    x_step,
    x_head,
    out_batch,
    out_step,
    out_head,
    COLUMNS: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """WIDTH columns of OWN rows of a chunk's matrix times x, or of its transpose times x.

    The matrix is [chunks, side, side] and 0 where the key is later than the query. OF_QUERIES: out
    has a row for each query and x for each key; else it is transposed, and the other way round.
    """
    SLICES: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    row, part, chunk, tile, tiles, ahead, filled = _place(
        *(positions, before, chunk_size, first, OWN, SLICES)
    )
    b, h = row // heads, row % heads
    origin = chunk.to(tl.int64) * chunk_size
    # What has the most to sum goes first.
    if OF_QUERIES:
        start = (tiles - 1 - tile) * OWN
        begin, stop = 0, tl.minimum(start + OWN, filled)
        own_low, low = ahead, 0
        out_origin, x_origin = origin - before, origin
    else:
        start = tile * OWN
        begin, stop = tl.maximum(start, ahead) // OTHER * OTHER, filled
        own_low, low = 0, ahead
        out_origin, x_origin = origin, origin - before
    if (start >= filled) | (start + OWN <= own_low):
        return
    own = start + tl.arange(0, OWN)
    e = part * WIDTH + tl.arange(0, WIDTH)
    x_base = x_ptr + b * x_batch + h * x_head + x_origin * x_step
    matrix = matrix_ptr + (row * tl.cdiv(positions, chunk_size) + chunk - first) * side * side
    acc = tl.zeros([OWN, WIDTH], tl.float32)
    for place in tl.range(begin, stop, OTHER):
        other = place + tl.arange(0, OTHER)
        x = _load(x_base, other, low, filled, x_step, e, COLUMNS, WIDTH, True)
        if OF_QUERIES:
            factor = tl.load(matrix + own[:, None] * side + other[None])
        else:
            factor = tl.load(matrix + other[:, None] * side + own[None]).T
        acc = tl.dot(factor, x, acc, input_precision="tf32x3")
    out_base = out_ptr + b * out_batch + h * out_head + out_origin * out_step
    tl.store(
        out_base + own.to(tl.int64)[:, None] * out_step + e[None],
        acc.to(out_ptr.dtype.element_ty),
        mask=((own >= own_low) & (own < filled))[:, None] & (e < COLUMNS)[None],
    )
