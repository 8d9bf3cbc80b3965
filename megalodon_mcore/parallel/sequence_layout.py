"""The positions of a sequence that each rank of a group holds; numbers, no process groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SEQUENCE_ORDERS = ("contiguous", "zigzag")
ORDER_OF_MEGATRON = "zigzag"
"""How get_batch of Megatron's scripts and of Bridge cuts."""


class Segment(NamedTuple):
    """Consecutive positions start..stop-1 of the sequence."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Positions in the segment."""
        return self.stop - self.start


@dataclass(frozen=True)
class SequenceLayout:
    """The segments of every rank of a group, in the order in which the rank holds them."""

    segments: tuple[tuple[Segment, ...], ...]

    def in_order(self) -> list[tuple[Segment, int, int]]:
        """Every segment with its rank and its place there, by position in the sequence."""
        return sorted(
            (segment, rank, place)
            for rank, held in enumerate(self.segments)
            for place, segment in enumerate(held)
        )

    def rows(self, rank: int, wanted: Segment) -> list[tuple[Segment, int]]:
        """The parts of `wanted` that a rank holds, each with its first row in the rank's tensor."""
        found, row = [], 0
        for held in self.segments[rank]:
            part = Segment(max(held.start, wanted.start), min(held.stop, wanted.stop))
            if part.length > 0:
                found.append((part, row + part.start - held.start))
            row += held.length
        return found


def context_parallel_layout(order: str, size: int, local_length: int) -> SequenceLayout:
    """How context parallelism cuts a sequence of size * local_length positions.

    `contiguous` gives rank r the r-th of `size` parts. `zigzag` is what Megatron's get_batch does:
    of 2 * size parts rank r holds number r and number 2 * size - 1 - r.

    Raises:
        ValueError: the order is unknown, or local_length is odd in zigzag.
    """
    if order == "contiguous" or (order == "zigzag" and size == 1):
        starts = [(rank * local_length,) for rank in range(size)]
        length = local_length
    elif order == "zigzag":
        if local_length % 2:
            raise ValueError(
                f"a rank holds {local_length} positions, but zigzag order gives each two equal "
                f"segments; take a length that 2 * --context-parallel-size = {2 * size} divides."
            )
        length = local_length // 2
        starts = [(rank * length, (2 * size - 1 - rank) * length) for rank in range(size)]
    else:
        raise ValueError(f"sequence order is {order!r}; it takes {' or '.join(SEQUENCE_ORDERS)}.")
    return SequenceLayout(
        tuple(tuple(Segment(start, start + length) for start in held) for held in starts)
    )


def sequence_parallel_layout(layout: SequenceLayout, size: int) -> SequenceLayout:
    """Each rank's positions cut again into `size` equal parts, which become ranks of their own.

    Raises:
        ValueError: a rank's positions can't be cut so.
    """
    parts = []
    for held in layout.segments:
        total = sum(segment.length for segment in held)
        if total % size:
            raise ValueError(
                f"a context-parallel rank holds {total} positions, which "
                f"--tensor-model-parallel-size {size} does not divide; sequence parallelism "
                "needs equal parts."
            )
        for part in range(size):
            first, last, row, cut = part * total // size, (part + 1) * total // size, 0, []
            for segment in held:
                start, stop = max(first - row, 0), min(last - row, segment.length)
                if start < stop:
                    cut.append(Segment(segment.start + start, segment.start + stop))
                row += segment.length
            parts.append(tuple(cut))
    return SequenceLayout(tuple(parts))
