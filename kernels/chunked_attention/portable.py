"""Chunked causal attention with plain torch operations, for any device.

The values are up to 8 times wider than the keys, so nearly all the work is in the products with
the values. Taking a block of queries at a time against only the keys it can see saves almost
half of it, and makes an online softmax needless: a block holds its whole rows.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .state import AttentionState

# Rows of queries; of bfloat16 ones twice as many, whose products take less of the time.
QUERY_BLOCK = 128


def chunked_attention_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    state: AttentionState | None = None,
    dropout_p: float = 0.0,
    return_state: bool = False,
) -> tuple[Tensor, AttentionState | None]:
    """Same arguments and results as `chunked_attention`; nothing is checked here."""
    batch, length = q.shape[:2]
    cached = 0 if state is None else state.key.shape[1]
    # The sequence is what completes the state's chunk, then whole chunks, then a rest.
    head = min(length, chunk_size - cached) if cached else 0
    rest = (length - head) % chunk_size
    whole = slice(head, length - rest)

    pieces = []
    if head:
        keys = torch.cat([state.key, k[:, :head]], dim=1)
        values = torch.cat([state.value, v[:, :head]], dim=1)
        given = (z[:, None] for z in (q[:, :head], keys, values))
        pieces.append(_causal_attention(*given, dropout_p=dropout_p).squeeze(1))
    if whole.stop > whole.start:
        chunks = (z[:, whole].unflatten(1, (-1, chunk_size)) for z in (q, k, v))
        pieces.append(_causal_attention(*chunks, dropout_p=dropout_p).flatten(1, 2))
    if rest or not pieces:
        given = (z[:, None, whole.stop :] for z in (q, k, v))
        pieces.append(_causal_attention(*given, dropout_p=dropout_p).squeeze(1))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    if not return_state:
        return out, None
    if cached and cached + length < chunk_size:
        return out, AttentionState(
            torch.cat([state.key, k], dim=1), torch.cat([state.value, v], dim=1)
        )
    # Copies: a slice would keep the whole sequence's memory alive.
    key, value = (z[:, whole.stop :].clone(memory_format=torch.contiguous_format) for z in (k, v))
    return out, AttentionState(key, value)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Attention of [batch, chunks, queries, heads, d] where the last query sees the last key."""
    if v.dtype != torch.bfloat16:
        return _CausalAttention.apply(q, k, v, dropout_p)
    # Products of bfloat16 copy what does not lie side by side, and each would.
    packed = (z.transpose(2, 3).flatten(0, 2).contiguous()[:, None, :, None] for z in (q, k, v))
    out = _CausalAttention.apply(*packed, dropout_p).squeeze(3).squeeze(1)
    batch, chunks, _, heads, _ = q.shape
    return out.unflatten(0, (batch, chunks, heads)).transpose(2, 3)


class _CausalAttention(torch.autograd.Function):
    """q [batch, chunks, queries, heads, dk], k, v likewise; the weights are recomputed backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float,
    ) -> Tensor:
        out = _like_queries(v, q)
        kept = []
        for queries, keys, values, outputs in _matrices(*_at_least_float32(q, k), v, out):
            for rows, seen in _query_blocks(queries, keys, v.dtype):
                weights = _softmax_weights(queries[:, rows], keys[:, :seen])
                if dropout_p > 0:
                    keep = torch.empty_like(weights, dtype=torch.bool).bernoulli_(1 - dropout_p)
                    kept.append(keep)
                    weights = _drop(weights, keep, dropout_p)
                torch.bmm(weights.to(v.dtype), values[:, :seen], out=outputs[:, rows])
        ctx.dropout_p = dropout_p
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        whole = *_at_least_float32(q, k), v, grad_out
        grad_q, grad_k = (torch.empty_like(z) for z in whole[:2])
        # Of two summands, a sum in v's type is as good as one in float32.
        few = len(list(_query_blocks(q[:, 0], k[:, 0], v.dtype))) <= 2
        grad_v = torch.empty_like(v, dtype=v.dtype if few else grad_k.dtype)
        kept.reverse()
        for queries, keys, values, grad, *grads in _matrices(*whole, grad_q, grad_k, grad_v):
            to_queries, to_keys, to_values = grads
            # The last block sees every key: it fills what the others add to.
            first = True
            for rows, seen in reversed(list(_query_blocks(queries, keys, v.dtype))):
                weights = _softmax_weights(queries[:, rows], keys[:, :seen])
                grad_weights = torch.bmm(grad[:, rows], values[:, :seen].mT).to(weights.dtype)
                used = weights
                if kept:
                    keep = kept.pop()
                    used = _drop(weights, keep, ctx.dropout_p)
                    grad_weights = _drop(grad_weights, keep, ctx.dropout_p)
                _accumulate(to_values[:, :seen], used.to(v.dtype).mT, grad[:, rows], first)
                grad_scores = torch.ops.aten._softmax_backward_data(
                    grad_weights, weights, -1, weights.dtype
                )
                torch.bmm(grad_scores, keys[:, :seen], out=to_queries[:, rows])
                _accumulate(to_keys[:, :seen], grad_scores.mT, queries[:, rows], first)
                first = False
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _matrices(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Of [batch, chunks, length, heads, d]: views [n, length, d] that make up the whole.

    Products take no two dimensions of matrices without a copy, so batch or chunks are gone through.
    """
    batch, chunks, _, heads, _ = tensors[0].shape
    for head in range(heads):
        if chunks == 1:
            yield [z[:, 0, :, head] for z in tensors]
        else:
            yield from ([z[row, :, :, head] for z in tensors] for row in range(batch))


def _like_queries(v: Tensor, q: Tensor) -> Tensor:
    """Room for the result, in v's order of memory where it has v's shape."""
    if v.shape[2] == q.shape[2]:
        return torch.empty_like(v)
    return v.new_empty(*q.shape[:4], v.shape[4])


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


def _at_least_float32(*tensors: Tensor) -> list[Tensor]:
    return [z if z.dtype == torch.float64 else z.float() for z in tensors]


def _query_blocks(q: Tensor, k: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, int]]:
    """Rows of queries, and how many keys the last of them sees."""
    length, before = q.shape[1], k.shape[1] - q.shape[1]
    size = QUERY_BLOCK * (2 if dtype == torch.bfloat16 else 1)
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield slice(start, stop), before + stop


def _softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    """Causal softmax(q k^T), where the last query sees every key."""
    scores = torch.bmm(q, k.mT)
    rows = q.shape[1]
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu_(1)
    scores[:, :, -rows:].masked_fill_(future, -torch.inf)
    return scores.softmax(-1)


def _drop(weights: Tensor, keep: Tensor, dropout_p: float) -> Tensor:
    return (weights * keep).div_(1 - dropout_p)
