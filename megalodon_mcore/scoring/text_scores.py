"""One pass over documents, stopped and resumed anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megalodon_mcore.hf.state_file import cache_with, remembered
from megalodon_mcore.scoring.causal_models import CausalModel
from megalodon_mcore.scoring.losses import batch_losses, piece_losses
from megalodon_mcore.scoring.position_bins import PositionBins, scores
from megalodon_mcore.scoring.run_folder import RunFolder
from megalodon_mcore.scoring.windows import Window, batches


class TextScores:
    """Scores windows in order and remembers how far it is.

    Memory does not grow with a document's length, but for its tokens, where the model streams.

    Args:
        causal: the model.
        folder: keeps the state; what an earlier run saved there is gone on from.
        carry: a document goes on with the model's state after the one before; needs a model that
            streams.
        tokens_per_step: the most tokens of a batch of windows, and in a piece of a longer one.
        show: is given the bytes of text that were scored.

    Attributes:
        bins: sums by position.
        documents: origin, nats, tokens and bytes of each document begun.
        after: where windows have to go on: documents done, tokens done of the next one, and the
            digest of the text read.
    """

    def __init__(
        self,
        causal: CausalModel,
        folder: RunFolder,
        carry: bool,
        tokens_per_step: int,
        show: Callable[[int], object] = lambda count: None,
    ) -> None:
        self.causal, self.folder, self.carry = causal, folder, carry
        self.tokens_per_step, self.show = tokens_per_step, show
        held = folder.state
        sums, tokens, sizes = held.get("bins") or (None, None, None)
        self.bins = PositionBins()
        if held:
            self.bins = PositionBins(
                np.array(sums), np.array(tokens, np.int64), np.array(sizes, np.int64)
            )
        self.documents: list[list[Any]] = held.get("documents", [])
        self.after: tuple[int, int, str] = tuple(held.get("after", (0, 0, "")))
        # The token that the model has not read yet, though it is the stream's last.
        self.last: int | None = held.get("last")
        self.cache = cache_with(causal.model, folder.arrays) if causal.streams else None

    def run(self, found: Iterator[Window]) -> None:
        """Scores the windows that `after` leaves.

        Args:
            found: the windows.

        Raises:
            ValueError: a loss is no number.
        """
        for batch in batches(found, self.tokens_per_step, self.carry):
            longest = max(len(window.sizes) for window in batch)
            if longest and self.causal.streams and (self.carry or longest > self.tokens_per_step):
                # It is alone.
                self._stream(batch[0])
                self._finish(batch[0])
            else:
                self._side_by_side(batch)
            if self.folder.due():
                self.save()
        self.save()

    def _side_by_side(self, batch: list[Window]) -> None:
        rows = [window.tokens for window in batch if len(window.sizes)]
        losses = iter(batch_losses(self.causal.model, rows) if rows else [])
        for window in batch:
            if len(window.sizes):
                self._add(window, 0, next(losses))
            self._finish(window)

    def _stream(self, window: Window) -> None:
        row, lead = window.tokens, 0
        if self.carry and self.last is not None:
            # What begins the document follows the last one's last token and is not scored.
            row, lead = np.concatenate([[self.last], row]), 1
        start = 0
        if window.document == self.after[0] and self.after[1] > window.first:
            start = self.after[1] - window.first + lead
        elif not self.carry:
            self.cache = cache_with(self.causal.model, {})
        size = self.tokens_per_step
        for begin in range(start, len(row) - 1, size):
            losses = piece_losses(self.causal.model, self.cache, row[begin : begin + size + 1])
            skip = max(0, lead - begin)
            self._add(window, begin + skip - lead, losses[skip:])
            if self.folder.due():
                self.save()
        if not self.carry:
            self.cache = None

    def _add(self, window: Window, start: int, losses: np.ndarray) -> None:
        """Adds losses of a window's tokens from number `start` on."""
        if not np.isfinite(losses).all():
            raise ValueError(
                f"The model's loss is no number in {window.origin}, at its token "
                f"{window.first + start + int(np.argmin(np.isfinite(losses)))}."
            )
        sizes = window.sizes[start : start + len(losses)]
        first = window.first + start
        self.bins.add(first, losses, sizes)
        own = self._document(window)
        own[1] += float(losses.sum())
        own[2] += len(losses)
        own[3] += int(sizes.sum())
        self.after = (window.document, first + len(losses), window.digest)
        self.show(int(sizes.sum()))

    def _finish(self, window: Window) -> None:
        self._document(window)
        if len(window.tokens) > 1:
            self.last = int(window.tokens[-1])
        if window.is_last:
            self.after = (window.document + 1, 0, window.digest)

    def _document(self, window: Window) -> list[Any]:
        if len(self.documents) <= window.document:
            self.documents.append([window.origin, 0.0, 0, 0])
        return self.documents[window.document]

    def save(self) -> None:
        """Writes the state."""
        bins = [z.tolist() for z in (self.bins.sums, self.bins.tokens, self.bins.sizes)]
        state = {
            "bins": bins,
            "documents": self.documents,
            "after": self.after,
            "last": self.last,
        }
        held = {} if self.cache is None else remembered(self.cache, self.causal.model)
        self.folder.save(state, held)

    def results(self) -> dict[str, Any]:
        """The scores of everything, of position bins and of documents."""
        return {
            "whole": self.bins.whole(),
            "positions": self.bins.rows(),
            "documents": [{"origin": origin, **scores(*own)} for origin, *own in self.documents],
        }
