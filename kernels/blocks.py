"""Blocks of rows that fit a CPU's cache, or a bounded share of a GPU's memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .fuse import fuses


def row_blocks(rows: int, x: Tensor) -> Iterator[slice]:
    """Cuts x's `rows` rows into ranges of bounded size, or into one where loops are fused."""
    numbers = 2**18 if x.device.type == "cpu" else 2**26
    size = max(1, numbers * rows // max(1, x.numel()))
    if fuses(x):
        size = max(1, rows)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def place(whole: Tensor | None, like: Tensor, part: Tensor, *at: slice) -> Tensor:
    """`whole`, a tensor like `like` made by the first call, with `part` in its place.

    A part that is all of it becomes the whole without a copy.
    """
    if part.shape == like.shape and part.dtype == like.dtype:
        return part
    if whole is None:
        whole = torch.empty_like(like)
    whole[at] = part
    return whole
