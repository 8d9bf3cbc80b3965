"""The sequence mixer: TimestepNorm, CEMA and gated chunked attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megalodon_mcore.config import ResolvedMegalodonConfig
from megalodon_mcore.kernels.chunked_attention import AttentionState, chunked_attention
from megalodon_mcore.kernels.rotary import apply_rotary
from megalodon_mcore.kernels.timestep_norm import TimestepNormState
from megalodon_mcore.layers.cema import ComplexEMA
from megalodon_mcore.layers.initialization import concatenated_initializer, projection_initializer
from megalodon_mcore.layers.norms import RMSNorm, TimestepNorm
from megalodon_mcore.layers.query_key import QueryKeyAffine


class MixerState(NamedTuple):
    """What a mixer carries from one piece of a sequence to the next."""

    timestep_norm: TimestepNormState | None = None
    cema: Tensor | None = None
    attention: AttentionState | None = None


class MegalodonMixer(MegatronModule):
    """The first half of a block, up to but without its residual (DESIGN: m, z, q, k, v, r, a).

    `linear_proj` is Wh1 and Wh2 side by side: one product of [m, a * r].
    """

    def __init__(
        self,
        config: TransformerConfig,
        megalodon: ResolvedMegalodonConfig,
        rotary_base: float,
        column_parallel_linear: type,
        row_parallel_linear: type,
        pg_collection: ProcessGroupCollection,
        device: torch.device,
    ) -> None:
        super().__init__(config=config)
        hidden_size, eps = config.hidden_size, config.layernorm_epsilon
        self.megalodon = megalodon
        self.rotary_base = rotary_base
        self.num_heads = config.num_attention_heads
        self.recompute_attention = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

        self.timestep_norm = TimestepNorm(hidden_size, megalodon.norm_num_groups, eps, device)
        self.cema = ComplexEMA(
            hidden_size, megalodon.cema_ndim, device, initialize=config.perform_initialization
        )
        self.cema_norm = RMSNorm(hidden_size, eps, device)
        self.query_key = QueryKeyAffine(megalodon.z_dim, self.num_heads, eps, device)

        def initializer(fan_in: int, fan_out: int):  # noqa: ANN202
            return projection_initializer(megalodon.init_mode, fan_in, fan_out)

        def column(output_size: int) -> torch.nn.Module:
            return column_parallel_linear(
                hidden_size,
                output_size,
                config=config,
                init_method=initializer(hidden_size, output_size),
                bias=True,
                gather_output=False,
                skip_bias_add=False,
                tp_group=pg_collection.tp,
            )

        self.linear_z = column(megalodon.z_dim)
        self.linear_v = column(megalodon.value_dim)
        self.linear_r = column(megalodon.value_dim)
        self.linear_proj = row_parallel_linear(
            hidden_size + megalodon.value_dim,
            hidden_size,
            config=config,
            init_method=concatenated_initializer(
                [
                    initializer(hidden_size, hidden_size),
                    initializer(megalodon.value_dim, hidden_size),
                ],
                [hidden_size, megalodon.value_dim],
            ),
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=pg_collection.tp,
        )

    def forward(
        self,
        hidden_states: Tensor,
        state: MixerState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, MixerState | None]:
        """[length, batch, hidden_size] to the update of the same shape, and the outgoing state."""
        state = state or MixerState()
        hidden_dropout = self.megalodon.hidden_dropout
        normalized, norm_state = self.timestep_norm(
            hidden_states, state.timestep_norm, return_state
        )
        normalized = normalized.to(self.config.params_dtype)
        averages, cema_state = self.cema(normalized, state.cema, return_state)
        mixed = F.dropout(self.cema_norm(averages), hidden_dropout, self.training)

        query, key = self.query_key(self.linear_z(mixed)[0])
        value = F.silu(self.linear_v(normalized)[0]).unflatten(-1, (self.num_heads, -1))
        gate = F.silu(self.linear_r(mixed)[0])
        attended, attention_state = self._attend(query, key, value, state.attention, return_state)
        gated = F.dropout(attended * gate, hidden_dropout, self.training)
        update, _ = self.linear_proj(torch.cat([mixed, gated], dim=-1))

        if not return_state:
            return update, None
        return update, MixerState(norm_state, cema_state, attention_state)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: AttentionState | None,
        return_state: bool,
    ) -> tuple[Tensor, AttentionState | None]:
        chunk_size = self.megalodon.chunk_size
        offset = 0 if state is None else state.key.shape[1]
        outgoing = None

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            nonlocal outgoing
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
            query = apply_rotary(query, self.rotary_base, offset, chunk_size)
            key = apply_rotary(key, self.rotary_base, offset, chunk_size)
            attended, outgoing = chunked_attention(
                query,
                key,
                value,
                chunk_size,
                state=state,
                dropout_p=self.config.attention_dropout if self.training else 0.0,
                return_state=return_state,
            )
            return attended.transpose(0, 1).flatten(-2)

        if self.recompute_attention and self.training and not return_state:
            return tensor_parallel.checkpoint(attend, False, query, key, value), None
        return attend(query, key, value), outgoing
