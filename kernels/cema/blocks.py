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
    indices: tuple[Tensor, Tensor, Tensor] | None
    """Where some only fill a block up: of each of the blocks' steps which of `steps` it is; which
    fill a block up; and which do not."""


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
            yield Window(
                j - i,
                bounds,
                slice(None) if side_by_side else slice(only, only + 1),
                [k for k in _true(~fresh).tolist() if k],
                not fresh[0],
                1 + _true(fresh[1:]).to(device),
                [(k, int(here[k])) for k in _true(fresh & (position[here] > 0)).tolist()],
                [(k, int(here[k])) for k in _true(last[i:j]).tolist()],
                None if len(pads) == 0 else (read.to(device), pads.to(device), write.to(device)),
            )


def _true(mask: Tensor) -> Tensor:
    """Where a mask is true."""
    return mask.nonzero()[:, 0]


def gather(x: Tensor, window: Window, z: Tensor) -> None:
    """A window's values of x [length, batch, c] to z [blocks, rows, c, T]."""
    x = x[window.steps, window.rows]
    if window.indices is not None:
        read, pads, _ = window.indices
        x = x.index_select(0, read).index_fill_(0, pads, 0)
    z.copy_(x.unflatten(0, (window.blocks, -1)).permute(0, 2, 3, 1))


def scatter(values: Tensor, window: Window, y: Tensor) -> None:
    """Matrices [c, blocks * rows, T] of channels to a window's places in y [length, batch, c]."""
    values = values.unflatten(1, (window.blocks, -1)).permute(1, 3, 2, 0)
    y = y[window.steps, window.rows]
    if window.indices is None:
        y.unflatten(0, (window.blocks, -1)).copy_(values)
    else:
        values = values.to(y.dtype, memory_format=torch.contiguous_format).flatten(0, 1)
        y.copy_(values.index_select(0, window.indices[2]))
