"""What a rank keeps of the forward pass for backward, term by term.

Notation in the docstrings: T = L/cp * B tokens of a micro-batch inside a tensor-parallel group;
S the same over tp under sequence parallelism, T without; a bytes of a hidden number (2 in bf16, 4
in float32); z = Z/min(tp, H), h = max(1, H/tp), e = E/tp, f = F/tp what a rank holds of the widths.

Only terms that grow with the length are here, and dropouts are zero. Weights, gradients and what a
kernel uses while it runs (the portable ones work in bounded blocks) come on top.
"""

from __future__ import annotations

from dataclasses import replace

from megalodon_mcore.accounting import BYTES_FLOAT32, ModelShape
from megalodon_mcore.planning.layout import ParallelLayout, head_ranks

BYTES_FLOAT64 = BYTES_INT64 = BYTES_COMPLEX64 = 8


def layer_activations(shape: ModelShape, layout: ParallelLayout) -> dict[str, int]:
    """Bytes that one layer keeps of one micro-batch, by what they are.

    With --recompute full only the layer's input:

        residual stream           S D a

    With none:

        residual stream           S D a               TimestepNorm's input
        TimestepNorm statistics   12 S G              a float64 and a float32 per group
        normalized input          T D a               t, gathered: input of CEMA and of v
        averages                  T D a + 4 T         input of the RMSNorm, and 1/rms
        mixed                     T D a               m: input of z and r
        z                         T z a               before its RMSNorm
        queries, keys, values     (2 z + e) T a       attention's inputs
        values before SiLU        e T a
        gate                      2 e T a             r before SiLU, and a
        straddling chunks         (2 z + e) T a + (z + e) B p a, at most
        output projection input   (D/tp + e) T a      [m's channels, a * r]
        FFN LayerNorm             S D a + 8 S         its input; mean and 1/deviation
        FFN input                 S D a
        FFN hidden                3 f T a or 2 f T a  the larger one with SwiGLU
        rescaled output           S D a               with rescale_nffn

    The straddling chunks' term is there where some segment does not start at a chunk: p positions
    come before the segments of a rank in their chunks, and pieces of chunks are kept as copies
    beside the whole. The others are exact.

    FFN hidden is what W1 and W3 give and SiLU of the one times the other; without SwiGLU what W1
    gives and its SiLU. With neither Triton's kernels nor fused loops the gate keeps SiLU of r too,
    e T a more.

    Not counted: CEMA's Triton kernels keep a state every 512/a steps, T D a N/64, N = cema_ndim.

    With --recompute selective the attention keeps z, v and r before SiLU, (z + 2 e) T a, in place
    of the terms from z to straddling chunks, and the FFN its input in the residual stream, S D a,
    in place of all of its own.
    """
    own, a = shape.megalodon, layout.activation_bytes
    tokens, held = layout.tokens, layout.residual_tokens
    d = shape.hidden_size
    residual = held * d * a
    if layout.recompute == "full":
        return {"residual stream": residual}
    terms = {
        "residual stream": residual,
        "TimestepNorm statistics": held * own.norm_num_groups * (BYTES_FLOAT64 + BYTES_FLOAT32),
        "normalized input": tokens * d * a,
        "averages": tokens * (d * a + BYTES_FLOAT32),
        "mixed": tokens * d * a,
    }
    terms |= _attention(shape, layout)
    terms["output projection input"] = tokens * (d + own.value_dim) // layout.tp * a
    return terms | _feed_forward(shape, layout)


def _attention(shape: ModelShape, layout: ParallelLayout) -> dict[str, int]:
    own, a, tokens = shape.megalodon, layout.activation_bytes, layout.tokens
    z, e = own.z_dim * head_ranks(shape, layout) // layout.tp, own.value_dim // layout.tp
    if layout.recompute == "selective":
        return {"z, values and gate before attention": tokens * (z + 2 * e) * a}
    terms = {
        "z": tokens * z * a,
        "queries, keys, values": tokens * (2 * z + e) * a,
        "values before SiLU": tokens * e * a,
        "gate": 2 * tokens * e * a,
    }
    before = _positions_before(shape, layout)
    if before:
        prefix = before * layout.micro_batch_size
        terms["straddling chunks"] = (tokens * (2 * z + e) + prefix * (z + e)) * a
    return terms


