"""A rank's segments of sequences that a group shares, and what those of a document exchange."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megalodon_mcore.kernels.segments import Segment, Segments
from megalodon_mcore.parallel.sequence_layout import SequenceLayout, sequence_layout
from megalodon_mcore.parallel.subgroups import once_in_a_world


class Earlier(NamedTuple):
    """The earlier segments of the documents of K segments, at most P each."""

    summaries: Tensor
    """[K, P, batch, ...], zeros after the last one."""
    lengths: Tensor
    """How long each is, float64 [K, P]."""
    distances: Tensor
    """Positions from its end to the segment, float64 [K, P]."""


class SequenceShards:
    """This rank's part of `batch` sequences that all are cut alike.

    Attributes:
        layout: what every rank holds of a sequence.
        segments: what this one holds of all, as operators take it.
        leaving: which of them have documents that go on elsewhere.
        joined: whether a document of any rank is cut, so that all have to exchange states.
    """

    def __init__(self, layout: SequenceLayout, group: ProcessGroup | None, batch: int) -> None:
        self.layout, self.group, self.batch = layout, group, batch
        self.rank = 0 if group is None else group.rank()
        own = layout.spans[self.rank]
        *starts, length = accumulate((span.length for span in own), initial=0)
        self.segments = Segments(
            length,
            batch,
            [
                Segment(row, start, span.length, span.position)
                for row in range(batch)
                for start, span in zip(starts, own, strict=True)
            ],
        )
        # What comes before spans of a document: the earlier ones, by rank and number among those
        # that leave it.
        ordered = layout.in_order()
        self._leaving: list[list[int]] = [[] for _ in layout.spans]
        self._sources: dict[int, list[tuple[int, int, int, int]]] = {}
        earlier: list[tuple[int, int, int, int]] = []
        for number, (span, rank, place) in enumerate(ordered):
            if span.position == 0:
                earlier = []
            elif rank == self.rank:
                self._sources[place] = list(earlier)
            follows = ordered[number + 1][0] if number + 1 < len(ordered) else None
            if follows is not None and follows.document == span.document:
                earlier.append((rank, len(self._leaving[rank]), span.stop, span.length))
                self._leaving[rank].append(place)
        self._most = max(len(places) for places in self._leaving)
        self.joined = self._most > 0
        self._own = sorted(self._sources)
        self.leaving = self.segments.take(
            [row * len(own) + place for row in range(batch) for place in self._leaving[self.rank]]
        )

    def exchange(self, x: Tensor, summaries: Tensor) -> tuple[Tensor, Earlier]:
        """What each own segment that goes on with a document needs to know of that so far.

        One all-gather forward and one reduce-scatter backward, whose size depends on how many
        segments leave a rank and not on their length.

        Args:
            x: what was summarized.
            summaries: [leaving, ...], one of each segment in `leaving`.

        Returns:
            x itself, to be used further, so that all ranks take part in the backward exchange; and
            what comes before this rank's segments.
        """
        count = len(self._leaving[self.rank])
        shape = summaries.shape[1:]
        summaries = summaries.reshape(self.batch, count, *shape).transpose(0, 1)
        # Places that this rank does not fill, and one that stands for none.
        missing = summaries.new_zeros(self._most - count, self.batch, *shape)
        x, gathered = _Exchange.apply(x, torch.cat([summaries, missing]), self.group)
        gathered = torch.cat([gathered, gathered.new_zeros(1, self.batch, *shape)])
        which, lengths, distances = (
            self.segments.kept((name, x.device), lambda number=number: self._table(number, x))
            for number, name in enumerate(("sources", "source lengths", "distances"))
        )
        return x, Earlier(gathered[which], lengths, distances)

    def _table(self, number: int, like: Tensor) -> Tensor:
        rows, spans = [], self.layout.spans[self.rank]
        most = max((len(self._sources[place]) for place in self._own), default=0)
        for place in self._own:
            entries = [
                (rank * self._most + index, length, spans[place].start - stop)[number]
                for rank, index, stop, length in self._sources[place]
            ]
            none = self._most * len(self.layout.spans) if number == 0 else 0
            rows.append(entries + [none] * (most - len(entries)))
        dtype = torch.int64 if number == 0 else torch.float64
        return torch.tensor(rows, dtype=dtype).view(len(rows), most).to(like.device)

    def as_states(self, incoming: Tensor) -> Tensor:
        """[K, batch, ...], the states before the segments that go on, to [S, ...]; others get 0."""
        places = len(self.layout.spans[self.rank])
        states = incoming.new_zeros(places, *incoming.shape[1:])
        where = self.segments.kept(
            ("incoming", incoming.device),
            lambda: torch.tensor(self._own, dtype=torch.int64).to(incoming.device),
        )
        return states.index_copy(0, where, incoming).transpose(0, 1).flatten(0, 1)


class _Exchange(torch.autograd.Function):
    """Gathers along the first dimension, and returns its first input too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, summaries: Tensor, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        ctx.group = group
        if group is None:
            return x.view_as(x), summaries.clone()
        return x.view_as(x), mappings._gather_along_first_dim(summaries.contiguous(), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        if ctx.group is not None:
            grad = mappings._reduce_scatter_along_first_dim(grad.contiguous(), group=ctx.group)
        return grad_x, grad, None


@once_in_a_world
def sequence_shards(
    order: str,
    context_parallel_size: int,
    sequence_parallel_size: int,
    bounds: tuple[int, ...],
    group: ProcessGroup | None,
    batch: int,
) -> SequenceShards:
    """The shards of this rank of a group; see `sequence_layout` for the other arguments."""
    layout = sequence_layout(order, context_parallel_size, sequence_parallel_size, bounds)
    return SequenceShards(layout, group, batch)
