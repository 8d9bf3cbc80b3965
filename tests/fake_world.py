"""One rank of a large world, alone in this process, over torch's fake process group.

Its collectives return at once and leave their outputs as they were. A rank's share of a model can
be built and run so, to see what it holds, keeps and sends; the values mean nothing.
"""

from collections import Counter
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalodon_mcore import cpu


@contextmanager
def fake_rank(layout, stage=0, tp_rank=0, cp_rank=0):
    """Megatron's process groups as one rank of this ParallelLayout has them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    stand_in = cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    # Megatron's default order of ranks: tp, cp, dp, pp from the fastest to the slowest.
    rank = tp_rank + layout.tp * (cp_rank + layout.cp * layout.dp * stage)
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=layout.ranks
    )
    try:
        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            context_parallel_size=layout.cp,
            create_gloo_process_groups=False,
        )
        assert parallel_state.get_tensor_model_parallel_rank() == tp_rank
        assert parallel_state.get_context_parallel_rank() == cp_rank
        assert parallel_state.get_pipeline_model_parallel_rank() == stage
        torch.manual_seed(1234)
        model_parallel_cuda_manual_seed(1234)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        stand_in.undo()


class KeptBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of the storages that autograd saves, a model's parameters aside."""

    def __init__(self, model):
        super().__init__(self._pack, lambda tensor: tensor)
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self._kept = {}

    @property
    def total(self):
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())

    def _pack(self, tensor):
        address = tensor.untyped_storage()._cdata
        if address not in self._parameters:
            # Holding the tensor keeps its storage's address from being given to another.
            self._kept[address] = tensor
        return tensor


class SentBytes(TorchDispatchMode):
    """Counts what this rank would send, were every collective a ring's."""

    def __init__(self):
        super().__init__()
        self.total = 0
        self.calls = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "c10d":
            self._count(operation.overloadpacket.__name__, args)
        return operation(*args, **(kwargs or {}))

    def _count(self, name, args):
        script_objects = [value for value in args if isinstance(value, torch.ScriptObject)]
        ranks = torch.distributed.ProcessGroup.unbox(script_objects[0]).size()
        written, read = args[0], args[1]
        if name.startswith("allreduce"):
            self.total += sum(2 * (ranks - 1) * _bytes(tensor) // ranks for tensor in written)
        else:
            # The whole tensor's share of one rank: what it puts in, or what it gets out.
            share = {
                "_allgather_base_": read,
                "allgather_into_tensor_coalesced_": read,
                "_reduce_scatter_base_": written,
                "reduce_scatter_tensor_coalesced_": written,
            }[name]
            tensors = share if isinstance(share, list) else [share]
            self.total += (ranks - 1) * sum(map(_bytes, tensors))
        self.calls[name, ranks] += 1


def _bytes(tensor):
    return tensor.numel() * tensor.element_size()
