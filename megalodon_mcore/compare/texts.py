"""The data of a comparison: training and validation datasets, and long validation rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megalodon_mcore.data.metadata import PreparedData
from megalodon_mcore.data.prepare import prepare_data

SPLIT = "0.9,0.1,0"


def prepare(text: list[str], tokenizer: str, prefix: Path) -> PreparedData:
    """Writes the datasets, each file of `text` a document, unless they are there."""
    if not Path(f"{prefix}_meta.json").exists():
        prepare_data(text, prefix, tokenizer=tokenizer, split=SPLIT, overwrite=True)
    return PreparedData.load(prefix)


def documents(prefix: str) -> list[np.ndarray]:
    """The tokens of each document of an indexed dataset, int64."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    bounds = dataset.document_indices
    # Of pieces of the dataset's file, which is unmapped with it, copies.
    return [
        np.concatenate(dataset[int(a) : int(b)]).astype(np.int64)
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        if b > a
    ]


def long_rows(pieces: list[np.ndarray], rows: int, length: int) -> tuple[np.ndarray, int]:
    """Rows of `length` + 1 tokens, int64, and how many of them are of one document each.

    Parts of documents that are long enough come first, evenly chosen; the rest are shorter ones
    joined end to end.

    Raises:
        ValueError: there are not enough.
    """
    inside = [part for piece in pieces for part in _parts(piece, length)]
    found = inside[:: max(1, len(inside) // rows)][:rows]
    alone = len(found)
    short = [piece for piece in pieces if len(piece) <= length]
    found += _parts(np.concatenate([*short, np.zeros(0, np.int64)]), length)[: rows - alone]
    if len(found) < rows:
        raise ValueError(
            f"--rows is {rows} of {length} tokens (--seq-length x --times-longer), but "
            f"{sum(map(len, pieces)):,} validation tokens make {len(found)}; take fewer, or more "
            "--text."
        )
    return np.stack(found), alone


def _parts(tokens: np.ndarray, length: int) -> list[np.ndarray]:
    """All stretches of `length` + 1 tokens, each of which begins with the last one's end."""
    count = max(0, len(tokens) - 1) // length
    return [tokens[z * length : (z + 1) * length + 1] for z in range(count)]


def unigram_loss(train: list[np.ndarray], rows: np.ndarray, vocabulary: int) -> float:
    """Nats per token of `rows` under the shares of tokens in training data, each counted once more.

    A model that does not beat it has learned no context.
    """
    counts = 1.0 + sum(np.bincount(z, minlength=vocabulary) for z in train)
    return float(-np.log(counts / counts.sum())[rows[:, 1:]].mean())
