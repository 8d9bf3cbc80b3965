"""Counts the bytes that a rank's collectives send, by what a ring needs for them."""

from collections import Counter
from math import prod
from typing import Any

import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Within it, `sent` adds up bytes by (kind of collective, "tensor" or "context" group)."""

    def __init__(self, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self._tensor_parallel = set(dist.get_process_group_ranks(tp_group))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        group = next(
            dist.ProcessGroup.unbox(arg)
            for arg in args
            if isinstance(arg, torch.ScriptObject)
            if "ProcessGroup" in str(arg._type())
        )
        size = group.size()
        share = (size - 1) / size
        if name == "_allgather_base_":
            sent = share * size_of(args[0])
        elif name == "_reduce_scatter_base_":
            sent = share * size_of(args[1])
        elif name == "allreduce_":
            sent = 2 * share * sum(size_of(tensor) for tensor in args[0])
        elif name == "alltoall_base_":
            rows = size_of(args[1]) // max(args[1].shape[0], 1)
            splits = args[4]
            sent = rows * (sum(splits) - splits[group.rank()])
        else:
            raise AssertionError(f"{name} is not counted")
        ranks = set(dist.get_process_group_ranks(group))
        where = "tensor" if ranks <= self._tensor_parallel else "context"
        if size > 1:
            self.sent[name.strip("_"), where] += round(sent)
            self.calls[name.strip("_"), where] += 1


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor."""
    return prod(tensor.shape) * tensor.element_size()
