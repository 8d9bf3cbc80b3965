"""Chunked causal attention in Triton: weights written once, and plain products with them.

The values are up to 8 times wider than the keys, so an accumulator of whole value rows does not
fit in registers, and slices of them, as a fused kernel takes, would need the scores anew for each.
So a chunk's weights are computed once and written in the inputs' type, backward the scores'
gradients too, and products of matrices do the rest: most of the work, since values are wide. A
WORKSPACE holds as many chunks' as fit at a time.

Scores and sums are float32; the softmax works in powers of 2. Kept for backward: the inputs, the
output and a float32 per query and head. Every sum has a fixed order; there are no atomics. The
mask of dropout is a function of a seed and of the places of query and key, the same in every
kernel.

Programs go by tables.py, with a row for every tile in which there is something to do: a tile of a
part, which is what a segment holds of a chunk. Inside a part a position is local, 0 to
chunk_size - 1, and queries begin at `before`.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import kernel, on_device_of, side_by_side
from ..segments import Segments
from .state import AttentionState
from .tables import Group, Tables, make_tables

LOG2_E = tl.constexpr(1.4426950408889634)


def chunked_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    segments: Segments,
    state: AttentionState | None,
    dropout_p: float,
) -> Tensor:
    """The output of `chunked_attention`, by the same arguments; nothing is checked here."""
    state = state or AttentionState(None, None)
    return _ChunkedAttention.apply(q, k, v, *state, chunk_size, segments, dropout_p)


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
    """The tiles of the three kernels; scores are squares, of which product's rows are a part.

    Of product's rows in turn those of weights are a part, and the keys that these take at a time.
    """

    weights: Tile
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
                weights=tiles.weights._replace(
                    own=min(64, tiles.weights.own), other=min(32, tiles.weights.other)
                ),
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
            weights=Tile(128, 64, WHOLE, WHOLE, 8, 3),
            scores=Tile(128, 128, 64, 64, 8, 4),
            product=Tile(128, 64, 256, WHOLE, 8, 3),
        ),
        163 * 1024: Tiles(
            weights=Tile(64, 64, WHOLE, WHOLE, 8, 2),
            scores=Tile(128, 128, 32, 32, 8, 3),
            product=Tile(128, 32, 256, WHOLE, 8, 3),
        ),
        99 * 1024: Tiles(
            weights=Tile(64, 32, WHOLE, WHOLE, 8, 2),
            scores=Tile(128, 128, 32, 32, 8, 2),
            product=Tile(128, 32, 256, WHOLE, 8, 2),
        ),
    },
    4: {
        99 * 1024: Tiles(
            weights=Tile(32, 32, 128, 32, 4, 2),
            scores=Tile(32, 32, 32, 32, 4, 2),
            product=Tile(32, 32, 128, 32, 4, 2),
        ),
    },
}
# Bytes that weights and scores' gradients are held in.
WORKSPACE = 2**29


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        chunk_size: int,
        segments: Segments,
        dropout_p: float,
    ) -> Tensor:
        q, k, v = (side_by_side(z) for z in (q, k, v))
        out = q.new_empty(v.shape)
        length, batch, heads, _ = q.shape
        lse = torch.empty(heads, batch, length, dtype=torch.float32, device=q.device)
        total, seed = torch.empty_like(lse), lse
        if dropout_p > 0:
            seed = torch.randint(2**62, (1,), dtype=torch.int64, device=q.device)
        call = _Call(q, v, chunk_size, segments, dropout_p)
        with on_device_of(q):
            weights, _ = call.workspace(q)
            for buffer, groups in call.tables:
                keys, values = k, v
                if buffer:
                    keys, values = buffer.put_together(k, key), buffer.put_together(v, value)
                for group in groups:
                    weights_kernel[call.grid(group.weights)](
                        *(q, keys, weights, lse, total, seed, group.weights, group.size),
                        *(*call.sizes(group.weights), *_strides(q, keys)),
                        COVERED=call.tiles.product.own,
                        **call.constants(call.tiles.weights),
                    )
                    call.product(weights, values, out, group, True, total)
        ctx.call = call
        ctx.save_for_backward(q, k, v, key, value, out, lse, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key, value, out, lse, seed = ctx.saved_tensors
        call, grad_out = ctx.call, side_by_side(grad_out)
        grad_q, grad_k, grad_v = (side_by_side(torch.empty_like(z)) for z in (q, k, v))
        grad_key, grad_value = (None if z is None else torch.empty_like(z) for z in (key, value))
        with on_device_of(q):
            delta = _delta(out, grad_out, lse)
            weights, grad_scores = call.workspace(q)
            for buffer, groups in call.tables:
                keys, values, to_keys, to_values = k, v, grad_k, grad_v
                if buffer:
                    keys, values = buffer.put_together(k, key), buffer.put_together(v, value)
                    to_keys, to_values = torch.empty_like(keys), torch.empty_like(values)
                for group in groups:
                    scores_kernel[call.grid(group.pairs)](
                        *(q, keys, values, grad_out, lse, delta, weights, grad_scores, seed),
                        *(group.pairs, group.size, *call.sizes(group.pairs)),
                        *_strides(q, keys, values, grad_out),
                        **call.constants(call.tiles.scores),
                    )
                    for matrix, z, grad in (
                        (grad_scores, keys, grad_q),
                        (grad_scores, q, to_keys),
                        (weights, grad_out, to_values),
                    ):
                        call.product(matrix, z, grad, group, grad is grad_q)
                if buffer:
                    grad_key = buffer.take_apart(to_keys, grad_k)
                    grad_value = buffer.take_apart(to_values, grad_v)
        return grad_q, grad_k, grad_v, grad_key, grad_value, None, None, None


class _Call:
    """What the kernels' launches share."""

    def __init__(
        self, q: Tensor, v: Tensor, chunk_size: int, segments: Segments, dropout_p: float
    ) -> None:
        self.rows, self.heads = q.shape[1:3]
        self.length, self.chunk_size, self.dropout_p = len(q), chunk_size, dropout_p
        self.widths = {"DK": q.shape[-1], "DV": v.shape[-1]}
        self.tiles = Tiles.of(q, chunk_size, v.shape[-1], dropout_p > 0)
        limit = WORKSPACE // (2 * q.element_size() * self.heads)
        sizes = (*(tile.own for tile in self.tiles), limit)
        self.tables: list[Tables] = segments.kept(
            ("attention tables", chunk_size, q.device, sizes),
            lambda: make_tables(segments, chunk_size, q.device, *sizes),
        )

    def grid(self, table: Tensor, slices: int = 1) -> tuple[int]:
        return (self.heads * len(table) * slices,)

    def sizes(self, table: Tensor) -> tuple[int | float, ...]:
        threshold = min(round(self.dropout_p * 2**32), 2**32 - 1)
        return len(table), self.rows, self.length, threshold, 1 / (1 - self.dropout_p)

    def workspace(self, q: Tensor) -> Tensor:
        """Weights and scores' gradients of the largest group.

        Those of a part are a square of whole tiles for each head, queries in rows. What is written
        are the tiles that have a key no later than a query, and product_kernel reads no others.
        """
        sizes = [group.size for tables in self.tables for group in tables.groups]
        return q.new_empty(2, self.heads * max(sizes))

    def constants(self, tile: Tile) -> dict[str, Any]:
        return self.widths | {
            "DROPOUT": self.dropout_p > 0,
            "KEY_WIDTH": max(16, triton.next_power_of_2(self.widths["DK"])),
            "OWN": tile.own,
            "OTHER": tile.other,
            "WIDTH": tile.width,
            "DEPTH": tile.depth,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def product(
        self,
        matrix: Tensor,
        x: Tensor,
        out: Tensor,
        group: Group,
        of_queries: bool,
        total: Tensor | None = None,
    ) -> None:
        """Of a group's parts, rows of `out` from the matrix, or its transpose, times x.

        total: what rows of queries are divided by, [heads, batch, length].
        """
        tile = self.tiles.product.within(self.chunk_size, x.shape[-1], x.shape[-1])
        table = group.queries if of_queries else group.keys
        product_kernel[self.grid(table, triton.cdiv(x.shape[-1], tile.width))](
            *(matrix, x, out, total, table, group.size, len(table)),
            *(self.rows, self.length, *_strides(x, out)),
            COLUMNS=x.shape[-1],
            OF_QUERIES=of_queries,
            OWN=tile.own,
            OTHER=tile.other,
            WIDTH=tile.width,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


DELTA_ROWS = 8
DELTA_WIDTH = 256


def _delta(out: Tensor, grad_out: Tensor, lse: Tensor) -> Tensor:
    """delta_kernel's result, [heads, batch, length] like lse."""
    delta, (length, batch, heads, width) = torch.empty_like(lse), out.shape
    delta_kernel[(heads * batch * triton.cdiv(length, DELTA_ROWS),)](
        *(out, grad_out, delta, batch, length, *_strides(out, grad_out)),
        DV=width,
        ROWS=DELTA_ROWS,
        WIDTH=DELTA_WIDTH,
        num_warps=4,
    )
    return delta


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Those of steps, rows and heads of each."""
    return tuple(stride for z in tensors for stride in z.stride()[:3])


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
def _keep(seed, start, queries, keys, row, threshold):
    """True for weights to keep, by a counter-based generator; queries and keys broadcast.

    start is that of the part in its row, and row counts those of all heads.
    """
    zero = queries * 0 + keys * 0
    c0, c1 = zero + keys, zero + queries
    bits, _, _, _ = tl.philox(seed, c0, c1, zero + start.to(tl.int32), zero + row.to(tl.int32))
    return bits.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32)


@triton.jit
def _program(table, programs, SLICES: tl.constexpr, FIELDS: tl.constexpr):
    """A program's head, its slice of columns and its row of a table of tables.py."""
    place = tl.program_id(0) // SLICES
    head = (place // programs).to(tl.int64)
    return head, tl.program_id(0) % SLICES, table + place % programs * FIELDS


@triton.jit
def _part(fields):
    """Row and step of local position 0 of queries and of keys, `before`, and the keys' number."""
    row, start = tl.load(fields), tl.load(fields + 1)
    key_row, key_start = tl.load(fields + 2), tl.load(fields + 3)
    before, filled = tl.load(fields + 4), tl.load(fields + 5)
    return row, start - before, key_row, key_start, before.to(tl.int32), filled.to(tl.int32)


@triton.jit
def _square(matrix, fields, head, size):
    """Where a part's square is in the workspace, and how long its side."""
    place, side = tl.load(fields + 6), tl.load(fields + 7)
    # Of whole tiles: what Triton cannot see in a table.
    return matrix + head * size + tl.multiple_of(place, 16), tl.multiple_of(side, 16)


@triton.jit
def _softmax_blocks(
    total,
    top,
    q,
    q_base,
    queries,
    before,
    q_step,
    k_base,
    k_step,
    first,
    stop,
    filled,
    DK: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    DEPTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The greatest score over the keys first..stop, and the sum of powers beside it."""
    for place in tl.range(first, stop, OTHER):
        keys = place + tl.arange(0, OTHER)
        scores = _scores(
            *(q, q_base, queries, before, filled, q_step, k_base, keys, 0, filled, k_step),
            *(DK, KEY_WIDTH, DEPTH, OWN, OTHER, MASKED),
        )
        if MASKED:
            scores = tl.where(keys[None] <= queries[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), 1)
        top = new_top
    return total, top


@kernel
def weights_kernel(
    q_ptr,
    k_ptr,
    weights_ptr,
    lse_ptr,
    total_ptr,
    seed_ptr,
    table,
    size,
    programs,
    rows,
    length,
    threshold,
    rescale,
    q_step,
    q_row,
    q_head,
    k_step,
    k_row,
    k_head,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    COVERED: tl.constexpr,
) -> None:
    """The log2-sum-exp2 of OWN queries, the weights of the keys that they see, and these's sum.

    The greatest weight of a query is 1, exact in any type. A first walk over the keys finds the
    sums, a second takes the scores anew. It goes on to the end of the COVERED rows that
    product_kernel has in a tile, which reads a column for all of them.
    """
    tl.static_assert(COVERED % OWN == 0 and COVERED % OTHER == 0)
    head, _part_of_one, fields = _program(table, programs, 1, 9)
    row, start, key_row, key_start, before, filled = _part(fields)
    first = tl.load(fields + 8).to(tl.int32) * OWN
    queries = first + tl.arange(0, OWN)
    q_base = q_ptr + row * q_row + head * q_head + start * q_step
    k_base = k_ptr + key_row * k_row + head * k_head + key_start * k_step
    row_of_all = head * rows + row
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    # A row that is not there is a query of zeros: finite, and never used.
    q = _own(q_base, queries, before, filled, q_step, DK, KEY_WIDTH, DEPTH)
    total = tl.zeros([OWN], tl.float32)
    top = tl.full([OWN], float("-inf"), tl.float32)
    total, top = _softmax_blocks(
        *(total, top, q, q_base, queries, before, q_step, k_base, k_step, 0, first, filled),
        *(DK, KEY_WIDTH, OWN, OTHER, DEPTH, False),
    )
    total, top = _softmax_blocks(
        *(total, top, q, q_base, queries, before, q_step, k_base, k_step),
        *(first, tl.minimum(first + OWN, filled), filled),
        *(DK, KEY_WIDTH, OWN, OTHER, DEPTH, True),
    )
    there = (queries >= before) & (queries < filled)
    at = row_of_all * length + start + queries
    tl.store(lse_ptr + at, top + tl.log2(total), mask=there)
    tl.store(total_ptr + at, total, mask=there)

    to_weights, side = _square(weights_ptr, fields, head, size)
    to_weights += queries.to(tl.int64)[:, None] * side
    for place in tl.range(0, (first // COVERED + 1) * COVERED, OTHER):
        keys = place + tl.arange(0, OTHER)
        scores = _scores(
            *(q, q_base, queries, before, filled, q_step, k_base, keys, 0, filled, k_step),
            *(DK, KEY_WIDTH, DEPTH, OWN, OTHER, True),
        )
        weights = tl.where(keys[None] <= queries[:, None], tl.exp2(scores - top[:, None]), 0.0)
        if DROPOUT:
            keep = _keep(seed, start, queries[:, None], keys[None], row_of_all, threshold)
            weights = tl.where(keep, weights * rescale, 0.0)
        tl.store(to_weights + keys[None], weights.to(weights_ptr.dtype.element_ty))


@kernel
def delta_kernel(
    out_ptr,
    grad_ptr,
    delta_ptr,
    rows,
    length,
    out_step,
    out_row,
    out_head,
    grad_step,
    grad_row,
    grad_head,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """delta_t = out_t . grad_out_t, which is the weighted mean of the weights' gradients."""
    blocks = tl.cdiv(length, ROWS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    h, b = row // rows, row % rows
    t = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    out_base = out_ptr + b * out_row + h * out_head
    grad_base = grad_ptr + b * grad_row + h * grad_head
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
    table,
    size,
    programs,
    rows,
    length,
    threshold,
    rescale,
    q_step,
    q_row,
    q_head,
    k_step,
    k_row,
    k_head,
    v_step,
    v_row,
    v_head,
    grad_out_step,
    grad_out_row,
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
    """Weights w and gradients of scores of OWN queries and OTHER keys of a part.

    With g = grad_out v^T the scores' gradient is w (g - delta), where dropout acts on g and on the
    weights that are written.
    """
    tl.static_assert(OWN == OTHER)
    head, _part_of_one, fields = _program(table, programs, 1, 10)
    row, start, key_row, key_start, before, filled = _part(fields)
    queries = tl.load(fields + 8).to(tl.int32) * OWN + tl.arange(0, OWN)
    keys = tl.load(fields + 9).to(tl.int32) * OTHER + tl.arange(0, OTHER)
    q_base = q_ptr + row * q_row + head * q_head + start * q_step
    k_base = k_ptr + key_row * k_row + head * k_head + key_start * k_step
    v_base = v_ptr + key_row * v_row + head * v_head + key_start * v_step
    grad_out_base = grad_out_ptr + row * grad_out_row + head * grad_out_head + start * grad_out_step
    row_of_all = head * rows + row
    # A query that is not there gives weights of zero.
    there = (queries >= before) & (queries < filled)
    at = row_of_all * length + start + queries
    lse = tl.load(lse_ptr + at, mask=there, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=there, other=0.0)

    grad_weights = tl.zeros([OWN, OTHER], tl.float32)
    for column in tl.range(0, DV, WIDTH):
        e = column + tl.arange(0, WIDTH)
        grad_out = _load(grad_out_base, queries, before, filled, grad_out_step, e, DV, WIDTH, True)
        v = _load(v_base, keys, 0, filled, v_step, e, DV, WIDTH, True)
        grad_weights = tl.dot(grad_out, v.T, grad_weights, input_precision="tf32x3")
    q = _own(q_base, queries, before, filled, q_step, DK, KEY_WIDTH, DEPTH)
    scores = _scores(
        *(q, q_base, queries, before, filled, q_step, k_base, keys, 0, filled, k_step),
        *(DK, KEY_WIDTH, DEPTH, OWN, OTHER, True),
    )
    weights = tl.where(keys[None] <= queries[:, None], tl.exp2(scores - lse[:, None]), 0.0)
    dropped = weights
    if DROPOUT:
        seed = tl.load(seed_ptr)
        keep = _keep(seed, start, queries[:, None], keys[None], row_of_all, threshold)
        dropped = tl.where(keep, weights * rescale, 0.0)
        grad_weights = tl.where(keep, grad_weights * rescale, 0.0)
    grad_scores = weights * (grad_weights - delta[:, None])

    to_weights, side = _square(weights_ptr, fields, head, size)
    to_grad_scores, side = _square(grad_scores_ptr, fields, head, size)
    at = queries.to(tl.int64)[:, None] * side + keys[None]
    tl.store(to_weights + at, dropped.to(weights_ptr.dtype.element_ty))
    tl.store(to_grad_scores + at, grad_scores.to(weights_ptr.dtype.element_ty))


@kernel
def product_kernel(
    matrix_ptr,
    x_ptr,
    out_ptr,
    total_ptr,
    table,
    size,
    programs,
    rows,
    length,
    x_step,
    x_row,
    x_head,
    out_step,
    out_row,
    out_head,
    COLUMNS: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """WIDTH columns of OWN rows of a part's square times x, or of its transpose times x.

    The square is 0 where the key is later than the query. OF_QUERIES: out has a row for each query,
    divided by its total where there is one, and x for each key; else it is transposed, and the
    other way round.
    """
    SLICES: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    head, part, fields = _program(table, programs, SLICES, 9)
    row, start, key_row, key_start, before, filled = _part(fields)
    first = tl.load(fields + 8).to(tl.int32) * OWN
    x_base = x_ptr + head * x_head
    out_base = out_ptr + head * out_head
    if OF_QUERIES:
        begin, stop = 0, tl.minimum(first + OWN, filled)
        own_low, low = before, 0
        x_base += key_row * x_row + key_start * x_step
        out_base += row * out_row + start * out_step
    else:
        begin, stop = tl.maximum(first, before) // OTHER * OTHER, filled
        own_low, low = 0, before
        x_base += row * x_row + start * x_step
        out_base += key_row * out_row + key_start * out_step
    own = first + tl.arange(0, OWN)
    e = part * WIDTH + tl.arange(0, WIDTH)
    matrix, side = _square(matrix_ptr, fields, head, size)
    acc = tl.zeros([OWN, WIDTH], tl.float32)
    for place in tl.range(begin, stop, OTHER):
        other = place + tl.arange(0, OTHER)
        x = _load(x_base, other, low, filled, x_step, e, COLUMNS, WIDTH, True)
        if OF_QUERIES:
            factor = tl.load(matrix + own[:, None] * side + other[None])
        else:
            factor = tl.load(matrix + other[:, None] * side + own[None]).T
        acc = tl.dot(factor, x, acc, input_precision="tf32x3")
    there = (own >= own_low) & (own < filled)
    if total_ptr is not None:
        at = (head * rows + row) * length + start + own
        acc /= tl.load(total_ptr + at, mask=there, other=1.0)[:, None]
    tl.store(
        out_base + own.to(tl.int64)[:, None] * out_step + e[None],
        acc.to(out_ptr.dtype.element_ty),
        mask=there[:, None] & (e < COLUMNS)[None],
    )
