"""How many floating-point operations a configuration takes."""

from __future__ import annotations

from megalodon_mcore.config import MegalodonConfig


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
