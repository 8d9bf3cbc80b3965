"""The positions of a sequence that each rank of a group holds; numbers, no process groups."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

ORDERS_OF_ROWS = ("contiguous", "zigzag")
DOCUMENT_ZIGZAG = "document_zigzag"
SEQUENCE_ORDERS = (*ORDERS_OF_ROWS, DOCUMENT_ZIGZAG)
ORDER_OF_MEGATRON = "zigzag"
"""How get_batch of Megatron's scripts and of Bridge cuts, but for packed conversations."""


class Span(NamedTuple):
    """Consecutive positions start..stop-1 of a sequence, all of one document."""

    start: int
    stop: int
    document: int
    """Where in the sequence their document starts."""

    @property
    def length(self) -> int:
        """Positions in the span."""
        return self.stop - self.start

    @property
    def position(self) -> int:
        """Positions of the document before the span."""
        return self.start - self.document


Run = tuple[int, int]
"""Consecutive positions start..stop-1 of a sequence, of any documents."""


@dataclass(frozen=True)
class SequenceLayout:
    """The spans of every rank of a group, in the order in which the rank holds them."""

    spans: tuple[tuple[Span, ...], ...]

    def in_order(self) -> list[tuple[Span, int, int]]:
        """Every span with its rank and its place there, by position in the sequence."""
        return sorted(
            (span, rank, place)
            for rank, held in enumerate(self.spans)
            for place, span in enumerate(held)
        )

    def rows(self, rank: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Of positions start..stop-1 those that a rank holds: (first position, row, number)."""
        spans, starts, rows = self.spans[rank], *self._starts[rank]
        for place in range(max(0, bisect_right(starts, start) - 1), len(spans)):
            held = spans[place]
            if held.start >= stop:
                break
            first, last = max(held.start, start), min(held.stop, stop)
            if first < last:
                yield first, rows[place] + first - held.start, last - first

    @cached_property
    def _starts(self) -> list[tuple[list[int], list[int]]]:
        """Of each rank's spans, which rise, where they start in the sequence and in the rank."""
        return [
            (
                [span.start for span in held],
                [0, *accumulate(span.length for span in held)],
            )
            for held in self.spans
        ]


def sequence_layout(
    order: str,
    context_parallel_size: int,
    sequence_parallel_size: int,
    bounds: Sequence[int],
) -> SequenceLayout:
    """How a sequence is cut over context-parallel ranks, and each one's share over its TP ranks.

    `contiguous` gives rank r the r-th of `size` equal parts. `zigzag` is what Megatron's get_batch
    does: of 2 * size parts rank r holds number r and number 2 * size - 1 - r. `document_zigzag`
    does so with every document apart, as Transformer Engine cuts packed sequences.

    Args:
        order: one of SEQUENCE_ORDERS.
        context_parallel_size: context-parallel ranks.
        sequence_parallel_size: ranks that cut each of those one's positions again into equal
            parts, and are ranks of the layout, next to each other; 1 without sequence parallelism.
        bounds: where documents start, from 0 on, and the sequence's length.

    Raises:
        ValueError: the order is unknown, or the sequence can't be cut so.
    """
    size, length = context_parallel_size, bounds[-1]
    if order not in SEQUENCE_ORDERS:
        raise ValueError(f"sequence order is {order!r}; it takes {', '.join(SEQUENCE_ORDERS)}.")
    if size == 1 or order == "contiguous":
        runs = [[part] for part in _equal_parts(0, length, size)]
    else:
        wholes = zip(bounds, bounds[1:], strict=False) if order != "zigzag" else [(0, length)]
        runs = [[] for _ in range(size)]
        for start, stop in wholes:
            parts = _equal_parts(start, stop, 2 * size)
            for rank, held in enumerate(runs):
                held += [parts[rank], parts[-1 - rank]]
    if sequence_parallel_size > 1:
        runs = [part for held in runs for part in _cut_again(held, sequence_parallel_size)]
    return SequenceLayout(tuple(tuple(_spans(held, bounds)) for held in runs))


def _equal_parts(start: int, stop: int, count: int) -> list[Run]:
    if (stop - start) % count:
        raise ValueError(
            f"{stop - start} positions can't be cut into {count} equal parts; context parallelism "
            "needs lengths that --context-parallel-size divides, and twice that in zigzag order."
        )
    step = (stop - start) // count
    return [(first, first + step) for first in range(start, stop, step)]


def _cut_again(runs: list[Run], size: int) -> list[list[Run]]:
    total = sum(stop - start for start, stop in runs)
    if total % size:
        raise ValueError(
            f"a context-parallel rank holds {total} positions, which --tensor-model-parallel-size "
            f"{size} does not divide; sequence parallelism needs equal parts."
        )
    parts = []
    for part in range(size):
        first, last, row, cut = part * total // size, (part + 1) * total // size, 0, []
        for start, stop in runs:
            low, high = max(first - row, 0), min(last - row, stop - start)
            if low < high:
                cut.append((start + low, start + high))
            row += stop - start
        parts.append(cut)
    return parts


def _spans(runs: list[Run], bounds: Sequence[int]) -> Iterator[Span]:
    """The runs, cut where documents end; runs next to each other are one."""
    joined: list[Run] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    for start, stop in joined:
        number = bisect_right(bounds, start)
        while start < stop:
            end = min(stop, bounds[number])
            yield Span(start, end, bounds[number - 1])
            start, number = end, number + 1
