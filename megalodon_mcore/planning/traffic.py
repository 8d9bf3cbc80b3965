"""What a rank sends, collective by collective.

A ring all-gather or reduce-scatter over n ranks sends (n-1)/n of the whole tensor from each of
them, an all-reduce twice that. U = (tp-1)/tp * T D a is one all-gather of hidden states over the
tensor-parallel ranks (T and a as in `activations`).
"""

from __future__ import annotations

from typing import NamedTuple

from megalodon_mcore.accounting import BYTES_FLOAT32, ModelShape
from megalodon_mcore.parallel.sequence_layout import Segment, SequenceLayout
from megalodon_mcore.planning.activations import BYTES_COMPLEX64, BYTES_FLOAT64
from megalodon_mcore.planning.layout import ParallelLayout, head_ranks
from megalodon_mcore.planning.parameters import count, model_bytes, stage_parameters


class Traffic(NamedTuple):
    """Bytes that a rank sends in the forward and in the backward pass.

    What is sent again where --recompute repeats the forward pass is in `backward`.
    """

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Both."""
        return self.forward + self.backward


def hidden_state_unit(shape: ModelShape, layout: ParallelLayout) -> int:
    """U: bytes that one all-gather of hidden states over the tensor-parallel ranks sends."""
    whole = layout.tokens * shape.hidden_size * layout.activation_bytes
    return whole // layout.tp * (layout.tp - 1)


def layer_traffic(shape: ModelShape, layout: ParallelLayout) -> dict[str, Traffic]:
    """One layer's, for one micro-batch.

        hidden states    with SP 5 U forward, 6 U backward; without 5 U and 5 U
        TimestepNorm     (n-1) s 2 B G 8 each way, over the n ranks that share the residual stream:
                         cp tp with SP, cp without; s segments on a rank
        CEMA             (cp-1) s 8 B N D/tp each way
        keys and values  B (z + e) a per position that another rank's chunk needs, each way, from
                         the rank that sends most; nothing where segments start at chunks
        parameters       backward: the RMSNorm's gradient over tp and, where tp > H, those of the
                         head's Wz and affine over the ranks that share it

    With SP forward gathers t, the averages' channels and the FFN's input and reduce-scatters both
    halves of the block; backward mirrors the five, and Megatron gathers the FFN's input again.
    Without, forward all-reduces both halves and gathers the channels; backward likewise.
    """
    unit = hidden_state_unit(shape, layout)
    traffic = {
        "hidden states": Traffic(5 * unit, 6 * unit if layout.splits_residual else 5 * unit),
        "TimestepNorm states": norm_state_traffic(shape, layout),
        "CEMA states": cema_state_traffic(shape, layout),
        "keys and values": key_value_traffic(shape, layout),
    }
    traffic = _with_recompute(traffic, layout, unit)
    traffic["gradients of shared parameters"] = Traffic(0, _shared_gradients(shape, layout))
    return traffic


def _with_recompute(
    traffic: dict[str, Traffic], layout: ParallelLayout, unit: int
) -> dict[str, Traffic]:
    """Adds what recomputing sends again: all, or the FFN's two collectives and keys and values."""
    again = dict.fromkeys(traffic, 0)
    if layout.recompute == "full":
        again = {name: sent.forward for name, sent in traffic.items()}
    elif layout.recompute == "selective":
        again |= {"hidden states": 2 * unit}
        if "keys and values" in traffic:
            again["keys and values"] = traffic["keys and values"].forward
    return {
        name: Traffic(sent.forward, sent.backward + again[name]) for name, sent in traffic.items()
    }


def norm_state_traffic(shape: ModelShape, layout: ParallelLayout) -> Traffic:
    """One TimestepNorm's mean and variance of every segment; whatever the length."""
    summary = 2 * layout.micro_batch_size * shape.megalodon.norm_num_groups * BYTES_FLOAT64
    return _exchange_of_states(layout.residual_layout(), summary)


