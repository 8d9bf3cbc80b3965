"""Blocks of rows that fit a CPU's cache, or a bounded share of a GPU's memory."""

from collections.abc import Iterator

import torch


def row_blocks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Cuts `rows` rows of `width` numbers each into consecutive ranges of bounded size."""
    numbers = 2**18 if device.type == "cpu" else 2**26
    size = max(1, numbers // max(1, width))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
