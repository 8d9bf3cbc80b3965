"""The classes that a block's linear layers are built from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import nn

from megalodon_mcore.layers.norms import LayerNorm

Builder = Callable[..., nn.Module]
"""A class, or what is called like one."""


@dataclass(frozen=True)
class MegalodonLayerSubmodules:
    """Builders by the name of the layer they build, called with the arguments of Megatron's own.

    `linear_fc1` is called with the normalized hidden states; where `feed_forward_norm` is a
    LayerNormParameters, with the hidden states and the norm's weight and bias. The last two are of
    blocks with experts.
    """

    linear_z: Builder = ColumnParallelLinear
    linear_v: Builder = ColumnParallelLinear
    linear_r: Builder = ColumnParallelLinear
    linear_proj: Builder = RowParallelLinear
    feed_forward_norm: Builder = LayerNorm
    linear_fc1: Builder = ColumnParallelLinear
    linear_fc2: Builder = RowParallelLinear
    expert_norm: Builder = LayerNorm
    experts: Builder | None = None
    """A mixture of experts, called as Megatron calls one; None in models without."""


LINEAR_LAYERS = tuple(
    field.name
    for field in dataclasses.fields(MegalodonLayerSubmodules)
    if field.name.startswith("linear_")
)
"""A block's matrix products with weights."""
