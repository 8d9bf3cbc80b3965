"""Lets Megatron's --log-throughput count Megalodon's floating-point operations.

Megatron counts those of a GPT of the same arguments, in a function of its training loop that
nothing can replace from outside but its module's name for it.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from argparse import Namespace

from megalodon_mcore.config import ResolvedMegalodonConfig

NAME = "num_floating_point_operations"


def count_own_flops() -> None:
    """Puts `flops_of_batch` in the place of Megatron's count, where its training loop is used."""
    training = sys.modules.get("megatron.training.training")
    megatrons = getattr(training, NAME, None)
    if megatrons is None or hasattr(megatrons, "__wrapped__"):
        return

    @functools.wraps(megatrons)
    def count(
        args: Namespace,
        batch_size: int,
        seqlen_squared_sum_in_batch: float | None = None,
        total_real_tokens_in_batch: float | None = None,
    ) -> float:
        return flops_of_batch(
            args, batch_size, seqlen_squared_sum_in_batch, total_real_tokens_in_batch
        )

    setattr(training, NAME, count)


def flops_of_batch(
    args: Namespace,
    batch_size: int,
    squared_lengths: float | None = None,
    tokens: float | None = None,
) -> float:
    """Of all ranks for one global batch.

    Args:
        args: Megatron's, with what the spec resolved.
        batch_size: sequences of args.seq_length, where the rest is None.
        squared_lengths: the sum over packed documents; what they attend to is taken to be what
            documents of their mean length do, each weighted by its length.
        tokens: in all of them.
    """
    if not tokens or not squared_lengths:
        tokens = batch_size * args.seq_length
        squared_lengths = tokens * args.seq_length
    megalodon = ResolvedMegalodonConfig(
        **{
            field.name: getattr(args, f"megalodon_{field.name}")
            for field in dataclasses.fields(ResolvedMegalodonConfig)
        }
    )
    return tokens * training_flops_per_token(
        megalodon,
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        swiglu=args.swiglu,
        vocab_size=args.padded_vocab_size,
        seq_length=squared_lengths / tokens,
    )


def training_flops_per_token(
    megalodon: ResolvedMegalodonConfig,
    *,
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    swiglu: bool,
    vocab_size: int,
    seq_length: float,
) -> float:
    """Floating-point operations of a forward and a backward pass, which is twice a forward one.

    Projections and output; attention up to the diagonal of its chunks; CEMA as a recurrence, 12 a
    step of each EMA dimension (8 for q h + p x, 4 for the real part of gamma h). Element-wise work
    is left out, and so is what kernels and recomputation spend beyond that. The chunks begin anew
    after `seq_length` positions; the vocabulary is the padded one.
    """
    d, e, z = hidden_size, megalodon.value_dim, megalodon.z_dim
    projections = d * z + 2 * d * e + (d + e) * d + (3 if swiglu else 2) * d * ffn_hidden_size
    chunks, rest = divmod(seq_length, megalodon.chunk_size)
    attended = (chunks * megalodon.chunk_size**2 + rest**2) / (2 * seq_length)
    layer = projections + (z + e) * attended + 6 * d * megalodon.cema_ndim
    return 6 * (num_layers * layer + d * vocab_size)
