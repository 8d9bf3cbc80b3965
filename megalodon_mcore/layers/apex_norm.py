"""LayerNorm by apex's kernels, where apex is installed and --no-persist-layer-norm is not given."""

from __future__ import annotations

import copy

import torch
from megatron.core.fusions import fused_layer_norm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megalodon_mcore.layers.float32_module import Float32Module


def has_apex_norm(config: TransformerConfig) -> bool:
    """True if Megatron's switch is on and both kernels it may come to are there."""
    return (
        config.persist_layer_norm
        and fused_layer_norm.HAVE_PERSIST_LAYER_NORM
        and fused_layer_norm.HAVE_FUSED_LAYER_NORM
    )


class ApexLayerNorm(Float32Module, fused_layer_norm.FusedLayerNorm):
    """Megatron's FusedLayerNorm, persistent for the widths that it knows; computes in float32.

    Parameters and results are those of layers.norms.LayerNorm. It runs on a GPU only.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        device: torch.device | None = None,
        *,
        config: TransformerConfig,
    ) -> None:
        # --normalization is about Megatron's own norms.
        config = copy.copy(config)
        config.normalization = "LayerNorm"
        config.layernorm_zero_centered_gamma = True
        with torch.device(device or torch.get_default_device()):
            super().__init__(config, hidden_size, eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalizes [..., hidden_size] and keeps its dtype."""
        return super().forward(hidden_states.float()).to(hidden_states.dtype)
