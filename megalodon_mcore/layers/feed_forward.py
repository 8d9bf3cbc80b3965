"""The normalized feed-forward network, the second half of a block."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.kernels.gates import swiglu
from megalodon_mcore.layers.float32_module import Float32Module
from megalodon_mcore.layers.initialization import weight_initializer
from megalodon_mcore.layers.norms import LayerNormParameters
from megalodon_mcore.layers.submodules import MegalodonLayerSubmodules
from megalodon_mcore.parallel import random_states
from megalodon_mcore.parallel.model_parallel import ModelParallel
from megalodon_mcore.parallel.placement import PlacedModule


class Rescale(Float32Module):
    """A learned factor per channel (released `rescale_nffn`)."""

    def __init__(self, hidden_size: int, start: float, device: torch.device | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.full((hidden_size,), start, dtype=torch.float32, device=device)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Multiplies [..., hidden_size] and keeps its dtype."""
        return (hidden_states * self.weight).to(hidden_states.dtype)


class FeedForward(PlacedModule):
    """What a block's feed-forward networks have in common: how they end."""

    prefix = "feed_forward."

    def _complete(self, layer_number: int, is_mtp_layer: bool, device: torch.device) -> None:
        """Makes what comes last, and marks all parameters; those of experts Megatron has marked.

        Layers that predict further tokens follow the model's own.
        """
        before = self.config.num_layers if is_mtp_layer else 0
        start = 0.1 * 0.5 ** (before + layer_number - 1)
        self.rescale = None
        if self.megalodon.rescale_nffn:
            self.rescale = Rescale(self.config.hidden_size, start, device)
        self.mark_parameters()

    def _end(self, output: Tensor) -> Tensor:
        output = F.dropout(output, self.config.hidden_dropout, self.training)
        return output if self.rescale is None else self.rescale(output)


class MegalodonFeedForward(FeedForward):
    """LayerNorm, then (silu(u W1) * (u W3)) W2, or silu(u W1) W2 without SwiGLU; no biases.

    With SwiGLU `linear_fc1` holds W1 over W3, as Megatron's own MLP does.
    """

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
        hidden_size, ffn_size = config.hidden_size, config.ffn_hidden_size
        self.swiglu = config.gated_linear_unit
        self.norm = submodules.feed_forward_norm(hidden_size, config.layernorm_epsilon, device)
        self.linear_fc1 = submodules.linear_fc1(
            hidden_size,
            2 * ffn_size if self.swiglu else ffn_size,
            config=config,
            init_method=weight_initializer("feed_forward.linear_fc1.weight", megalodon),
            bias=False,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            tp_group=pg_collection.tp,
        )
        self.linear_fc2 = submodules.linear_fc2(
            ffn_size,
            hidden_size,
            config=config,
            init_method=weight_initializer("feed_forward.linear_fc2.weight", megalodon),
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_comm_buffer_name="fc2",
            tp_group=pg_collection.tp,
        )
        self._complete(layer_number, is_mtp_layer, device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[length, batch, hidden_size] to the FFN's output, rescaled, without the residual."""
        if isinstance(self.norm, LayerNormParameters):
            hidden, _ = self.linear_fc1(hidden_states, *self.norm())
        else:
            normalized = self.norm(hidden_states).to(self.config.params_dtype)
            hidden, _ = self.linear_fc1(normalized)
        hidden = swiglu(hidden) if self.swiglu else F.silu(hidden)
        with random_states.for_own_part(self.split):
            hidden = F.dropout(hidden, self.megalodon.hidden_dropout, self.training)
        output, _ = self.linear_fc2(hidden)
        return self._end(output)
