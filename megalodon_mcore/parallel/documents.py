"""Where documents start in a micro-batch, as Megatron hands it over."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Documents:
    """The bounds of the micro-batch that is going through a model's layers.

    The layers of a model chunk and its final norm, which Megatron calls with hidden states alone,
    have one of these in common; each layer sets it before anything reads it.
    """

    def __init__(self) -> None:
        self._bounds: tuple[int, ...] | None = None

    def set(self, packed_seq_params: Any | None) -> None:
        """Takes a micro-batch's PackedSeqParams, or None where every row is one document.

        Raises:
            ValueError: its bounds are impossible.
        """
        self._bounds = None if packed_seq_params is None else _bounds_of(packed_seq_params)

    @property
    def packed(self) -> bool:
        """Whether the micro-batch is one row of several documents."""
        return self._bounds is not None

    def bounds(self, length: int, batch: int) -> tuple[int, ...]:
        """Where documents start, from 0 on, and the length, of sequences cut over all ranks.

        Raises:
            ValueError: documents are longer than the sequence, or there are several rows of them.
        """
        if self._bounds is None:
            return (0, length)
        last = self._bounds[-1]
        if last > length or batch != 1:
            raise ValueError(
                f"cu_seqlens ends at {last}; for {length} positions in {batch} rows it must end at "
                f"{length} at most, and packed rows must be one."
            )
        # What follows the last document is one more.
        return self._bounds if last == length else (*self._bounds, length)


def _bounds_of(packed_seq_params: Any) -> tuple[int, ...]:
    """The bounds in cu_seqlens_q_padded, else in cu_seqlens_q, and in nothing else."""
    known = vars(packed_seq_params).get("_document_bounds")
    if known is None:
        known = document_bounds(
            packed_seq_params.cu_seqlens_q
            if packed_seq_params.cu_seqlens_q_padded is None
            else packed_seq_params.cu_seqlens_q_padded
        )
        # Once a micro-batch, since a GPU's tensor has to be waited for.
        packed_seq_params._document_bounds = known
    return known


def document_bounds(cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Cumulative lengths [..., n] as increasing bounds; entries repeat where a document is empty.

    Raises:
        ValueError: there are none, they don't start at 0, or they fall.
    """
    if cu_seqlens is None:
        raise ValueError(
            "the batch is packed, but says nothing of its documents: cu_seqlens_q and "
            "cu_seqlens_q_padded are None; one of them must hold cumulative lengths."
        )
    given = cu_seqlens.flatten().tolist()
    if not given or given[0] != 0 or given != sorted(given):
        shown = given if len(given) <= 8 else f"{str(given[:8])[:-1]}, ...]"
        raise ValueError(f"cu_seqlens is {shown}; it must start at 0 and never fall.")
    bounds = tuple(dict.fromkeys(given))
    return bounds if len(bounds) > 1 else (0,)
