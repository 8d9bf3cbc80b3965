"""Lets Megatron's --log-throughput count Megalodon's floating-point operations.

Megatron counts those of a GPT of the same arguments, in a function of its training loop that
nothing can replace from outside but its module's name for it.
"""

from __future__ import annotations

import functools
import sys
from argparse import Namespace

from megalodon_mcore.config import MegalodonConfig, config_from_arguments

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
    shape = config_from_arguments(args, args.padded_vocab_size, "This run")
    return tokens * training_flops_per_token(shape, squared_lengths / tokens)


def training_flops_per_token(config: MegalodonConfig, seq_length: float) -> float:
    """Floating-point operations of a forward and a backward pass, which is twice a forward one.

    Projections and output; attention up to the diagonal of its chunks; CEMA as a recurrence, 12 a
    step of each EMA dimension (8 for q h + p x, 4 for the real part of gamma h). Element-wise work
    is left out, and so is what kernels and recomputation spend beyond that.

    Args:
        config: the model; its vocabulary with padding, if it is padded.
        seq_length: positions after which the chunks begin anew.
    """
    d, e, z = config.hidden_size, config.value_dim, config.z_dim
    feed_forward = (3 if config.swiglu else 2) * d * config.ffn_hidden_size
    projections = d * z + 2 * d * e + (d + e) * d + feed_forward
    chunks, rest = divmod(seq_length, config.chunk_size)
    attended = (chunks * config.chunk_size**2 + rest**2) / (2 * seq_length)
    layer = projections + (z + e) * attended + 6 * d * config.cema_ndim
    return 6 * (config.num_layers * layer + d * config.vocab_size)
