"""How segments are cut into blocks of steps for the scan in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..segments import Segments, numbered

# Elements of x that a CPU rearranges at a time, to find them in its cache.
CPU_ELEMENTS = 1 << 18


class Window(NamedTuple):
    """Blocks that follow each other in a row, or in all rows side by side where those are alike."""

    blocks: int
    steps: slice
    """The steps of the rows that the blocks are of."""
    rows: slice
    links: list[int]
    """Which blocks go on with the segment of the block before them, the window's first apart."""
    carried: bool
    """Whether the first does, with the last of the window before."""
    fresh: Tensor
    """Which start a segment, the first apart."""
    entries: list[tuple[int, int]]
    """Which start one that goes on with its document, and which; of rows side by side the first."""
    ends: list[tuple[int, int]]
    """Which end one, and which."""
    pieces: list[tuple[int, int, int, slice]]
    """Blocks in a row without gaps: first block, how many, the place in it where steps begin, and
    which steps of the rows."""
    indices: tuple[Tensor, Tensor, Tensor] | None
    """Where pieces are so many that these are faster: of each of the blocks' steps which of `steps`
    it is; which of them only fill a block up; and which do not."""


def block_windows(
    segments: Segments, block: int, channels: int, device: torch.device, to_end: bool = False
) -> list[Window]:
    """The segments in blocks of T steps, each from its own start, or back from its own end.

    What is missing of a segment's last (or first) block counts as zeros. A window has as many
    blocks as may be rearranged at a time of so many channels.
    """
    key = ("CEMA blocks", block, channels, device, to_end)
    return segments.kept(key, lambda: list(_windows(segments, block, channels, device, to_end)))


def _windows(
    segments: Segments, block: int, channels: int, device: torch.device, to_end: bool
) -> Iterator[Window]:
    side_by_side = segments.whole_rows
    most = CPU_ELEMENTS if device.type == "cpu" else 1 << 26
    most = max(1, most // (channels * block * (segments.batch if side_by_side else 1)))
    table = segments.table()[:1] if side_by_side else segments.table()
    row, start, length, position = table.unbind(1)
    stop, counts = start + length, -(-length // block)
    segment, number = numbered(torch.arange(len(length))[:, None], 0, counts).unbind(1)
    last = number == counts[segment] - 1
    begin = start[segment] + number * block
    if to_end:
        begin = stop[segment] - (counts[segment] - number) * block
    # A window ends where what follows is elsewhere.
    apart = (row[1:] != row[:-1]) | (start[1:] != stop[:-1])
    cuts = [0, *(counts.cumsum(0)[:-1][apart]).tolist(), len(segment)]
    for a, b in zip(cuts, cuts[1:], strict=False):
        for i in range(a, b, most):
            j = min(i + most, b)
            here, fresh, only = segment[i:j], number[i:j] == 0, int(row[segment[i]])
            owner = here.repeat_interleave(block)
            steps = (begin[i:j, None] + torch.arange(block)).flatten()
            inside = (start[owner] <= steps) & (steps < stop[owner])
            write, pads = _true(inside), _true(~inside)
            bounds = slice(int(steps[write[0]]), int(steps[write[-1]]) + 1)
            read = (steps - bounds.start).where(inside, 0)
            pieces = list(_pieces(inside.view(-1, block), bounds.start))
            by_pieces = 2 * len(pieces) <= max(j - i, 4)
            yield Window(
                j - i,
                bounds,
                slice(None) if side_by_side else slice(only, only + 1),
                [k for k in _true(~fresh).tolist() if k],
                not fresh[0],
                1 + _true(fresh[1:]).to(device),
                [(k, int(here[k])) for k in _true(fresh & (position[here] > 0)).tolist()],
                [(k, int(here[k])) for k in _true(last[i:j]).tolist()],
                pieces,
                None if by_pieces else (read.to(device), pads.to(device), write.to(device)),
            )


def _pieces(inside: Tensor, step: int) -> Iterator[tuple[int, int, int, slice]]:
    """Window.pieces, where a mask [blocks, T] says which steps are there, from `step` on."""
    block, counts = inside.shape[1], inside.sum(1).tolist()
    skips = inside.int().argmax(1).tolist()
    k = 0
    while k < len(counts):
        blocks = 1
        if counts[k] == block:
            while k + blocks < len(counts) and counts[k + blocks] == block:
                blocks += 1
        steps = blocks * counts[k]
        yield k, blocks, skips[k], slice(step, step + steps)
        k, step = k + blocks, step + steps


def _true(mask: Tensor) -> Tensor:
    """Where a mask is true."""
    return mask.nonzero()[:, 0]


def gather(x: Tensor, window: Window, z: Tensor) -> None:
    """A window's values of x [length, batch, c] to z [blocks, rows, c, T]."""
    if window.indices is not None:
        read, pads, _ = window.indices
        x = x[window.steps, window.rows].index_select(0, read).index_fill_(0, pads, 0)
        z.copy_(x.unflatten(0, (window.blocks, -1)).permute(0, 2, 3, 1))
        return
    for k, blocks, skip, steps in window.pieces:
        piece, to = x[steps, window.rows], z[k : k + blocks]
        length = len(piece) // blocks
        if length < to.shape[3]:
            to.zero_()
        to = to[..., skip : skip + length]
        to.copy_(piece.unflatten(0, (blocks, length)).permute(0, 2, 3, 1))


def scatter(values: Tensor, window: Window, y: Tensor) -> None:
    """Matrices [c, blocks * rows, T] of channels to a window's places in y [length, batch, c]."""
    values = values.unflatten(1, (window.blocks, -1)).permute(1, 3, 2, 0)
    if window.indices is not None:
        values = values.to(y.dtype, memory_format=torch.contiguous_format).flatten(0, 1)
        y[window.steps, window.rows] = values.index_select(0, window.indices[2])
        return
    for k, blocks, skip, steps in window.pieces:
        piece = y[steps, window.rows]
        length = len(piece) // blocks
        piece = piece.unflatten(0, (blocks, length))
        piece.copy_(values[k : k + blocks, skip : skip + length])
