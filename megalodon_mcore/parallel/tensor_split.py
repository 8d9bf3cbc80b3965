"""How the mixer's channels, heads and value columns lie over tensor-parallel ranks."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed import ProcessGroup

from megalodon_mcore.parallel.subgroups import subgroup


class TensorSplit:
    """A rank's share of a mixer.

    Heads go to ranks in order. With more ranks than heads, consecutive ranks share a head: each
    has all of its queries and keys and some of its value columns.
    """

    def __init__(self, group: ProcessGroup, num_heads: int, sequence_parallel: bool) -> None:
        self.group = group
        self.size, self.rank = group.size(), group.rank()
        self.sequence_parallel = sequence_parallel
        self.ranks_per_head = max(1, self.size // num_heads)
        self.heads = max(1, num_heads // self.size)
        self.head_shares = self.size // self.ranks_per_head
        """Parts that queries and keys are cut into: the ranks, or the heads if those are fewer."""
        self.head_share = self.rank // self.ranks_per_head
        self.rank_in_head = self.rank % self.ranks_per_head

    @property
    def shares_heads(self) -> bool:
        """Whether other ranks have the queries and keys of this rank's head."""
        return self.ranks_per_head > 1

    def own_channels(self, x: Tensor) -> Tensor:
        """This rank's part of [..., channels], a view."""
        return x.chunk(self.size, dim=-1)[self.rank] if self.size > 1 else x

    def whole_sequence(self, x: Tensor) -> Tensor:
        """The input of ranks that each compute a part from all of it; gradients are summed.

        [length, batch, channels]: gathered along the sequence under sequence parallelism, with a
        reduce-scatter backward; as it is otherwise, with an all-reduce backward.
        """
        if self.size == 1:
            return x
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(x, group=self.group)
        return tensor_parallel.copy_to_tensor_model_parallel_region(x, group=self.group)

    def all_channels(self, x: Tensor) -> Tensor:
        """Every rank's part of the channels side by side; gradients are summed and scattered."""
        if self.size == 1:
            return x
        return tensor_parallel.all_gather_last_dim_from_tensor_parallel_region(x, group=self.group)

    def head_group(self) -> ProcessGroup:
        """The ranks that share this rank's head."""
        ranks = torch.distributed.get_process_group_ranks(self.group)
        first = self.rank - self.rank_in_head
        return subgroup(tuple(ranks[first : first + self.ranks_per_head]))

    def own_group(self) -> ProcessGroup:
        """This rank alone: the group of a layer that holds a whole weight."""
        return subgroup((torch.distributed.get_rank(),))
