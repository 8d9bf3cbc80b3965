"""The groups a model is spread over, and what they make of a sequence."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection

from megalodon_mcore.parallel.sequence_layout import (
    context_parallel_layout,
    sequence_parallel_layout,
)
from megalodon_mcore.parallel.sequence_shards import SequenceShards


class ModelParallel:
    """Tensor-parallel and context-parallel groups, and the order in which the latter cut."""

    def __init__(
        self,
        pg_collection: ProcessGroupCollection,
        sequence_parallel: bool,
        sequence_order: str,
    ) -> None:
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp
        self.sequence_parallel = sequence_parallel and self.tp_group.size() > 1
        self.sequence_order = sequence_order
        self.tp_cp_group = pg_collection.tp_cp if self.sequence_parallel else None
        self._shards: dict[tuple[bool, int], SequenceShards] = {}

    def residual_shards(self, local_length: int) -> SequenceShards | None:
        """How the hidden states between layers are cut; None where each rank has all."""
        if not self.sequence_parallel:
            return self.context_shards(local_length)
        return self._cut(True, local_length * self.tp_group.size())

    def context_shards(self, local_length: int) -> SequenceShards | None:
        """How context parallelism alone cuts; None without it."""
        return self._cut(False, local_length) if self.cp_group.size() > 1 else None

    def _cut(self, over_tensor_parallel: bool, context_length: int) -> SequenceShards:
        key = (over_tensor_parallel, context_length)
        if key not in self._shards:
            layout = context_parallel_layout(
                self.sequence_order, self.cp_group.size(), context_length
            )
            group = self.cp_group
            if over_tensor_parallel:
                layout = sequence_parallel_layout(layout, self.tp_group.size())
                group = self.tp_cp_group
            self._shards[key] = SequenceShards(layout, group)
        return self._shards[key]
