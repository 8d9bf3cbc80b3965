"""The same global batch in every layout: each rank's micro-batches of it."""

from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from distributed.layouts import Layout, Model


def micro_batches(model: Model, layout: Layout, step: int) -> Iterator[dict[str, Tensor]]:
    """This rank's tokens and labels [batch, length] of a step."""
    generator = torch.Generator().manual_seed(step)
    shape = (model.global_batch, model.sequence_length + 1)
    stream = torch.randint(model.vocab_size, shape, generator=generator)
    mine = stream.chunk(layout.dp)[parallel_state.get_data_parallel_rank()]
    for rows in mine.split(model.micro_batch):
        whole = {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}
        yield cut_sequence(whole, layout)


def cut_sequence(batch: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The part of [batch, length] tensors that this context-parallel rank has."""
    if layout.sequence_order == "zigzag":
        return get_batch_on_this_cp_rank(
            batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
        )
    rank = parallel_state.get_context_parallel_rank()
    return {
        name: tensor.chunk(layout.cp, dim=1)[rank].contiguous() for name, tensor in batch.items()
    }


def number_of_micro_batches(model: Model, layout: Layout) -> int:
    """How many of them each rank has."""
    return model.global_batch // (layout.dp * model.micro_batch)
