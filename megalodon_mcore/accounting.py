"""How many parameters and bytes a configuration takes, from formulas alone."""

from __future__ import annotations

from dataclasses import dataclass

from megalodon_mcore.config import MegalodonConfig, MegalodonSize, ResolvedMegalodonConfig

BYTES_FLOAT32 = 4
BYTES_BFLOAT16 = 2


@dataclass(frozen=True)
class ModelShape:
    """All that the counts depend on; vocab_size is the padded one, if it is padded."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    swiglu: bool
    tied_embeddings: bool
    vocab_size: int
    megalodon: ResolvedMegalodonConfig

    @classmethod
    def of(
        cls, size: MegalodonSize, vocab_size: int, own: MegalodonConfig | None = None
    ) -> ModelShape:
        """The shape of a named size; `own` replaces its Megalodon values.

        Raises:
            ValueError: a value of `own` does not fit.
        """
        return cls(
            num_layers=size.num_layers,
            hidden_size=size.hidden_size,
            num_attention_heads=size.num_attention_heads,
            ffn_hidden_size=size.ffn_hidden_size,
            swiglu=size.swiglu,
            tied_embeddings=size.tied_embeddings,
            vocab_size=vocab_size,
            megalodon=(own or size.megalodon).resolve(size.hidden_size, size.num_attention_heads),
        )


def float32_parameters_per_layer(shape: ModelShape) -> int:
    """Parameters of one layer that stay float32 under --bf16."""
    d, n, z = shape.hidden_size, shape.megalodon.cema_ndim, shape.megalodon.z_dim
    cema = 4 * d * n + 2 * d
    norms = 2 * d + d + 2 * d
    rescale = d if shape.megalodon.rescale_nffn else 0
    return cema + norms + 4 * z + rescale


def parameters_by_part(shape: ModelShape) -> dict[str, int]:
    """Exact parameter counts, layers summed; the values add up to the model's total."""
    own = shape.megalodon
    d, e, z, f = shape.hidden_size, own.value_dim, own.z_dim, shape.ffn_hidden_size
    layers = shape.num_layers
    counts = {
        "embedding": shape.vocab_size * d,
        "TimestepNorm": layers * 2 * d,
        "CEMA": layers * (4 * d * own.cema_ndim + 2 * d),
        "CEMA RMSNorm": layers * d,
        "query/key projection and affine": layers * (d * z + z + 4 * z),
        "value projection": layers * (d * e + e),
        "gate projection": layers * (d * e + e),
        "mixer output projections": layers * (d * d + d + e * d),
        "FFN LayerNorm": layers * 2 * d,
        "FFN": layers * (3 if shape.swiglu else 2) * d * f,
        "FFN rescale": layers * d if own.rescale_nffn else 0,
        "final TimestepNorm": 2 * d,
        "output projection": 0 if shape.tied_embeddings else shape.vocab_size * d,
    }
    return {part: count for part, count in counts.items() if count}


def total_parameters(shape: ModelShape) -> int:
    """Parameters of the whole model."""
    return sum(parameters_by_part(shape).values())


def training_flops_per_token(shape: ModelShape, seq_length: float) -> float:
    """Floating-point operations of a forward and a backward pass, which is twice a forward one.

    Projections and output; attention up to the diagonal of its chunks; CEMA as a recurrence, 12 a
    step of each EMA dimension (8 for q h + p x, 4 for the real part of gamma h). Element-wise work
    is left out, and so is what kernels and recomputation spend beyond that.

    Args:
        shape: the model.
        seq_length: positions after which the chunks begin anew.
    """
    own = shape.megalodon
    d, e, z = shape.hidden_size, own.value_dim, own.z_dim
    feed_forward = (3 if shape.swiglu else 2) * d * shape.ffn_hidden_size
    projections = d * z + 2 * d * e + (d + e) * d + feed_forward
    chunks, rest = divmod(seq_length, own.chunk_size)
    attended = (chunks * own.chunk_size**2 + rest**2) / (2 * seq_length)
    layer = projections + (z + e) * attended + 6 * d * own.cema_ndim
    return 6 * (shape.num_layers * layer + d * shape.vocab_size)


def training_bytes(shape: ModelShape, bf16: bool) -> dict[str, int]:
    """Bytes of weights, gradients and Adam state on a single rank, nothing sharded.

    Megatron accumulates gradients in float32; under bf16 it also keeps float32 main weights for
    the parameters that are bf16.
    """
    total = total_parameters(shape)
    in_float32 = shape.num_layers * float32_parameters_per_layer(shape) + 2 * shape.hidden_size
    in_bfloat16 = total - in_float32 if bf16 else 0
    moments = 2 * BYTES_FLOAT32 * total
    return {
        "weights": BYTES_FLOAT32 * (total - in_bfloat16) + BYTES_BFLOAT16 * in_bfloat16,
        "gradients": BYTES_FLOAT32 * total,
        "optimizer": moments + BYTES_FLOAT32 * in_bfloat16,
    }


def streaming_bytes(shape: ModelShape, bf16: bool) -> dict[str, int]:
    """Bytes of state that generation holds per sequence, at most, whatever the context length."""
    own = shape.megalodon
    groups = shape.num_layers + 1
    key_value = BYTES_BFLOAT16 if bf16 else BYTES_FLOAT32
    return {
        "TimestepNorm": groups * (8 + 2 * own.norm_num_groups * BYTES_FLOAT32),
        "CEMA": shape.num_layers * shape.hidden_size * own.cema_ndim * 2 * BYTES_FLOAT32,
        "keys and values": shape.num_layers
        * own.chunk_size
        * (own.z_dim + own.value_dim)
        * key_value,
    }
