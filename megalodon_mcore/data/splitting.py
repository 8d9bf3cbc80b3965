"""Deals documents out to training, validation and test."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPLIT_NAMES = ("train", "valid", "test")


@dataclass(frozen=True)
class Piece:
    """Tokens `start` to `stop` of a document."""

    document: int
    start: int
    stop: int


def parse_split(text: str) -> list[float]:
    """The shares that a text such as "0.9,0.05,0.05" or "90,5,5" means; they sum to one."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    valid = 1 <= len(shares) <= 3 and all(0 <= share < float("inf") for share in shares)
    if not valid or shares[0] == 0:
        raise ValueError(
            f"--split {text!r}: give the shares of training, validation and test data, such as "
            "0.9,0.05,0.05; none may be negative and that of training not zero"
        )
    shares += [0.0] * (3 - len(shares))
    return [share / sum(shares) for share in shares]


def plan_split(
    lengths: Sequence[int] | np.ndarray, shares: Sequence[float], seed: int
) -> list[list[Piece]]:
    """Deal documents out, by tokens rather than by number of documents.

    The documents are shuffled, laid end to end, and the line of tokens is cut at the shares. A
    document that lies across a cut goes whole to the side that holds its middle, as long as
    every split then gets at least half of its share. If not (a few documents, or one huge one),
    the documents across a cut are cut there too: at most one for each cut, and one document alone
    gives its beginning to training and its end to test. Inside a split the documents keep the
    order of the input.

    Args:
        lengths: tokens in each document.
        shares: the shares of the splits, summing to one.
        seed: of the shuffle.

    Returns:
        For each share the pieces of that split, empty where the share is zero.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.random.RandomState(seed).permutation(len(lengths))  # this stream never changes
    ends = np.cumsum(lengths[order])
    starts = ends - lengths[order]
    total = int(ends[-1]) if len(ends) else 0
    cuts = [round(total * share) for share in np.cumsum(shares)]
    cuts[-1] = total
    owners = np.searchsorted(np.array(cuts) * 2, starts + ends, side="right")
    received = np.bincount(owners, weights=lengths[order], minlength=len(shares))
    if all(got >= total * share / 2 for got, share in zip(received, shares, strict=True)):
        splits = [
            [Piece(int(order[place]), 0, int(lengths[order[place]])) for place in places]
            for places in (np.flatnonzero(owners == split) for split in range(len(shares)))
        ]
    else:
        splits = []
        for low, high in zip([0, *cuts[:-1]], cuts, strict=True):
            inside = np.flatnonzero((ends > low) & (starts < high))
            splits.append(
                [
                    Piece(
                        int(order[place]),
                        int(max(low - starts[place], 0)),
                        int(min(high - starts[place], lengths[order[place]])),
                    )
                    for place in inside
                    if high > low
                ]
            )
    for name, share, pieces in zip(SPLIT_NAMES, shares, splits, strict=True):
        if share > 0 and not pieces:
            raise ValueError(
                f"--split {','.join(f'{share:g}' for share in shares)}: {total} tokens are too "
                f"few to give the {name} data any; give more text or a larger share"
            )
    return [sorted(pieces, key=lambda piece: piece.document) for pieces in splits]
