"""Writes Megatron's indexed datasets, from tokens and from pieces of another one's documents."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from megalodon_mcore.data.metadata import DatasetInfo
from megalodon_mcore.data.splitting import Piece

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

_LONGEST_DOCUMENT = 2**31 - 1


class IndexedWriter:
    """Writes one indexed dataset and counts what goes in."""

    def __init__(self, prefix: Path, dtype: type[np.number]) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._prefix, self.dtype = prefix, dtype
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        self.info = DatasetInfo(str(prefix), documents=0, sequences=0, tokens=0, bytes=0)

    def add(self, ids: np.ndarray, sequence_lengths: list[int]) -> None:
        """Adds a document of these sequences.

        Raises:
            ValueError: it is longer than the format allows.
        """
        if len(ids) > _LONGEST_DOCUMENT:
            raise ValueError(
                f"a document of {len(ids):,} tokens is longer than Megatron's format allows "
                f"({_LONGEST_DOCUMENT:,}); divide it with --documents paragraph or line"
            )
        self._builder.add_document(ids, sequence_lengths)
        self.info.documents += 1
        self.info.sequences += len(sequence_lengths)
        self.info.tokens += len(ids)

    def finish(self, text_bytes: int) -> DatasetInfo:
        """Writes the index; text_bytes is what the documents' text took."""
        self._builder.finalize(f"{self._prefix}.idx")
        self.info.bytes = text_bytes
        return self.info


def write_pieces(
    writer: IndexedWriter,
    tokens: "IndexedDataset",
    pieces: list[Piece],
    text_bytes: Sequence[int],
    append_eod: bool,
    progress: bool,
) -> DatasetInfo:
    """Copy pieces of documents. A piece cut off before the end of its document gets no
    end-of-document token, and its share of the document's bytes goes by tokens."""
    total_bytes = 0
    flat = np.asarray(np.memmap(f"{tokens.path_prefix}.bin", tokens.index.dtype, mode="r"))
    starts = np.concatenate([[0], np.cumsum(tokens.sequence_lengths, dtype=np.int64)])
    bounds = tokens.document_indices
    name = Path(writer.info.prefix).name
    for piece in tqdm(pieces, desc=f"writing {name}", file=sys.stderr, disable=not progress):
        ends = starts[bounds[piece.document] : bounds[piece.document + 1] + 1]
        first, last = int(ends[0]), int(ends[-1])
        lengths = [piece.stop - piece.start]
        if len(ends) > 2:  # several sequences
            lengths = np.diff((ends - first).clip(piece.start, piece.stop))
            lengths = lengths[lengths > 0].tolist()
        writer.add(flat[first + piece.start : first + piece.stop], lengths)
        content = max(last - first - append_eod, 1)
        size = text_bytes[piece.document]
        total_bytes += size * min(piece.stop, content) // content
        total_bytes -= size * min(piece.start, content) // content
    return writer.finish(total_bytes)


def document_lengths(tokens: "IndexedDataset") -> np.ndarray:
    """Tokens of every document, int64 [documents]."""
    ends = np.concatenate([[0], np.cumsum(tokens.sequence_lengths, dtype=np.int64)])
    return np.diff(ends[tokens.document_indices])
