"""Every parameter's gradient, put together from what each rank holds of it.

The model's sharded_state_dict says which part of which parameter a rank has; it is what checkpoints
are cut by, so a wrong entry shows here as well as a wrong gradient.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
)
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from distributed.checkpoints import sharded_state


class Shard(NamedTuple):
    """A part of a parameter's gradient; `index` is where it lies in the whole."""

    key: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...]
    data: Tensor


def gradient_shards(chunks: list[DistributedDataParallel]) -> list[Shard]:
    """The gradients on this rank; DDP has reduced them, and the optimizer has not stepped."""
    for chunk in chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            gather_reduced(chunk)
    state = {
        "gradients": [
            with_gradient(part)
            for part in nested_values(sharded_state(chunks, None, is_loading=False))
            if isinstance(part, ShardedTensor | ShardedTensorFactory)
        ]
    }
    apply_factories(state)
    return [
        Shard(part.key, part.global_shape, place(part), part.data.clone())
        for part in nested_values(state)
    ]


def place(part: ShardedTensor) -> tuple[int | slice, ...]:
    """Where the part lies in the whole tensor; along prepended axes it has no extent."""
    before = part.prepend_axis_num
    extents = zip(part.global_offset[before:], part.local_shape, strict=True)
    return (*part.global_offset[:before], *(slice(start, start + n) for start, n in extents))


def with_gradient(part: ShardedTensor | ShardedTensorFactory):
    """The same part of a parameter's gradient, which DDP keeps in float32."""
    gradient = part.data.main_grad
    dtype = {"dtype": gradient.dtype} if isinstance(part, ShardedTensor) else {}
    return replace(part, data=gradient, **dtype)


def gather_reduced(chunk: DistributedDataParallel) -> None:
    """Gives every rank what the distributed optimizer leaves reduced on only one of them."""
    for group in chunk.bucket_groups:
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            mine = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=ranks)


def assemble(ranks: list[list[Shard]]) -> dict[str, Tensor]:
    """Whole gradients by the parameter's key in a checkpoint.

    Fails where a part is missing, or two ranks hold the same part with different values.
    """
    wholes: dict[str, Tensor] = {}
    for shard in (shard for shards in ranks for shard in shards):
        whole = wholes.setdefault(shard.key, torch.full(shard.shape, torch.nan))
        assert whole.shape == shard.shape, f"{shard.key} has two shapes"
        there = whole[shard.index]
        if not there.isnan().all():
            assert torch.equal(there, shard.data), f"{shard.key}: replicas differ at {shard.index}"
        whole[shard.index] = shard.data
    for key, whole in wholes.items():
        assert not whole.isnan().any(), f"nobody has all of {key}"
    return wholes
