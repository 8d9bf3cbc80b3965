"""Entries of Megatron's distributed checkpoints for tensors that Megatron's defaults don't cover.

In a checkpoint every tensor is whole, so any layout can load what any other has saved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import get_pg_rank
from torch import Tensor

Offsets = tuple[tuple[int, int, int], ...]
"""Megatron's sharded_offsets: (axis, place, places) of axes put before the tensor's own."""


class TensorShare(NamedTuple):
    """Part `place` of `places` equal ones along `axis`; `replica` counts who holds the same."""

    axis: int
    place: int
    places: int
    replica: int


def sharded_module(
    module: torch.nn.Module,
    prefix: str,
    share: TensorShare,
    offsets: Offsets,
    metadata: dict | None,
) -> dict[str, ShardedTensor]:
    """Entries for all tensors of a module that are shared out alike, the extra state aside.

    A tensor with no such axis (a bias beside a weight cut along axis 1) must not be among them.
    """
    group = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
    tensors = module.state_dict(keep_vars=True)
    return {
        f"{prefix}{name}": ShardedTensor.from_rank_offsets(
            f"{prefix}{name}",
            tensor,
            *offsets,
            (share.axis + len(offsets), share.place, share.places),
            replica_id=(0, share.replica, get_pg_rank(group)),
            prepend_axis_num=len(offsets),
        )
        for name, tensor in tensors.items()
        # Transformer Engine's is a tensor, of bytes.
        if isinstance(tensor, Tensor) and not name.endswith("_extra_state")
    }


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
