"""Lets Megatron's --log-throughput count Megalodon's floating-point operations.

Megatron counts those of a GPT of the same arguments, in a function of its training loop that
nothing can replace from outside but its module's name for it.
"""

from __future__ import annotations

import sys
from argparse import Namespace

from megalodon_mcore.config import (
    BLOCKS,
    MegalodonConfig,
    layers_of_a_depth,
    shape_from_arguments,
)


def count_own_flops() -> None:
    """Puts `flops_of_batch` in the place of Megatron's count, where its training loop is used."""
    training = sys.modules.get("megatron.training.training")
    if training is not None:
        training.num_floating_point_operations = flops_of_batch


def flops_of_batch(
    args: Namespace,
    batch_size: int,
    seqlen_squared_sum_in_batch: float | None = None,
    total_real_tokens_in_batch: float | None = None,
) -> float:
    """Of all ranks for one global batch; arguments are named as in Megatron's function.

    Args:
        args: Megatron's, with what the spec resolved.
        batch_size: sequences of args.seq_length, where the rest is None.
        seqlen_squared_sum_in_batch: over packed documents; what blocks attend to is taken to be
            what they do in documents of their mean length, each weighted by its length.
        total_real_tokens_in_batch: in all of them.
    """
    squared_lengths, tokens = seqlen_squared_sum_in_batch, total_real_tokens_in_batch
    if not tokens or not squared_lengths:
        tokens = batch_size * args.seq_length
        squared_lengths = tokens * args.seq_length
    # It is counted however the router scores, also as no model outside Megatron can.
    values = {**vars(args), "moe_router_score_function": None}
    shape = shape_from_arguments(values, "This run")
    length, vocabulary = squared_lengths / tokens, args.padded_vocab_size
    flops = training_flops_per_token(shape, length, vocabulary)
    if depths := args.mtp_num_layers or 0:
        ahead = _predicted(shape, args.hybrid_layer_pattern, length, vocabulary)
        flops += 6 * depths * ahead
    return tokens * flops


def _predicted(
    config: MegalodonConfig, pattern: str | None, length: float, vocabulary: int
) -> float:
    """Products of a token in one depth that predicts a further one: two hidden states made one, the
    depth's layers, the output."""
    own = layers_of_a_depth(pattern, config.symbols)
    layers = sum(_products(config, symbol, length) for symbol in own)
    return 2 * config.hidden_size**2 + layers + config.hidden_size * vocabulary


def training_flops_per_token(
    config: MegalodonConfig, seq_length: float, vocabulary: int | None = None
) -> float:
    """Floating-point operations of a forward and a backward pass, which is twice a forward one.

    Linear layers, router and output; of experts those that a token is routed to; attention up to
    the diagonal of a block's chunks, or of a whole document; CEMA as a recurrence, 12 a step of
    each EMA dimension (8 for q h + p x, 4 for the real part of gamma h). Element-wise work is left
    out, and so is what kernels and recomputation spend beyond that.

    Args:
        config: the model.
        seq_length: positions of a document, after which the chunks begin anew.
        vocabulary: tokens that the output has, with padding; those of `config` by default.
    """
    vocabulary = config.vocab_size if vocabulary is None else vocabulary
    by_symbol = {symbol: _products(config, symbol, seq_length) for symbol in set(config.symbols)}
    layers = sum(by_symbol[symbol] for symbol in config.symbols)
    return 6 * (layers + config.hidden_size * vocabulary)


def _products(config: MegalodonConfig, symbol: str, length: float) -> float:
    """Multiplications with additions that a token takes in a layer's forward pass."""
    d = config.hidden_size
    # The two or, gated, three matrices of an FFN.
    per_width = (3 if config.swiglu else 2) * d
    found = 0.0
    if symbol in BLOCKS:
        e, z = config.value_dim, config.z_dim
        chunks, rest = divmod(length, config.chunk_size)
        attended = (chunks * config.chunk_size**2 + rest**2) / (2 * length)
        found += d * z + 2 * d * e + (d + e) * d + (z + e) * attended + 6 * d * config.cema_ndim
    if symbol == "*":
        queries = config.attention_heads * config.attention_head_dim
        keys = config.attention_groups * config.attention_head_dim
        found += d * (queries + 2 * keys) + queries * d + 2 * queries * length / 2
    if symbol in "M-":
        found += per_width * config.ffn_hidden_size
    if symbol in "XE":
        routed = config.experts_per_token * config.expert_ffn_size
        found += d * config.num_experts + per_width * (routed + (config.shared_expert_size or 0))
        found += d * config.shared_expert_gate
    return found
