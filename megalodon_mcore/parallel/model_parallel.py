"""The groups a model is spread over, and what they make of a micro-batch."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection

from megalodon_mcore.parallel.documents import Documents
from megalodon_mcore.parallel.sequence_shards import SequenceShards, sequence_shards


class ModelParallel:
    """Tensor-parallel and context-parallel groups, and the order in which the latter cut.

    Attributes:
        documents: where documents start in the micro-batch at hand.
    """

    def __init__(
        self,
        pg_collection: ProcessGroupCollection,
        sequence_parallel: bool,
        sequence_order: str,
        documents: Documents,
    ) -> None:
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp
        self.sequence_parallel = sequence_parallel and self.tp_group.size() > 1
        self.sequence_order = sequence_order
        self.documents = documents
        self.tp_cp_group = pg_collection.tp_cp if self.sequence_parallel else None

    def residual_shards(self, length: int, batch: int) -> SequenceShards:
        """How the hidden states between layers are cut, of which a rank has [length, batch, D]."""
        if not self.sequence_parallel:
            return self.context_shards(length, batch)
        size = self.tp_group.size()
        return self._cut(length * size, batch, size)

    def context_shards(self, length: int, batch: int) -> SequenceShards:
        """How context parallelism alone cuts, where a rank has [length, batch, ...]."""
        return self._cut(length, batch, 1)

    def _cut(self, length: int, batch: int, sequence_parallel_size: int) -> SequenceShards:
        size = self.cp_group.size()
        group = self.cp_group if size > 1 else None
        if sequence_parallel_size > 1:
            group = self.tp_cp_group
        bounds = self.documents.bounds(length * size, batch)
        return sequence_shards(
            self.sequence_order, size, sequence_parallel_size, bounds, group, batch
        )
