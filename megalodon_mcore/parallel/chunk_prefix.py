"""Keys and values of chunks that straddle segments, fetched from the ranks that hold them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megalodon_mcore.parallel.sequence_layout import Segment, SequenceLayout
from megalodon_mcore.parallel.sequence_shards import SequenceShards

Rows = tuple[int, int]
"""A first row and a number of rows."""


def with_chunk_prefixes(
    shards: SequenceShards, rows: Tensor, chunk_size: int
) -> list[tuple[Tensor, Tensor]]:
    """Each own segment of `rows`, after the rows of its first chunk that lie before it.

    Only what straddling chunks need travels, in one all-to-all with uneven parts; where no rank's
    segments begin inside a chunk, nothing does.

    Args:
        shards: the layout of `rows`.
        rows: [length, batch, width], keys and values side by side.
        chunk_size: positions in an attention chunk.

    Returns:
        (prefix [m, batch, width], segment [length, batch, width]) for each own segment.
    """
    plan = _plan(shards.layout, shards.group.rank(), chunk_size)
    if not plan.anything:
        empty = rows.new_empty(0, *rows.shape[1:])
        return [(empty, segment) for segment in shards.split(rows)]
    rows, received = _Exchange.apply(rows, plan, shards.group)
    lengths = [part.length for part, _ in plan.received]
    pieces = dict(zip(plan.received, received.split(lengths), strict=True))
    result = []
    for place, segment in enumerate(shards.split(rows)):
        parts = sorted(key for key in pieces if key[1] == place)
        prefix = [pieces[key] for key in parts] or [received[:0]]
        result.append((torch.cat(prefix), segment))
    return result


class _Plan:
    """The rows that go from rank to rank; every rank computes the same from the layout."""

    def __init__(self, layout: SequenceLayout, rank: int, chunk_size: int) -> None:
        self.send_rows: list[Rows] = []
        self.send_counts: list[int] = []
        self.receive_counts: list[int] = []
        # What arrives, in its order: the positions, and the own segment that they precede.
        self.received: list[tuple[Segment, int]] = []
        ranks = range(len(layout.segments))
        wanted = [
            [Segment(s.start - s.start % chunk_size, s.start) for s in layout.segments[r]]
            for r in ranks
        ]
        self.anything = any(prefix.length for held in wanted for prefix in held)
        for other in ranks:
            sent = [found for prefix in wanted[other] for found in layout.rows(rank, prefix)]
            self.send_rows += [(row, part.length) for part, row in sent]
            self.send_counts.append(sum(part.length for part, _ in sent))
            arriving = [
                (part, place)
                for place, prefix in enumerate(wanted[rank])
                for part, _ in layout.rows(other, prefix)
            ]
            self.received += arriving
            self.receive_counts.append(sum(part.length for part, _ in arriving))


_plan = lru_cache(maxsize=64)(_Plan)


class _Exchange(torch.autograd.Function):
    """Returns its input too, so that every rank takes part in the backward exchange."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        plan: _Plan,
        group: ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.group = plan, group
        parts = [rows[first : first + count] for first, count in plan.send_rows]
        sent = torch.cat(parts) if parts else rows[:0]
        return rows.view_as(rows), _all_to_all(sent, plan.send_counts, plan.receive_counts, group)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_rows: Tensor,
        grad_received: Tensor,
    ) -> tuple[Tensor, None, None]:
        plan = ctx.plan
        returned = _all_to_all(grad_received, plan.receive_counts, plan.send_counts, ctx.group)
        grad_rows = grad_rows.clone()
        counts = [count for _, count in plan.send_rows]
        for (first, count), grad in zip(plan.send_rows, returned.split(counts), strict=True):
            grad_rows[first : first + count] += grad
        return grad_rows, None, None


def _all_to_all(
    rows: Tensor, send_counts: list[int], receive_counts: list[int], group: ProcessGroup
) -> Tensor:
    received = rows.new_empty(sum(receive_counts), *rows.shape[1:])
    torch.distributed.all_to_all_single(
        received, rows.contiguous(), receive_counts, send_counts, group=group
    )
    return received
