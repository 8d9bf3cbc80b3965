"""What the Triton kernels go by: a row for every program of a head.

What a segment holds of a chunk is a part. Positions in it are local to the chunk, and the first
`before` of its keys come from the state. Where there are such, the part's keys and values are put
together in a buffer, so that they lie in one place; these parts are launched by themselves.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..segments import Segments, numbered

# A part's fields: row and step of its first query, row and step of its first key (in the buffer,
# if that has them), its keys before the first query, all its keys, and where in the workspace its
# square is and how long the side. Then the tile, and of `pairs` that of keys.
PART = 8


class Buffer(NamedTuple):
    """Places of the state's rows in a buffer, and of own steps with their places [step, row]."""

    size: int
    held: Tensor
    own: Tensor
    steps: Tensor
    rows: Tensor

    def put_together(self, x: Tensor, state: Tensor) -> Tensor:
        """[size, 1, heads, d] of steps of x [length, batch, heads, d] and a state [M, heads, d]."""
        buffer = x.new_empty(self.size, 1, *x.shape[2:])
        buffer[self.held, 0] = state
        buffer[self.own, 0] = x[self.steps, self.rows]
        return buffer

    def take_apart(self, buffer: Tensor, x: Tensor) -> Tensor:
        """Puts own steps back into x, and returns the state's rows."""
        x[self.steps, self.rows] = buffer[self.own, 0]
        return buffer[self.held, 0]


class Group(NamedTuple):
    """Parts whose squares fit in the workspace: tables int64 [programs, fields]."""

    weights: Tensor
    """Tiles of queries for weights_kernel, the last of a part first."""
    queries: Tensor
    """Tiles of queries for product_kernel, likewise."""
    keys: Tensor
    """Tiles of keys, the first of a part first."""
    pairs: Tensor
    """Tiles of queries with each tile of keys that they see."""
    size: int
    """Numbers in the squares of one head."""


class Tables(NamedTuple):
    """All parts whose keys are in x, or all whose keys are in the buffer."""

    buffer: Buffer | None
    groups: list[Group]


def make_tables(
    segments: Segments,
    chunk_size: int,
    device: torch.device,
    weights: int,
    square: int,
    product: int,
    limit: int,
) -> list[Tables]:
    """For so many rows in the tiles of each kernel, and so many numbers in a group's squares."""
    parts, buffer = _parts(segments, chunk_size, square)
    tables = []
    for chosen, held in zip(parts, (None, buffer), strict=True):
        groups = []
        for group, size in _groups(chosen, limit):
            pairs = _of_queries(group, square)
            pairs = numbered(pairs, 0, pairs[:, PART] + 1)
            keys = numbered(group, 0, _tiles(group[:, 5], product))
            made = _of_queries(group, weights), _of_queries(group, product), keys, pairs
            groups.append(Group(*(z.to(device) for z in made), size=size))
        if len(chosen):
            if held:
                held = Buffer(held.size, *(z.to(device) for z in held[1:]))
            tables.append(Tables(held, groups))
    return tables


def _parts(
    segments: Segments, chunk_size: int, square: int
) -> tuple[tuple[Tensor, Tensor], Buffer | None]:
    """Parts without and with keys of the state, the longest first, and the buffer of the latter."""
    parts = sorted(segments.chunk_parts(chunk_size), key=lambda part: -part.length)
    row, start, length, before, prefix = torch.tensor(parts).unbind(1)
    stop, held = before + length, before > 0
    side = _tiles(stop, square) * square
    table = torch.stack([row, start, row, start, before, stop, torch.zeros_like(side), side], 1)
    if not held.any():
        return (table, table[:0]), None

    ends = stop[held].cumsum(0)
    keys = ends - stop[held]
    table[held, 2], table[held, 3] = 0, keys
    prefix, first, number = numbered(torch.stack([prefix[held], keys], 1), 0, before[held]).unbind(
        1
    )
    from_state = torch.empty_like(prefix)
    from_state[prefix + number] = first + number
    own = torch.stack([row[held], start[held], keys + before[held]], 1)
    row, start, first, number = numbered(own, 0, length[held]).unbind(1)
    buffer = Buffer(int(ends[-1]), from_state, first + number, start + number, row)
    return (table[~held], table[held]), buffer


def _groups(parts: Tensor, limit: int) -> Iterator[tuple[Tensor, int]]:
    """Parts with the places of their squares, so many that these fit, and all these's numbers."""
    first, size, squares = 0, 0, parts[:, 7] ** 2
    for last, square in enumerate([*squares.tolist(), limit + 1]):
        if last > first and size + square > limit:
            parts[first:last, 6] = squares[first:last].cumsum(0) - squares[first:last]
            yield parts[first:last], size
            first, size = last, 0
        size += square


def _of_queries(parts: Tensor, tile: int) -> Tensor:
    """Rows for the tiles that hold queries, the last of a part first: it sees the most."""
    first, stop = parts[:, 4] // tile, _tiles(parts[:, 5], tile)
    rows = numbered(parts, first, stop)
    rows[:, PART] = (first + stop - 1).repeat_interleave(stop - first) - rows[:, PART]
    return rows


def _tiles(length: Tensor, tile: int) -> Tensor:
    return (length + tile - 1) // tile
