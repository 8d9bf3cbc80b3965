"""Losses by a token's position in its document."""

from __future__ import annotations

import math

import numpy as np

BINS = 48
"""Bin 0 is position 0, bin b the positions from 2^(b-1) on, below 2^b."""


class PositionBins:
    """Sums over tokens, by powers of two of their positions.

    Args:
        sums: float64 [BINS], nats.
        tokens: int64 [BINS].
        sizes: int64 [BINS], bytes.
    """

    def __init__(
        self,
        sums: np.ndarray | None = None,
        tokens: np.ndarray | None = None,
        sizes: np.ndarray | None = None,
    ) -> None:
        self.sums = np.zeros(BINS) if sums is None else sums
        self.tokens = np.zeros(BINS, dtype=np.int64) if tokens is None else tokens
        self.sizes = np.zeros(BINS, dtype=np.int64) if sizes is None else sizes

    def add(self, first: int, losses: np.ndarray, sizes: np.ndarray) -> None:
        """Adds neighbouring tokens.

        Args:
            first: the position of the first of them.
            losses: float64 [n], nats.
            sizes: int64 [n], bytes.
        """
        bins = bins_of(np.arange(first, first + len(losses)))
        self.sums += np.bincount(bins, losses, BINS)
        self.tokens += np.bincount(bins, minlength=BINS)
        np.add.at(self.sizes, bins, sizes)

    def whole(self) -> dict[str, float | int | None]:
        """The scores of all tokens."""
        return scores(self.sums.sum(), self.tokens.sum(), self.sizes.sum())

    def rows(self) -> list[dict[str, float | int | None]]:
        """The scores of each bin that has tokens, with its first and last position."""
        bounds = [(0, 0), *((1 << b - 1, (1 << b) - 1) for b in range(1, BINS))]
        return [
            {"first": low, "last": high, **scores(*own)}
            for (low, high), *own in zip(bounds, self.sums, self.tokens, self.sizes, strict=True)
            if own[1]
        ]


def bins_of(positions: np.ndarray) -> np.ndarray:
    """Each position's bin: its number of binary digits."""
    return np.frexp(positions.astype(np.float64))[1]


def scores(nats: float, tokens: int, size: int) -> dict[str, float | int | None]:
    """Nats per token, perplexity and bits per byte of some text; None where there is none."""
    nats, tokens, size = float(nats), int(tokens), int(size)
    mean = nats / tokens if tokens else None
    return {
        "tokens": tokens,
        "bytes": size,
        "nats_per_token": mean,
        # Beyond the largest float64 there is no number for JSON.
        "perplexity": math.exp(mean) if tokens and mean < 709 else None,
        "bits_per_byte": nats / math.log(2) / size if size else None,
    }