def cema_state_traffic(shape: ModelShape, layout: ParallelLayout) -> Traffic:
    """One CEMA's state after every segment; whatever the length."""
    return _exchange_of_states(layout.context_layout(), _cema_state_bytes(shape, layout))


def _cema_state_bytes(shape: ModelShape, layout: ParallelLayout) -> int:
    numbers = shape.hidden_size // layout.tp * shape.megalodon.cema_ndim
    return layout.micro_batch_size * numbers * BYTES_COMPLEX64


def _exchange_of_states(layout: SequenceLayout, summary: int) -> Traffic:
    """All-gather forward, reduce-scatter backward; every rank sends as many as the fullest has."""
    segments = max(len(held) for held in layout.segments)
    sent = (len(layout.segments) - 1) * segments * summary
    return Traffic(sent, sent)


def key_value_traffic(shape: ModelShape, layout: ParallelLayout) -> Traffic:
    """Keys and values that other ranks' chunks need; backward, the gradients of those received."""
    sent, received = straddling_positions(layout.context_layout(), shape.megalodon.chunk_size)
    own = shape.megalodon
    z = own.z_dim * head_ranks(shape, layout) // layout.tp
    width = layout.micro_batch_size * (z + own.value_dim // layout.tp) * layout.activation_bytes
    return Traffic(max(sent) * width, max(received) * width)


def straddling_positions(layout: SequenceLayout, chunk_size: int) -> tuple[list[int], list[int]]:
    """Positions that every rank sends to and receives from others, where chunks straddle ranks.

    A segment that does not start at a chunk needs those from its chunk's start up to its own.
    """
    ranks = range(len(layout.segments))
    sent, received = [0 for _ in ranks], [0 for _ in ranks]
    for rank in ranks:
        for segment in layout.segments[rank]:
            needed = Segment(segment.start - segment.start % chunk_size, segment.start)
            if needed.length == 0:
                continue
            for other in ranks:
                if other != rank:
                    positions = sum(part.length for part, _ in layout.rows(other, needed))
                    sent[other] += positions
                    received[rank] += positions
    return sent, received


def _shared_gradients(shape: ModelShape, layout: ParallelLayout) -> int:
    """Bytes of the all-reduces that hooks on shared parameters make in every backward pass."""
    tp, shared = layout.tp, head_ranks(shape, layout)
    z = shape.megalodon.z_dim * shared // tp
    projection = (shape.hidden_size + 1) * z * layout.activation_bytes
    affine = 4 * z * BYTES_FLOAT32
    norm = shape.hidden_size * BYTES_FLOAT32
    return _all_reduce(norm, tp) + _all_reduce(projection + affine, shared)


def _all_reduce(size: int, ranks: int) -> int:
    return 2 * (ranks - 1) * size // ranks


def stage_traffic(shape: ModelShape, layout: ParallelLayout, stage: int) -> dict[str, Traffic]:
    """A stage's, for one micro-batch: its layers and what lies outside them.

    pipeline       S D a to the next stage, forward; to the one before, backward
    embedding      with SP U each way; without 2 U forward
    output         with SP U forward, 2 U backward (one is Megatron's repeat); without 2 U
                   backward; and three all-reduces of 4 T bytes in the cross-entropy
    """
    unit = hidden_state_unit(shape, layout)
    split = layout.splits_residual
    first, last = stage == 0, stage == layout.pp - 1
    layers = layout.stage_layers(shape, stage)
    traffic = {
        f"{name}, {layers} layers": Traffic(layers * sent.forward, layers * sent.backward)
        for name, sent in layer_traffic(shape, layout).items()
    }
    if layout.pp > 1:
        boundary = layout.residual_tokens * shape.hidden_size * layout.activation_bytes
        traffic["pipeline"] = Traffic(0 if last else boundary, 0 if first else boundary)
    if first:
        traffic["embedding"] = Traffic(unit, unit) if split else Traffic(2 * unit, 0)
    if last:
        traffic["final TimestepNorm states"] = norm_state_traffic(shape, layout)
        losses = 3 * _all_reduce(layout.tokens * BYTES_FLOAT32, layout.tp)
        output = Traffic(unit, 2 * unit) if split else Traffic(0, 2 * unit)
        traffic["output projection and loss"] = Traffic(output.forward + losses, output.backward)
    return traffic


def step_traffic(shape: ModelShape, layout: ParallelLayout, stage: int) -> dict[str, int]:
    """Bytes that a rank of a stage sends once per step, however many micro-batches it has.

    gradients       float32, reduce-scattered over dp cp, or all-reduced without the
                    distributed optimizer
    weights         all-gathered over dp cp with the distributed optimizer
    norms           with SP, float32 gradients of replicated parameters all-reduced over tp
    tied embedding  its float32 gradient all-reduced between the first and last stage
    """
    parameters = stage_parameters(shape, layout, stage)
    ranks, held = layout.gradient_ranks, model_bytes(parameters, layout)
    traffic = {}
    if layout.distributed_optimizer:
        traffic["gradients"] = held["gradients"] * (ranks - 1) // ranks
        traffic["weights"] = held["weights"] * (ranks - 1) // ranks
    else:
        traffic["gradients"] = _all_reduce(held["gradients"], ranks)
    if layout.splits_residual:
        marked = {name: p for name, p in parameters.items() if p.summed_over_tp}
        traffic["norms"] = _all_reduce(BYTES_FLOAT32 * count(marked), layout.tp)
    if shape.tied_embeddings and layout.pp > 1 and stage in (0, layout.pp - 1):
        traffic["tied embedding"] = _all_reduce(
            BYTES_FLOAT32 * shape.vocab_size // layout.tp * shape.hidden_size, 2
        )
    return traffic


# What others would send.


def gpt_hidden_states(shape: ModelShape, layout: ParallelLayout) -> Traffic:
    """Megatron's GPT layer of the same width under the same tensor and sequence parallelism.

    With SP it gathers the inputs of attention and MLP and reduce-scatters both outputs, 4 U
    forward; backward mirrors the four and gathers both inputs again, 6 U. Without, two all-reduces
    each way, 4 U and 4 U. Its context parallelism is not in this.
    """
    unit = hidden_state_unit(shape, layout)
    states = Traffic(4 * unit, 6 * unit if layout.splits_residual else 4 * unit)
    return _with_recompute({"hidden states": states}, layout, unit)["hidden states"]


def all_to_all(shape: ModelShape, layout: ParallelLayout) -> Traffic:
    """A context-parallel scheme that exchanges sequence against channels, for one layer.

    In DeepSpeed Ulysses' manner, each rank gets its share of the channels of the whole sequence
    before CEMA and before attention, and gives the results back: four exchanges each way, of
    widths D, D, 2Z + E and E over tp, each sending (cp-1)/cp of T numbers per column. Where cp tp
    exceeds the heads, queries and keys would have to be sent more than once; that is not counted,
    nor are TimestepNorm's statistics.
    """
    own = shape.megalodon
    width = 2 * shape.hidden_size + 2 * own.z_dim + 2 * own.value_dim
    whole = layout.tokens * width * layout.activation_bytes // layout.tp
    sent = whole * (layout.cp - 1) // layout.cp
    again = sent if layout.recompute == "full" else 0
    return Traffic(sent, sent + again)


def chain(shape: ModelShape, layout: ParallelLayout) -> Traffic:
    """The paper's scheme: each rank sends its CEMA state to the next, one after another.

    Few bytes, but every segment waits for the one before: `chain_length` sends in a row.
    """
    segments = max(len(held) for held in layout.context_layout().segments)
    sent = segments * _cema_state_bytes(shape, layout) if layout.cp > 1 else 0
    again = sent if layout.recompute == "full" else 0
    return Traffic(sent, sent + again)


def chain_length(layout: ParallelLayout) -> int:
    """Sends that wait for one another in `chain`, in each direction of each layer."""
    return sum(len(held) for held in layout.context_layout().segments) - 1
