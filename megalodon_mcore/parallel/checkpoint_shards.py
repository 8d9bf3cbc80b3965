"""Entries of Megatron's distributed checkpoints for tensors that Megatron's defaults don't cover.

In a checkpoint every tensor is whole, so any layout can load what any other has saved.
"""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory
from torch import Tensor

Offsets = tuple[tuple[int, int, int], ...]
"""Megatron's sharded_offsets: (axis, place, places) of axes put before the tensor's own."""


def column_parts_factory(
    whole: ShardedTensor,
    columns: list[int],
    suffixes: list[str],
    place: int,
    places: int,
    offsets: Offsets,
) -> ShardedTensorFactory:
    """Saves column ranges of a weight as tensors of their own, each cut along its columns.

    Args:
        whole: Megatron's entry for this rank's weight [out, sum(columns)].
        columns: widths of this rank's ranges.
        suffixes: what each range's name in the checkpoint ends with.
        place: this rank's part of each range.
        places: how many ranks share each.
        offsets: Megatron's sharded_offsets.
    """

    @torch.no_grad()
    def build(
        key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: slice | None
    ) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(
                key + suffix,
                part,
                *offsets,
                (1 + len(offsets), place, places),
                replica_id=replica_id,
                prepend_axis_num=len(offsets),
            )
            for suffix, part in zip(suffixes, tensor.split(columns, dim=1), strict=True)
        ]

    @torch.no_grad()
    def merge(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=1)

    return ShardedTensorFactory(whole.key, whole.data, build, merge, whole.replica_id)
