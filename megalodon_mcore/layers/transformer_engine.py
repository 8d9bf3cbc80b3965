"""A block's linear layers as Transformer Engine's modules, through Megatron's wrappers of them.

Importing this needs Transformer Engine. The parameters, their names and their places in a
checkpoint are those of Megatron's local layers.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megalodon_mcore.layers.norms import LayerNorm, LayerNormParameters
from megalodon_mcore.layers.submodules import MegalodonLayerSubmodules


def transformer_engine_submodules(config: TransformerConfig) -> MegalodonLayerSubmodules:
    """All linear layers from Transformer Engine, the FFN's norm inside the one after it.

    A fused norm wants its input in the type of the linear layer's weights, which float32 hidden
    states (--fp32-residual-connection) beside bf16 weights are not; it is not fused there.
    """
    fuses_norm = not config.fp32_residual_connection
    return MegalodonLayerSubmodules(
        linear_z=ColumnParallelTELinear,
        linear_v=ColumnParallelTELinear,
        linear_r=ColumnParallelTELinear,
        linear_proj=RowParallelTELinear,
        feed_forward_norm=LayerNormParameters if fuses_norm else LayerNorm,
        linear_fc1=NormedColumnParallelTELinear if fuses_norm else ColumnParallelTELinear,
        linear_fc2=RowParallelTELinear,
    )


class ColumnParallelTELinear(TEColumnParallelLinear):
    """TEColumnParallelLinear with `disable_grad_reduce`, which Megatron's local layer has.

    With it, input and gradient are left as they are: the caller has gathered the one and sums the
    other over tensor-parallel ranks.
    """

    def __init__(self, *args: Any, disable_grad_reduce: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, is_expert=False, **kwargs)
        if disable_grad_reduce:
            # All that Transformer Engine's forward and backward go by when they communicate. What
            # the constructor made of them, sizes and attributes of the parameters, remains.
            self.parallel_mode = None
            self.sequence_parallel = False
            self.tp_size = 1
            self.set_tensor_parallel_group(None)


class NormedColumnParallelTELinear(TELayerNormColumnParallelLinear):
    """Transformer Engine's LayerNorm and column-parallel linear in one, of somebody else's norm.

    Its own norm parameters would be bf16 under --bf16 and have other names; it is called with
    float32 ones. Transformer Engine rounds them to bf16 for its kernel: of the scale 1 + w, only w.
    """

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        # --normalization is about Megatron's own norms.
        config = copy.copy(config)
        config.normalization = "LayerNorm"
        config.layernorm_zero_centered_gamma = True
        super().__init__(*args, config=config, is_expert=False, **kwargs)
        del self.layer_norm_weight, self.layer_norm_bias

    def forward(
        self, hidden_states: Tensor, norm_weight: Tensor, norm_bias: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Normalizes and projects [length, batch, hidden_size]; norm_weight is an offset from 1."""
        # Plain attributes: as parameters they would be this module's too.
        self.__dict__.update(layer_norm_weight=norm_weight, layer_norm_bias=norm_bias)
        return super().forward(hidden_states)


class RowParallelTELinear(TERowParallelLinear):
    """TERowParallelLinear with the arguments of Megatron's local layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, is_expert=False, **kwargs)
