"""A block's feed-forward network as a mixture of experts, Megatron's own."""

from __future__ import annotations

import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.layers.feed_forward import FeedForward
from megalodon_mcore.layers.initialization import projection_initializer
from megalodon_mcore.layers.submodules import MegalodonLayerSubmodules
from megalodon_mcore.parallel.model_parallel import ModelParallel


class ExpertFeedForward(FeedForward):
    """LayerNorm, then the experts that a router chooses for each position, rescaled as the FFN is.

    It takes the place of MegalodonFeedForward, with its arguments.
    """

    symbol = "X"

    def __init__(
        self,
        config: TransformerConfig,
        megalodon: MegalodonConfig,
        layer_number: int,
        submodules: MegalodonLayerSubmodules,
        pg_collection: ProcessGroupCollection,
        parallel: ModelParallel,
        device: torch.device,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config, megalodon, pg_collection, parallel)
        assert submodules.experts is not None
        self.norm = submodules.expert_norm(config.hidden_size, config.layernorm_epsilon, device)
        self.experts = submodules.experts(
            config=experts_config(config, megalodon),
            pg_collection=pg_collection,
            is_mtp_layer=is_mtp_layer,
        )
        # By which Megatron logs its losses.
        self.experts.set_layer_number(layer_number)
        self._complete(layer_number, is_mtp_layer, device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[length, batch, hidden_size] to the experts' output, without the residual."""
        normalized = self.norm(hidden_states).to(self.config.params_dtype)
        output, _ = self.experts(normalized)
        return self._end(output)


def experts_config(config: TransformerConfig, megalodon: MegalodonConfig) -> TransformerConfig:
    """What Megatron builds experts from, with a block's activation and first values."""
    config = copy.copy(config)
    hidden_size, expert_size = megalodon.hidden_size, megalodon.expert_ffn_size
    config.activation_func = F.silu
    config.init_method = projection_initializer(megalodon.init_mode, hidden_size, expert_size)
    config.output_layer_init_method = projection_initializer(
        megalodon.init_mode, expert_size, hidden_size
    )
    return config
