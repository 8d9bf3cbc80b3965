"""The normalized feed-forward network, the second half of a block."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.kernels.gates import swiglu
from megalodon_mcore.layers.float32_module import Float32Module
from megalodon_mcore.layers.initialization import weight_initializer
from megalodon_mcore.layers.norms import LayerNormParameters
from megalodon_mcore.layers.submodules import MegalodonLayerSubmodules
from megalodon_mcore.parallel import dropout_rng
from megalodon_mcore.parallel.model_parallel import ModelParallel
from megalodon_mcore.parallel.placement import mark_parameters, sharded_by_table
from megalodon_mcore.parallel.tensor_split import TensorSplit


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


class MegalodonFeedForward(MegatronModule):
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
    ) -> None:
        super().__init__(config=config)
        self.megalodon = megalodon
        self.tp_group = pg_collection.tp
        self.split = TensorSplit(pg_collection.tp, megalodon.num_heads, parallel.sequence_parallel)
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
        self.rescale = (
            Rescale(hidden_size, 0.1 * 0.5 ** (layer_number - 1), device)
            if megalodon.rescale_nffn
            else None
        )
        mark_parameters(self, "feed_forward.", megalodon, self.split)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[length, batch, hidden_size] to the FFN's output, rescaled, without the residual."""
        if isinstance(self.norm, LayerNormParameters):
            hidden, _ = self.linear_fc1(hidden_states, *self.norm())
        else:
            normalized = self.norm(hidden_states).to(self.config.params_dtype)
            hidden, _ = self.linear_fc1(normalized)
        hidden = swiglu(hidden) if self.swiglu else F.silu(hidden)
        with dropout_rng.for_own_part(self.split):
            hidden = F.dropout(hidden, self.megalodon.hidden_dropout, self.training)
        output, _ = self.linear_fc2(hidden)
        output = F.dropout(output, self.config.hidden_dropout, self.training)
        return output if self.rescale is None else self.rescale(output)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> dict:
        """Megatron's entries, with W1 and W3 each cut over the ranks, as in Megatron's own MLP."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return sharded_by_table(
            self,
            "feed_forward.",
            self.megalodon,
            self.split,
            sharded,
            sharded_offsets,
            metadata,
            prefix,
        )
