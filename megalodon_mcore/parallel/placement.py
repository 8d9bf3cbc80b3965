"""Applies the table of parameters to a module's parameters on this rank.

Megatron's own layers mark and save what they hold whole or cut along one axis. This adds what they
do not know: channels, heads that ranks share, weights of several parts, gradients to be summed.
"""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import get_pg_rank
from torch import Tensor

from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.muon import Matrices
from megalodon_mcore.parallel.model_parallel import ModelParallel
from megalodon_mcore.parallel.shared_parameters import start_alike, sum_gradient_over
from megalodon_mcore.parallel.tensor_split import TensorSplit
from megalodon_mcore.parameters import Row, checkpoint_suffix, rows_by_parameter

Offsets = tuple[tuple[int, int, int], ...]
"""Megatron's sharded_offsets: (axis, place, places) of axes put before the tensor's own."""


class PlacedModule(MegatronModule):
    """A part of a layer, whose parameters ranks hold and checkpoints have as the table says.

    `prefix` is what its names have before them in the table, `symbol` that of its layers.
    """

    prefix: str
    symbol = "M"

    def __init__(
        self,
        config: TransformerConfig,
        megalodon: MegalodonConfig,
        pg_collection: ProcessGroupCollection,
        parallel: ModelParallel,
    ) -> None:
        super().__init__(config=config)
        self.megalodon, self.tp_group = megalodon, pg_collection.tp
        self.split = TensorSplit(pg_collection.tp, megalodon.num_heads, parallel.sequence_parallel)

    def mark_parameters(self) -> None:
        """Tells Megatron, Muon and autograd how ranks hold the parameters, once they are made."""
        config, split = self.megalodon, self.split
        for name, rows in rows_by_parameter(self.prefix, config, self.symbol).items():
            parameter, row = self.get_parameter(name), rows[0]
            shared = row.by_heads and split.shares_heads
            if parameter.dim() == 2 and not row.float32 and (len(rows) > 1 or shared):
                axis, parts = _parts(rows, config, split)
                ranks_per_part = split.ranks_per_head if shared else 1
                parameter.megalodon_matrices = Matrices(parts, axis, ranks_per_part)
            if split.size == 1:
                continue
            if _is_ours(row, split):
                # The gradient's norm adds parts up; of those that several ranks have one counts.
                parameter.tensor_model_parallel = not shared or split.rank_in_head == 0
                parameter.partition_dim, parameter.partition_stride = row.tp, 1
            if shared:
                start_alike(parameter, split.head_group())
            if row.gradient == "positions" and split.sequence_parallel:
                # Megatron sums it over the ranks, once a step.
                parameter.sequence_parallel = True
            if row.gradient == "parts" and (shared or row.tp is None):
                sum_gradient_over(parameter, split.head_group() if shared else split.group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict | None = None
    ) -> dict:
        """Megatron's entries of a checkpoint, with those that its defaults get wrong replaced."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        config, split, offsets = self.megalodon, self.split, sharded_offsets
        group = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
        for name, rows in rows_by_parameter(self.prefix, config, self.symbol).items():
            key, row = prefix + name, rows[0]
            if row.part is not None and row.part.axis == 1:
                _, columns = _parts(rows, config, split)
                suffixes = [checkpoint_suffix(row) for row in rows]
                sharded[key] = column_parts_factory(
                    sharded[key], columns, suffixes, split.rank, split.size, offsets
                )
            elif len(rows) > 1:
                sharded[key] = apply_swiglu_sharded_factory(sharded[key], offsets)
            elif _is_ours(row, split):
                place, places, replica = split.rank, split.size, 0
                if row.by_heads:
                    place, places = split.head_share, split.head_shares
                    replica = split.rank_in_head
                sharded[key] = ShardedTensor.from_rank_offsets(
                    key,
                    self.get_parameter(name),
                    *offsets,
                    (row.tp + len(offsets), place, places),
                    replica_id=(0, replica, get_pg_rank(group)),
                    prepend_axis_num=len(offsets),
                )
        return sharded


def _is_ours(row: Row, split: TensorSplit) -> bool:
    """Whether it is cut and in no layer of Megatron's that knows so."""
    return row.tp is not None and (row.float32 or (row.by_heads and split.shares_heads))


def _parts(rows: list[Row], config: MegalodonConfig, split: TensorSplit) -> tuple[int, list[int]]:
    """The axis along which this rank's parts lie side by side, and their extents."""
    axis = rows[0].part.axis if rows[0].part else rows[0].tp
    assert axis is not None
    ranks = split.head_shares if rows[0].by_heads else split.size
    return axis, [row.shape_in(config)[axis] // ranks for row in rows]


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
