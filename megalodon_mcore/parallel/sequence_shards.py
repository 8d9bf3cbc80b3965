"""A rank's segments of a sequence, and the exchange of what each segment amounts to."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megalodon_mcore.parallel.sequence_layout import Segment, SequenceLayout


class SequenceShards:
    """This rank's part of a sequence that a group shares; tensors are [length, batch, ...]."""

    def __init__(self, layout: SequenceLayout, group: ProcessGroup) -> None:
        self.layout = layout
        self.group = group
        self.own: tuple[Segment, ...] = layout.segments[group.rank()]
        self._most = max(len(held) for held in layout.segments)
        in_order = layout.in_order()
        self._places = torch.tensor([rank * self._most + place for _, rank, place in in_order])
        self.all: list[Segment] = [segment for segment, _, _ in in_order]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """This rank's tensor cut into its segments."""
        return x.split([segment.length for segment in self.own])

    def number_before(self, segment: Segment) -> int:
        """How many segments of the whole sequence come before this one."""
        return self.all.index(segment)

    def gather(self, summaries: list[Tensor]) -> Tensor:
        """One summary of each own segment to [all segments, ...], by position in the sequence.

        One all-gather forward and one reduce-scatter backward, whose size depends on the number
        of segments and not on their length.
        """
        missing = self._most - len(summaries)
        summaries = [*summaries, *([torch.zeros_like(summaries[0])] * missing)]
        gathered = gather_from_sequence_parallel_region(torch.stack(summaries), group=self.group)
        self._places = self._places.to(gathered.device)
        return gathered.index_select(0, self._places)
