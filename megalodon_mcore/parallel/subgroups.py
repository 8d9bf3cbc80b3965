"""Process groups that Megatron has no name for, made once each."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

_made: tuple[ProcessGroup | None, dict[tuple[int, ...], ProcessGroup]] = (None, {})


def subgroup(ranks: tuple[int, ...]) -> ProcessGroup:
    """The group of these global ranks; only they need to call this."""
    global _made
    world = torch.distributed.group.WORLD
    if _made[0] is not world:
        _made = (world, {})
    groups = _made[1]
    if ranks not in groups:
        groups[ranks] = torch.distributed.new_group(list(ranks), use_local_synchronization=True)
    return groups[ranks]
