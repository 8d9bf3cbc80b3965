"""Keys and values of chunks that segments start inside of, fetched from other ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megalodon_mcore.kernels.chunked_attention import AttentionState
from megalodon_mcore.parallel.sequence_layout import SequenceLayout
from megalodon_mcore.parallel.sequence_shards import SequenceShards


def with_chunk_prefixes(
    shards: SequenceShards, key: Tensor, value: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, AttentionState | None]:
    """What lies before own segments in the chunks that they start in.

    Only that travels, in one all-to-all with uneven parts; where no rank's segments start inside a
    chunk, nothing does.

    Args:
        shards: how key and value are cut.
        key: [length, batch, heads, dk].
        value: [length, batch, heads, dv].
        chunk_size: positions in an attention chunk.

    Returns:
        key and value, to be used further, so that all ranks take part in the backward exchange; and
        the state for `chunked_attention`, None where no rank needs any.
    """
    kept = shards.segments.kept
    plan = kept(("chunk plan", chunk_size), lambda: _Plan(shards.layout, shards.rank, chunk_size))
    if not plan.anything:
        return key, value, None
    width = key.shape[-1]
    rows, received = _Exchange.apply(torch.cat([key, value], dim=-1), plan, shards.group)
    order = kept(
        ("chunk plan's order", chunk_size, rows.device),
        lambda: torch.tensor(plan.order, dtype=torch.int64).to(rows.device),
    )
    before = received.index_select(0, order).transpose(0, 1).flatten(0, 1)
    state = AttentionState(before[..., :width], before[..., width:])
    return rows[..., :width], rows[..., width:], state


class _Plan:
    """The rows that go from rank to rank; every rank computes the same from the layout."""

    def __init__(self, layout: SequenceLayout, rank: int, chunk_size: int) -> None:
        self.send_rows: list[tuple[int, int]] = []
        """A first row and a number of rows."""
        self.send_counts: list[int] = []
        self.receive_counts: list[int] = []
        wanted = [
            [(span.start - span.position % chunk_size, span.start) for span in held]
            for held in layout.spans
        ]
        self.anything = any(start < stop for held in wanted for start, stop in held)
        arriving = []
        for other, prefixes in enumerate(wanted):
            sent = [
                (row, count)
                for start, stop in prefixes
                if start < stop
                for _, row, count in layout.rows(rank, start, stop)
            ]
            self.send_rows += sent
            self.send_counts.append(sum(count for _, count in sent))
            before = len(arriving)
            for place, (start, stop) in enumerate(wanted[rank]):
                if start < stop:
                    for first, _, count in layout.rows(other, start, stop):
                        arriving += [(place, position) for position in range(first, first + count)]
            self.receive_counts.append(len(arriving) - before)
        # By own span, and by position before it.
        self.order = sorted(range(len(arriving)), key=arriving.__getitem__)


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
