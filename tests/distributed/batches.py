"""The same global batch in every layout: each rank's micro-batches of it."""

import random
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.utils import flatten_batch_for_packed_sequences, get_batch_on_this_cp_rank
from torch import Tensor

from distributed.layouts import Layout, Model


def micro_batches(model: Model, layout: Layout, step: int) -> Iterator[dict[str, Tensor]]:
    """This rank's tokens and labels [batch, length] of a step, and bounds of documents [1, n]."""
    generator = torch.Generator().manual_seed(step)
    shape = (model.global_batch, model.sequence_length + 1)
    stream = torch.randint(model.vocab_size, shape, generator=generator)
    mine = stream.chunk(layout.dp)[parallel_state.get_data_parallel_rank()]
    bounds = [draw_bounds(model, random.Random(f"{step} {row}")) for row in range(len(stream))]
    bounds = bounds[parallel_state.get_data_parallel_rank() * len(mine) :]
    for first in range(0, len(mine), model.micro_batch):
        rows = mine[first : first + model.micro_batch]
        whole = {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}
        if model.documents is not None:
            # As bounds of Megatron's datasets come, whose last one repeats.
            padded = [z + [model.sequence_length] * (100 - len(z)) for z in bounds[first:]]
            whole["cu_seqlens"] = torch.tensor(padded[: len(rows)], dtype=torch.int32)
        yield cut_sequence(flatten_batch_for_packed_sequences(whole), layout)


def draw_bounds(model: Model, pick: random.Random) -> list[int]:
    """Where a sequence's documents start, and its length."""
    inner = range(model.documents or 1, model.sequence_length, model.documents or 1)
    count = min(pick.choice([0, 2, 3, 5]), len(inner))
    return [0, *sorted(pick.sample(inner, count)), model.sequence_length]


def cut_sequence(batch: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The part of [batch, length] tensors that this context-parallel rank has."""
    if layout.sequence_order != "contiguous":
        return get_batch_on_this_cp_rank(
            batch | {"cu_seqlens_padded": None},
            is_hybrid_cp=False,
            cp_group=parallel_state.get_context_parallel_group(),
            use_per_sequence_balancing=layout.sequence_order == "zigzag",
        )
    rank = parallel_state.get_context_parallel_rank()
    return {
        name: tensor if name == "cu_seqlens" else tensor.chunk(layout.cp, dim=1)[rank].contiguous()
        for name, tensor in batch.items()
    }


def number_of_micro_batches(model: Model, layout: Layout) -> int:
    """How many of them each rank has."""
    return model.global_batch // (layout.dp * model.micro_batch)
