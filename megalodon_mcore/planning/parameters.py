"""The parameters that a rank holds, by their names in the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megalodon_mcore.accounting import BYTES_BFLOAT16, BYTES_FLOAT32, ModelShape
from megalodon_mcore.planning.layout import ParallelLayout, head_ranks


@dataclass(frozen=True)
class Parameter:
    """A parameter as one rank holds it.

    Args:
        shape: its shape here.
        copies: ranks of one model replica (tp * pp of them) that hold the same values.
        float32: whether it stays float32 under --bf16.
        summed_over_tp: whether sequence parallelism makes Megatron sum its gradient over the
            tensor-parallel ranks once per step.
    """

    shape: tuple[int, ...]
    copies: int = 1
    float32: bool = False
    summed_over_tp: bool = False

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


def stage_parameters(shape: ModelShape, layout: ParallelLayout, stage: int) -> dict[str, Parameter]:
    """All parameters of a rank of pipeline stage `stage` (from 0); layers count from 0 in it."""
    d, tp = shape.hidden_size, layout.tp
    first, last = stage == 0, stage == layout.pp - 1
    tied_copies = 2 if shape.tied_embeddings and layout.pp > 1 else 1
    vocabulary = Parameter((shape.vocab_size // tp, d), copies=tied_copies)
    parameters: dict[str, Parameter] = {}
    if first:
        parameters["embedding.word_embeddings.weight"] = vocabulary
    layer = layer_parameters(shape, layout)
    for index in range(layout.stage_layers(shape, stage)):
        parameters |= {f"decoder.layers.{index}.{name}": held for name, held in layer.items()}
    if last:
        norm = Parameter((d,), copies=tp, float32=True, summed_over_tp=True)
        parameters |= {f"decoder.final_layernorm.{name}": norm for name in ("weight", "bias")}
        # A tied output layer on the embedding's stage borrows its weight.
        if not (first and shape.tied_embeddings):
            parameters["output_layer.weight"] = vocabulary
    return parameters


def layer_parameters(shape: ModelShape, layout: ParallelLayout) -> dict[str, Parameter]:
    """One layer's.

    Sharded over the tp ranks: CEMA and the columns or rows of every projection, by channel, head,
    value column or FFN column. Replicated: the norms, the output projection's bias and the FFN's
    rescaling. Where tp > H, the tp/H ranks of a head each hold its whole share of Wz and affine.
    """
    own, tp = shape.megalodon, layout.tp
    d, n = shape.hidden_size, own.cema_ndim
    channels, values, ffn = d // tp, own.value_dim // tp, shape.ffn_hidden_size // tp
    shared = head_ranks(shape, layout)
    z = own.z_dim * shared // tp

    def replicated(float32: bool = True) -> Parameter:
        return Parameter((d,), copies=tp, float32=float32, summed_over_tp=True)

    def ema(*inner: int) -> Parameter:
        return Parameter((channels, *inner), float32=True)

    affine = Parameter((2, z), copies=shared, float32=True)
    parameters = {
        "mixer.timestep_norm.weight": replicated(),
        "mixer.timestep_norm.bias": replicated(),
        "mixer.cema.alpha": ema(n, 1),
        "mixer.cema.delta": ema(n, 1),
        "mixer.cema.theta": ema(1, 1),
        "mixer.cema.gamma": ema(n, 2),
        "mixer.cema.omega": ema(1),
        "mixer.cema_norm.weight": Parameter((d,), copies=tp, float32=True),
        "mixer.query_key.weight": affine,
        "mixer.query_key.bias": affine,
        "mixer.linear_z.weight": Parameter((z, d), copies=shared),
        "mixer.linear_z.bias": Parameter((z,), copies=shared),
        "mixer.linear_v.weight": Parameter((values, d)),
        "mixer.linear_v.bias": Parameter((values,)),
        "mixer.linear_r.weight": Parameter((values, d)),
        "mixer.linear_r.bias": Parameter((values,)),
        "mixer.linear_proj.weight": Parameter((d, channels + values)),
        "mixer.linear_proj.bias": replicated(float32=False),
        "feed_forward.norm.weight": replicated(),
        "feed_forward.norm.bias": replicated(),
        "feed_forward.linear_fc1.weight": Parameter((2 * ffn if shape.swiglu else ffn, d)),
        "feed_forward.linear_fc2.weight": Parameter((d, ffn)),
    }
    if own.rescale_nffn:
        parameters["feed_forward.rescale.weight"] = replicated()
    return parameters


def count(parameters: dict[str, Parameter]) -> int:
    """Numbers in all of them."""
    return sum(parameter.numel for parameter in parameters.values())


def model_bytes(parameters: dict[str, Parameter], layout: ParallelLayout) -> dict[str, int]:
    """Bytes of a rank's weights, gradients and Adam state.

    With n32 numbers that stay float32 and n16 others, under --bf16:

        weights    4 n32 + 2 n16
        gradients  4 (n32 + n16)
        optimizer  (8 n32 + 12 n16) / (dp cp with the distributed optimizer, else 1)

    two float32 moments of every number and a float32 main copy of every bf16 one. In float32 all
    are n32. A shard is rounded up; Megatron's padding of its buffers, some hundreds of numbers in
    each bucket, is not counted.
    """
    total = count(parameters)
    in_bfloat16 = layout.bf16 * sum(p.numel for p in parameters.values() if not p.float32)
    in_float32 = total - in_bfloat16
    shards = layout.gradient_ranks if layout.distributed_optimizer else 1
    moments, main = 2 * BYTES_FLOAT32, BYTES_FLOAT32
    return {
        "weights": BYTES_FLOAT32 * in_float32 + BYTES_BFLOAT16 * in_bfloat16,
        "gradients": BYTES_FLOAT32 * total,
        "optimizer": moments * math.ceil(in_float32 / shards)
        + (moments + main) * math.ceil(in_bfloat16 / shards),
    }
