"""Process groups that Megatron has no name for, and what else is made once in a world of ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch.distributed import ProcessGroup


def once_in_a_world[**P, T](function: Callable[P, T]) -> Callable[P, T]:
    """Keeps what a function returned last, as long as the process groups of that time are there.

    Every group has threads of its own, which its world's end would leave running where it is kept.
    """
    made: WeakKeyDictionary[object, Callable[P, T]] = WeakKeyDictionary()

    @functools.wraps(function)
    def kept(*args: P.args, **kwargs: P.kwargs) -> T:
        world = torch.distributed.group.WORLD or function
        if world not in made:
            made[world] = functools.lru_cache(maxsize=128)(function)
        return made[world](*args, **kwargs)

    return kept


@once_in_a_world
def subgroup(ranks: tuple[int, ...]) -> ProcessGroup:
    """The group of these global ranks; only they need to call this."""
    group = torch.distributed.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, ProcessGroup)
    return group
