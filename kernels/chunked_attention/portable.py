"""Chunked causal attention with plain torch operations, for any device.

The values are up to 8 times wider than the keys, so nearly all the work is in the products with
the values. Taking a block of queries at a time against only the keys it can see saves almost
half of it, and makes an online softmax needless: a block holds its whole rows.

Chunks of one length that follow one another are a piece, a view of the whole tensors that products
read and write in place; nothing is put together from pieces.
"""

import math
from collections.abc import Iterator
from itertools import groupby, islice, product, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..segments import Segments
from ..types import compute_dtype
from .state import AttentionState

# Rows of queries; of bfloat16 ones twice as many, whose products take less of the time.
QUERY_BLOCK = 128


def chunked_attention_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    segments: Segments,
    state: AttentionState | None,
    dropout_p: float,
) -> Tensor:
    """The output of `chunked_attention`, by the same arguments; nothing is checked here."""
    pieces = segments.kept(
        ("attention pieces", chunk_size), lambda: list(_pieces(segments, chunk_size))
    )
    state = state or AttentionState(None, None)
    return _ChunkedAttention.apply(q, k, v, *state, pieces, dropout_p)


class _Piece(NamedTuple):
    """Chunks of one length, one after another, in one row or in all of them."""

    rows: slice
    start: int
    """The first step of the first chunk."""
    chunks: int
    length: int
    before: int
    """Keys of each chunk that come out of the state."""
    prefix: int
    """Where those stand there, [chunks, rows, before] one after another."""

    def steps(self, z: Tensor) -> Tensor:
        """Of [batch, heads, length, d] the view [rows, heads, chunks, length, d]."""
        stop = self.start + self.chunks * self.length
        return z[self.rows, :, self.start : stop].unflatten(2, (self.chunks, self.length))

    def held(self, state: Tensor) -> Tensor:
        """Of a state [M, heads, d] the view [rows, heads, chunks, before, d]."""
        shape = (self.chunks, self.rows.stop - self.rows.start, self.before)
        stop = self.prefix + math.prod(shape)
        return state[self.prefix : stop].unflatten(0, shape).permute(1, 3, 0, 2, 4)

    def seen(self, z: Tensor, state: Tensor | None) -> Tensor:
        """What the last query sees: [rows, heads, chunks, before + length, d]."""
        if not self.before:
            return self.steps(z)
        return torch.cat([self.held(state).to(z.dtype), self.steps(z)], dim=3)