def _positions_before(shape: ModelShape, layout: ParallelLayout) -> int:
    """Positions of their chunks before the segments of the rank that has most of them."""
    segments = layout.context_layout().segments
    chunk = shape.megalodon.chunk_size
    return max(sum(segment.start % chunk for segment in held) for held in segments)


def _feed_forward(shape: ModelShape, layout: ParallelLayout) -> dict[str, int]:
    a, tokens, held = layout.activation_bytes, layout.tokens, layout.residual_tokens
    d, f = shape.hidden_size, shape.ffn_hidden_size // layout.tp
    if layout.recompute == "selective":
        return {"FFN's input in the residual stream": held * d * a}
    terms = {
        "FFN LayerNorm": held * (d * a + 2 * BYTES_FLOAT32),
        "FFN input": held * d * a,
        "FFN hidden": (3 if shape.swiglu else 2) * tokens * f * a,
    }
    if shape.megalodon.rescale_nffn:
        terms["rescaled output"] = held * d * a
    return terms


def edge_activations(shape: ModelShape, layout: ParallelLayout, stage: int) -> dict[str, int]:
    """Bytes that a stage keeps of one micro-batch outside its layers.

    embedding                 8 T           token numbers; 9 T with tp > 1
    final TimestepNorm        S D a + 12 S G
    output projection input   S D a
    loss                      4 T V/tp + 9 T     float32 softmax; targets and their mask
    """
    a, tokens, held = layout.activation_bytes, layout.tokens, layout.residual_tokens
    d, groups = shape.hidden_size, shape.megalodon.norm_num_groups
    terms = {}
    if stage == 0:
        terms["embedding"] = tokens * (BYTES_INT64 + (layout.tp > 1))
    if stage == layout.pp - 1:
        statistics = held * groups * (BYTES_FLOAT64 + BYTES_FLOAT32)
        terms["final TimestepNorm"] = held * d * a + statistics
        terms["output projection input"] = held * d * a
        vocabulary = shape.vocab_size // layout.tp
        terms["loss"] = tokens * (BYTES_FLOAT32 * vocabulary + BYTES_INT64 + 1)
    return terms


def stage_activations(shape: ModelShape, layout: ParallelLayout, stage: int) -> dict[str, int]:
    """Bytes of all that a stage keeps at its fullest, all micro-batches in flight counted.

    Under 1F1B stage s (from 0) keeps pp - s micro-batches. With --recompute full or selective one
    layer at a time also has what it keeps while its forward pass is run again.
    """
    in_flight = layout.micro_batches_in_flight(stage)
    layers = layout.stage_layers(shape, stage)
    terms = {
        "layers": in_flight * layers * sum(layer_activations(shape, layout).values()),
        "embedding, final norm and loss": in_flight
        * sum(edge_activations(shape, layout, stage).values()),
        "the layer being recomputed": recomputed_bytes(shape, layout),
    }
    return {name: value for name, value in terms.items() if value}


def recomputed_bytes(shape: ModelShape, layout: ParallelLayout) -> int:
    """Bytes that the part that is run again keeps until its backward pass is done.

    For selective, the larger of the attention and the FFN: one is done before the other starts.
    """
    if layout.recompute == "none":
        return 0
    plain = replace(layout, recompute="none")
    if layout.recompute == "full":
        return sum(layer_activations(shape, plain).values()) - sum(
            layer_activations(shape, layout).values()
        )
    return max(sum(_attention(shape, plain).values()), sum(_feed_forward(shape, plain).values()))
