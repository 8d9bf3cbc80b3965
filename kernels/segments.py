"""Which steps of a tensor belong to which document: the table that every operator goes by."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
CPU = torch.device("cpu")


class Segment(NamedTuple):
    """Consecutive positions of one document, in one row of a tensor [length, batch, ...]."""

    row: int
    start: int
    """Its first step in the row."""
    length: int
    position: int
    """How many steps of its document come before it; a segment at 0 starts afresh."""

    @property
    def steps(self) -> slice:
        """Where it lies in its row."""
        return slice(self.start, self.start + self.length)


class ChunkPart(NamedTuple):
    """What a segment holds of one attention chunk; chunks count from the document's start."""

    row: int
    start: int
    """The first step, in the row."""
    length: int
    before: int
    """Positions of the chunk that come before these steps, in other segments."""
    prefix: int
    """Where those stand among what all segments need of chunks begun before them."""


class Segments:
    """The segments of a tensor [length, batch, ...], sorted by row and start.

    They cover every step once, unless they were taken from a table that does.

    Raises:
        ValueError: a segment is empty, or the table does not cover the rows.
    """

    def __init__(self, length: int, batch: int, segments: Sequence[Segment]) -> None:
        self.length, self.batch = length, batch
        self.segments = tuple(segments)
        self._kept: dict[Hashable, Any] = {}
        end = (0, 0)
        for segment in self.segments:
            if (segment.row, segment.start) != end or segment.length < 1 or segment.position < 0:
                raise ValueError(f"{segment} does not follow step {end[1]} of row {end[0]}.")
            stop = segment.start + segment.length
            if stop > length:
                raise ValueError(f"{segment} ends after the {length} steps of its row.")
            end = (segment.row, stop) if stop < length else (segment.row + 1, 0)
        if end != (batch, 0) and length:
            raise ValueError(f"segments end at step {end[1]} of row {end[0]}; rows are {batch}.")

    @staticmethod
    @lru_cache(maxsize=64)
    def of_rows(length: int, batch: int, position: int = 0) -> Segments:
        """One document a row, of which `position` steps came before."""
        rows = range(batch) if length else ()
        return Segments(length, batch, [Segment(row, 0, length, position) for row in rows])

    @staticmethod
    def of_documents(bounds: Sequence[Sequence[int]]) -> Segments:
        """Whole documents: of each row the starts of documents, and its end.

        Raises:
            ValueError: bounds do not rise from 0 to one length.
        """
        segments = [
            Segment(row, start, stop - start, 0)
            for row, ends in enumerate(bounds)
            for start, stop in zip(ends, ends[1:], strict=False)
        ]
        return Segments(bounds[0][-1], len(bounds), segments)

    def __len__(self) -> int:
        return len(self.segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def __getitem__(self, index: int) -> Segment:
        return self.segments[index]

    def take(self, indices: Sequence[int]) -> Segments:
        """Some of them, for what sums a segment up and touches no other step."""
        taken = Segments.__new__(Segments)
        taken.length, taken.batch, taken._kept = self.length, self.batch, {}
        taken.segments = tuple(self.segments[i] for i in indices)
        return taken

    @cached_property
    def whole_rows(self) -> bool:
        """Whether each row is one segment, all of them at the same position of their documents."""
        if len(self.segments) != self.batch:
            return False
        position = self.segments[0].position if self.segments else 0
        return all(
            segment == (row, 0, self.length, position) for row, segment in enumerate(self.segments)
        )

    @cached_property
    def continued(self) -> bool:
        """Whether a segment's document started before it."""
        return any(segment.position for segment in self.segments)

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once for each key."""
        if key not in self._kept:
            # A cached inference tensor would be refused by a later training step; tables are made
            # on the host, whatever torch's default device is.
            with torch.inference_mode(False), torch.no_grad(), CPU:
                self._kept[key] = make()
        return self._kept[key]

    def table(self, device: torch.device = CPU) -> Tensor:
        """Row, start, length and position of all segments, int64 [S, 4]."""
        return self.kept(
            ("table", device),
            lambda: (
                torch.tensor(self.segments, dtype=torch.int64)
                .view(-1, len(Segment._fields))
                .to(device, non_blocking=True)
            ),
        )

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """A field of all segments, int64 [S]."""
        return self.table(device)[:, Segment._fields.index(name)]

    def owners(self, device: torch.device) -> Tensor:
        """Which segment each step belongs to, int64 [length, batch]; -1 for none."""

        def make() -> Tensor:
            # Runs of steps, row after row: what no segment has before each one, and its own.
            owners, counts, end = [], [], 0
            for segment, number in sorted(zip(self.segments, range(len(self)), strict=True)):
                first = segment.row * self.length + segment.start
                owners += [-1, number]
                counts += [first - end, segment.length]
                end = first + segment.length
            owners.append(-1)
            counts.append(self.batch * self.length - end)
            steps = torch.tensor(owners).repeat_interleave(torch.tensor(counts))
            return steps.view(self.batch, self.length).mT.contiguous().to(device)

        return self.kept(("owners", device), make)

    def positions(self, device: torch.device) -> Tensor:
        """Every step's position in its document, int64 [length, batch]."""

        def make() -> Tensor:
            offset = self.tensor("position", device) - self.tensor("start", device)
            steps = torch.arange(self.length, device=device)[:, None]
            return offset[self.owners(device)] + steps

        return self.kept(("positions", device), make)

    def chunk_parts(self, chunk_size: int) -> list[ChunkPart]:
        """What the segments hold of every chunk, in their order."""
        return self.kept(("chunks", chunk_size), lambda: list(self._chunk_parts(chunk_size)))

    def _chunk_parts(self, chunk_size: int) -> Iterator[ChunkPart]:
        prefix = 0
        for segment in self.segments:
            done, before = 0, segment.position % chunk_size
            while done < segment.length:
                length = min(chunk_size - before, segment.length - done)
                yield ChunkPart(segment.row, segment.start + done, length, before, prefix)
                prefix, done, before = prefix + before, done + length, 0

    def begun(self, chunk_size: int) -> int:
        """Positions before the segments, of the chunks that these start in."""
        return sum(segment.position % chunk_size for segment in self.segments)


def numbered(rows: Tensor, first: Tensor | int, stop: Tensor) -> Tensor:
    """Rows [n, fields], each once for every number from `first` to before `stop`, its new field."""
    count = stop - first
    numbers = torch.arange(int(count.sum())) + (stop - count.cumsum(0)).repeat_interleave(count)
    return torch.cat([rows.repeat_interleave(count, 0), numbers[:, None]], 1)


def checked_segments(x: Tensor, segments: Segments | None) -> Segments:
    """The segments of x [length, batch, ...]: those given, or one a row.

    Raises:
        ValueError: x is of another type or shape than the segments are of.
    """
    if x.dim() < 3 or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; it must be floating, [length, batch, ...]."
        )
    length, batch = x.shape[:2]
    if segments is None:
        return Segments.of_rows(length, batch)
    if (segments.length, segments.batch) != (length, batch):
        raise ValueError(
            f"segments are of {segments.length} steps in {segments.batch} rows; for x of shape "
            f"{tuple(x.shape)} they must be of {length} in {batch}."
        )
    return segments
