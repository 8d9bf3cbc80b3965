"""What of each document is read at once, and which of these side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from megalodon_mcore.data.sources import Document
from megalodon_mcore.scoring.text_tokens import DocumentTokenizer

LONGER = ("refuse", "cut", "split")
"""What is done with documents that are longer than the context."""


class Window(NamedTuple):
    """Tokens that are read with nothing before them."""

    document: int
    origin: str
    digest: str
    """Of all text up to this document's end."""
    first: int
    """The position of the first token that is scored."""
    tokens: np.ndarray
    """int64 [n + 1], the first of which is only read."""
    sizes: np.ndarray
    """int64 [n], bytes."""
    is_last: bool
    """Of its document."""


def windows(
    documents: Iterable[Document],
    tokenizer: DocumentTokenizer,
    begin: int,
    context: int | None,
    longer: str,
    after: tuple[int, int, str] = (0, 0, ""),
) -> Iterator[Window]:
    """The windows of documents in order; a document without tokens has one, of no token.

    Args:
        documents: of text.
        tokenizer: makes their tokens.
        begin: the token before each document.
        context: the most tokens in a window; None for whole documents.
        longer: one of LONGER; "split" begins each window but a document's first with the token
            before it.
        after: how many documents a stopped run had finished, how many tokens of the next one, and
            the digest up to the last it read. Those windows are left out.

    Raises:
        ValueError: a document is longer than the context, or is not what the stopped run read.
    """
    done, tokens_done, expected = after
    digest = hashlib.sha256()
    reached, number = done + bool(tokens_done), -1
    for number, document in enumerate(documents):
        text = document.text.encode("utf-8")
        digest.update(len(text).to_bytes(8, "little") + text)
        if number + 1 == reached and digest.hexdigest() != expected:
            raise ValueError(
                f"The text up to {document.origin} is not what the run to be resumed read; begin "
                "anew with --overwrite."
            )
        if number < done:
            continue
        ids, sizes = tokenizer(document.text, document.origin)
        row = np.concatenate([[begin], ids])
        stop, step = len(ids), context or max(1, len(ids))
        if stop > step:
            if longer == "refuse":
                raise ValueError(
                    f"{document.origin} has {stop} tokens and the model reads {step} at once; "
                    "give --longer-documents cut to score the first ones alone, or split to read "
                    "one window after another."
                )
            stop = step if longer == "cut" else stop
        for first in range(0, max(1, stop), step):
            last = min(first + step, stop)
            if number > done or last > tokens_done or not stop:
                yield Window(
                    number,
                    document.origin,
                    digest.hexdigest(),
                    first,
                    row[first : last + 1],
                    sizes[first:last],
                    last == stop,
                )
    if number + 1 < reached:
        raise ValueError(
            f"The run to be resumed had read {reached} documents and there are {number + 1}; "
            "begin anew with --overwrite."
        )


def batches(found: Iterable[Window], tokens_per_step: int, alone: bool) -> Iterator[list[Window]]:
    """Neighbouring windows that fit side by side, padded to the longest; longer ones by themselves.

    Args:
        found: the windows.
        tokens_per_step: the most tokens in a batch of several, padding included.
        alone: makes every window a batch.
    """
    batch: list[Window] = []
    longest = 0
    for window in found:
        length = len(window.sizes)
        fits = not alone and (len(batch) + 1) * max(longest, length) <= tokens_per_step
        if batch and not fits:
            yield batch
            batch, longest = [], 0
        batch.append(window)
        longest = max(longest, length)
    if batch:
        yield batch
