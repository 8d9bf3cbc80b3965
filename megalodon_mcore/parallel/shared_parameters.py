"""Parameters that several tensor-parallel ranks hold alike, and how they stay alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter


def sum_gradient_over(parameter: Parameter, group: ProcessGroup) -> None:
    """Sums the parameter's gradient over a group in every backward pass.

    For parameters of which each rank of the group sees another share of the gradient, where
    Megatron's own reduction does not reach: it knows whole tensor-parallel groups under sequence
    parallelism and nothing else.
    """

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient, group=group)
        return gradient

    if group.size() > 1:
        parameter.register_hook(summed)


def start_alike(parameter: Parameter, group: ProcessGroup) -> None:
    """Gives every rank of a group the first one's values."""
    if group.size() > 1 and not parameter.is_meta:
        first = torch.distributed.get_process_group_ranks(group)[0]
        torch.distributed.broadcast(parameter.data, src=first, group=group)


def mark_sequence_parallel(module: torch.nn.Module) -> None:
    """Lets Megatron sum the gradients of these parameters over tensor-parallel ranks.

    It does so once per step and under --sequence-parallel only, where each rank applies the
    parameters to other positions.
    """
    for parameter in module.parameters(recurse=False):
        parameter.sequence_parallel = True