def _pieces(segments: Segments, chunk_size: int) -> Iterator[_Piece]:
    parts, rows = segments.chunk_parts(chunk_size), 1
    if parts and segments.whole_rows:
        rows = segments.batch
        parts = parts[: len(parts) // rows]
    for (row, length, before), run in groupby(parts, lambda z: (z.row, z.length, z.before)):
        first, *others = run
        yield _Piece(
            slice(row, row + rows), first.start, 1 + len(others), length, before, first.prefix
        )


class _ChunkedAttention(torch.autograd.Function):
    """The weights are recomputed backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        pieces: list[_Piece],
        dropout_p: float,
    ) -> Tensor:
        q, k, v = (_heads_first(z) for z in (q, k, v))
        ctx.pieces, ctx.dropout_p = pieces, dropout_p
        wide_q, wide_k = (z.to(compute_dtype(z)) for z in (q, k))
        out = torch.empty_like(v)
        future = _future(pieces, v)
        kept = []
        for piece in pieces:
            whole = piece.steps(wide_q), piece.seen(wide_k, key), piece.seen(v, value)
            for queries, keys, values, outputs in _matrices(*whole, piece.steps(out)):
                for rows, seen in _query_blocks(queries, keys, v.dtype):
                    weights = _softmax_weights(queries[:, rows], keys[:, :seen], future)
                    if dropout_p > 0:
                        keep = torch.empty_like(weights, dtype=torch.bool).bernoulli_(1 - dropout_p)
                        kept.append(keep)
                        weights = _drop(weights, keep, dropout_p)
                    torch.bmm(weights.to(v.dtype), values[:, :seen], out=outputs[:, rows])
        ctx.save_for_backward(q, k, v, key, value, *kept)
        return _heads_back(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key, value, *kept = ctx.saved_tensors
        grad_out = _heads_first(grad_out)
        wide_q, wide_k = (z.to(compute_dtype(z)) for z in (q, k))
        grad_q, grad_k = torch.empty_like(wide_q), torch.empty_like(wide_k)
        future = _future(ctx.pieces, v)
        # Of two summands, a sum in v's type is as good as one in float32.
        few = max((piece.length for piece in ctx.pieces), default=0) <= 2 * _block(v.dtype)
        grad_v = torch.empty_like(v, dtype=v.dtype if few else wide_k.dtype)
        grad_key, grad_value = (None if z is None else torch.empty_like(z) for z in (key, value))
        masks = iter(kept)
        for piece in ctx.pieces:
            whole = piece.steps(wide_q), piece.seen(wide_k, key), piece.seen(v, value)
            own = piece.steps(grad_k), piece.steps(grad_v)
            grads = own
            if piece.before:
                grads = [
                    torch.empty_like(z, dtype=o.dtype) for z, o in zip(whole[1:], own, strict=True)
                ]
            for queries, keys, values, grad, to_queries, to_keys, to_values in _matrices(
                *whole, piece.steps(grad_out), piece.steps(grad_q), *grads
            ):
                blocks = list(_query_blocks(queries, keys, v.dtype))
                drawn = list(islice(masks, len(blocks)))
                # The last block sees every key: it fills what the others add to.
                first = True
                for (rows, seen), keep in reversed(list(zip_longest(blocks, drawn))):
                    weights = _softmax_weights(queries[:, rows], keys[:, :seen], future)
                    grad_weights = torch.bmm(grad[:, rows], values[:, :seen].mT).to(weights.dtype)
                    used = weights
                    if keep is not None:
                        used = _drop(weights, keep, ctx.dropout_p)
                        grad_weights = _drop(grad_weights, keep, ctx.dropout_p)
                    _accumulate(to_values[:, :seen], used.to(v.dtype).mT, grad[:, rows], first)
                    grad_scores = torch.ops.aten._softmax_backward_data(
                        grad_weights, weights, -1, weights.dtype
                    )
                    torch.bmm(grad_scores, keys[:, :seen], out=to_queries[:, rows])
                    _accumulate(to_keys[:, :seen], grad_scores.mT, queries[:, rows], first)
                    first = False
            if piece.before:
                for grad, to, state in zip(grads, own, (grad_key, grad_value), strict=True):
                    piece.held(state).copy_(grad[..., : piece.before, :])
                    to.copy_(grad[..., piece.before :, :])
        grads = grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)
        return *map(_heads_back, grads), grad_key, grad_value, None, None


def _heads_first(z: Tensor) -> Tensor:
    """Of [length, batch, heads, d] the view [batch, heads, length, d], or a copy for bfloat16.

    Products of that copy what does not lie side by side, and each would.
    """
    z = z.permute(1, 2, 0, 3)
    return z.contiguous() if z.dtype == torch.bfloat16 else z


def _heads_back(z: Tensor) -> Tensor:
    return z.permute(2, 0, 1, 3)


def _matrices(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Of [rows, heads, chunks, length, d]: views [n, length, d] that make up the whole.

    Products take no two dimensions of matrices without a copy: they take the largest, and the
    others are gone through.
    """
    sizes = tensors[0].shape[:3]
    whole = sizes.index(max(sizes))
    ranges = [[slice(None)] if i == whole else range(n) for i, n in enumerate(sizes)]
    for at in product(*ranges):
        yield [z[at] for z in tensors]


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b, or = for the first; the sum is in total's type, the product in a's."""
    if first and total.dtype == a.dtype:
        torch.bmm(a, b, out=total)
    elif first:
        total.copy_(torch.bmm(a, b))
    elif total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


def _block(dtype: torch.dtype) -> int:
    """Rows of queries at a time."""
    return QUERY_BLOCK * (2 if dtype == torch.bfloat16 else 1)


def _query_blocks(q: Tensor, k: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, int]]:
    """Rows of queries, nearly as many in each, and how many keys the last of them sees."""
    length, before = q.shape[1], k.shape[1] - q.shape[1]
    size = math.ceil(length / max(1, round(length / _block(dtype))))
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield slice(start, stop), before + stop


def _future(pieces: list[_Piece], v: Tensor) -> Tensor:
    """Which keys come after which queries, as large as a block of queries may be."""
    size = min(2 * _block(v.dtype), max((piece.length for piece in pieces), default=0))
    return torch.ones(size, size, dtype=torch.bool, device=v.device).triu_(1)


def _softmax_weights(q: Tensor, k: Tensor, future: Tensor) -> Tensor:
    """Causal softmax(q k^T), where the last query sees every key."""
    scores, rows = torch.bmm(q, k.mT), q.shape[1]
    scores[:, :, -rows:].masked_fill_(future[:rows, :rows], -torch.inf)
    return scores.softmax(-1)


def _drop(weights: Tensor, keep: Tensor, dropout_p: float) -> Tensor:
    return (weights * keep).div_(1 - dropout_p)
