"""Where documents start in a micro-batch, and how it was cut, as Megatron hands it over."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megalodon_mcore.parallel.sequence_layout import DOCUMENT_ZIGZAG, sequence_layout

PARTITION_MODES = ("contiguous", "zigzag")
"""What PackedSeqParams.cp_partition_mode may be, where it is: Megatron-LM's dev branch has it.

There zigzag cuts every packed sequence apart, and is what whoever says nothing gets.
"""
INTEGERS = (torch.int32, torch.int64)


class MicroBatch(NamedTuple):
    """What a PackedSeqParams says of a micro-batch."""

    bounds: tuple[int, ...] | None = None
    """Where documents start, in the one row that all are put into; None: each is a document."""
    row_length: int | None = None
    """Positions of each of those rows, where it is said."""
    partition_mode: str | None = None
    """One of PARTITION_MODES, where it is said."""


class Documents:
    """The bounds of the micro-batch that is going through a model's layers.

    The layers of a model chunk and its final norm, which Megatron calls with hidden states alone,
    have one of these in common; each layer sets it before anything reads it.
    """

    def __init__(self) -> None:
        self._micro_batch = MicroBatch()

    def set(self, packed_seq_params: Any | None, cp_group: ProcessGroup) -> None:
        """Takes a micro-batch's PackedSeqParams, or None where every row is one document.

        Raises:
            ValueError: its bounds are impossible, or it was cut over another group or in a way
                that nothing here knows.
        """
        if packed_seq_params is None:
            self._micro_batch = MicroBatch()
            return
        known = vars(packed_seq_params).get("_megalodon_micro_batch")
        if known is None:
            _check_group(packed_seq_params, cp_group)
            known = _read(packed_seq_params)
            # Once a micro-batch, since a GPU's tensor has to be waited for.
            packed_seq_params._megalodon_micro_batch = known
        self._micro_batch = known

    @property
    def packed(self) -> bool:
        """Whether the micro-batch is one row of several documents."""
        return self._micro_batch.bounds is not None

    def order(self, usual: str) -> str:
        """The order in which the micro-batch was cut: `usual`, unless it says another."""
        mode = self._micro_batch.partition_mode
        if mode is None or usual.endswith(mode):
            return usual
        return DOCUMENT_ZIGZAG if mode == "zigzag" else mode

    def rows(self, length: int, batch: int) -> int:
        """Rows that a packed one was put together from; `batch` where that is not said.

        Args:
            length: of the sequences before they were cut.
            batch: how many of those there are in the tensor at hand.
        """
        row_length = self._micro_batch.row_length
        if row_length is None or length * batch % row_length:
            return batch
        return length * batch // row_length

    def bounds(self, length: int, batch: int) -> tuple[int, ...]:
        """Where documents start, from 0 on, and the length, of sequences cut over all ranks.

        Raises:
            ValueError: documents are longer than the sequence, or there are several rows of them.
        """
        given = self._micro_batch.bounds
        if given is None:
            return (0, length)
        if given[-1] > length or batch != 1:
            raise ValueError(
                f"cu_seqlens ends at {given[-1]}; for {length} positions in {batch} rows it must "
                f"end at {length} at most, and packed rows must be one."
            )
        return _closed(given, length)


def _read(packed_seq_params: Any) -> MicroBatch:
    """Bounds in cu_seqlens_q_padded, else in cu_seqlens_q, and in nothing else."""
    cu_seqlens = packed_seq_params.cu_seqlens_q_padded
    if cu_seqlens is None:
        cu_seqlens = packed_seq_params.cu_seqlens_q
    mode = getattr(packed_seq_params, "cp_partition_mode", None)
    if mode not in (None, *PARTITION_MODES):
        raise ValueError(
            f"cp_partition_mode is {mode!r}; Megalodon takes {' or '.join(PARTITION_MODES)}."
        )
    if cu_seqlens is None and packed_seq_params.qkv_format == "sbhd":
        # Megatron-LM's dev branch makes one to say how plain rows were cut.
        return MicroBatch(partition_mode=mode)
    row_length = getattr(packed_seq_params, "tokens_per_sample", None)
    return MicroBatch(document_bounds(cu_seqlens), row_length, mode)


def _check_group(packed_seq_params: Any, cp_group: ProcessGroup) -> None:
    size, group = packed_seq_params.local_cp_size, packed_seq_params.cp_group
    if size is None and group is not None:
        size = group.size()
    if size in (None, cp_group.size()) and (
        group is None or group is cp_group or _ranks(group) == _ranks(cp_group)
    ):
        return
    raise ValueError(
        f"the micro-batch was cut over {size} ranks of its own (local_cp_size, cp_group), and the "
        f"model's --context-parallel-size is {cp_group.size()}; leave out "
        "--hybrid-context-parallel, which changes the ranks from batch to batch."
    )


def _ranks(group: ProcessGroup) -> list[int]:
    return torch.distributed.get_process_group_ranks(group)


def document_bounds(cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Cumulative lengths [n] or [1, n] as increasing bounds; entries repeat where none follows.

    Raises:
        ValueError: there are none, they are no integers, don't start at 0, or fall.
    """
    if cu_seqlens is None:
        raise ValueError(
            "the batch is packed, but says nothing of its documents: cu_seqlens_q and "
            "cu_seqlens_q_padded are None; one of them must hold cumulative lengths."
        )
    rows = cu_seqlens.shape[:-1].numel()
    if cu_seqlens.dtype not in INTEGERS or not cu_seqlens.dim() or rows != 1:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; it must be "
            "int32 or int64, of shape [n] or [1, n]."
        )
    given = cu_seqlens.flatten().tolist()
    if not given or given[0] != 0 or given != sorted(given):
        shown = given if len(given) <= 8 else f"{str(given[:8])[:-1]}, ...]"
        raise ValueError(f"cu_seqlens is {shown}; it must start at 0 and never fall.")
    return tuple(dict.fromkeys(given))


def _closed(bounds: tuple[int, ...], length: int) -> tuple[int, ...]:
    """Bounds that end at the length: what follows the last document is one more."""
    return bounds if bounds[-1] == length else (*bounds, length)


def partitioned_indices(cu_seqlens: Tensor, total_tokens: int, size: int, rank: int) -> Tensor:
    """Which positions of a packed row a context-parallel rank holds, int32 [total_tokens / size].

    What thd_get_partitioned_indices of Transformer Engine returns: every document in zigzag.

    Args:
        cu_seqlens: cumulative lengths [n].
        total_tokens: positions of the row; those after the last document are one more.
        size: ranks that share the row.
        rank: the one whose positions are asked for.

    Raises:
        ValueError: the bounds are impossible, or a document can't be cut into 2 * size parts.
    """
    bounds = document_bounds(cu_seqlens)
    if bounds[-1] > total_tokens:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]}, but the row has {total_tokens} tokens.")
    layout = sequence_layout(DOCUMENT_ZIGZAG, size, 1, _closed(bounds, total_tokens))
    parts = [torch.arange(span.start, span.stop, device="cpu") for span in layout.spans[rank]]
    return torch.cat(parts).to(torch.int32).to(cu_seqlens.device)
