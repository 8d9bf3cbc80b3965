"""Layers that predict tokens beyond the next one: Megatron's, with Megalodon's blocks in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig


class PredictionLayer(MultiTokenPredictionLayer):
    """One depth of --mtp-num-layers: a stack of a pattern's layers, one block in a GPTModel.

    Both models have it so, which gives its parameters the same names.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MultiTokenPredictionLayerSubmodules,
        stack: HybridStackSubmodules,
        mtp_layer_pattern: str | None = None,
        hybrid_submodules: HybridStackSubmodules | None = None,
        **rest: Any,
    ) -> None:
        """Megatron's arguments, and the layers by symbol, in the stead of hybrid_submodules."""
        blocks = cast(ModuleSpec, stack.mamba_layer)
        stack = dataclasses.replace(
            stack,
            mamba_layer=dataclasses.replace(blocks, params=blocks.params | {"is_mtp_layer": True}),
        )
        pattern = mtp_layer_pattern or "M"
        super().__init__(
            config, submodules, mtp_layer_pattern=pattern, hybrid_submodules=stack, **rest
        )


def prediction_spec(
    depths: int,
    stack: HybridStackSubmodules,
    norm: Callable[..., MegatronModule],
    linear: Callable[..., MegatronModule],
) -> MultiTokenPredictionBlockSubmodules:
    """What Megatron builds a model's MultiTokenPredictionBlock from.

    Args:
        depths: how many tokens after the next one are predicted.
        stack: the layers by symbol.
        norm: called as Megatron calls a norm's class.
        linear: called as ColumnParallelLinear.
    """
    layer = ModuleSpec(
        module=PredictionLayer,
        params={"stack": stack},
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=norm, hnorm=norm, layer_norm=norm, eh_proj=linear
        ),
    )
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * depths)
