"""The sequence mixer: TimestepNorm, CEMA and gated chunked attention."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.kernels.chunked_attention import chunked_attention
from megalodon_mcore.kernels.gates import gated_silu
from megalodon_mcore.layers.cema import ComplexEMA
from megalodon_mcore.layers.initialization import weight_initializer
from megalodon_mcore.layers.norms import RMSNorm, TimestepNorm
from megalodon_mcore.layers.query_key import QueryKey
from megalodon_mcore.layers.submodules import MegalodonLayerSubmodules
from megalodon_mcore.parallel import random_states
from megalodon_mcore.parallel.chunk_prefix import with_chunk_prefixes
from megalodon_mcore.parallel.model_parallel import ModelParallel
from megalodon_mcore.parallel.placement import PlacedModule
from megalodon_mcore.parallel.sequence_shards import SequenceShards


class MegalodonMixer(PlacedModule):
    """The first half of a block, without its residual (m, z, q, k, v, r, a of examples/model.md).

    `linear_proj` is Wh1 and Wh2 side by side: one product of [m, a * r].

    A tensor-parallel rank runs CEMA on its channels of the whole (context-parallel share of the)
    sequence, attends with its heads or its value columns of one, and ends in one reduction.
    """

    prefix = "mixer."

    def __init__(
        self,
        config: TransformerConfig,
        megalodon: MegalodonConfig,
        submodules: MegalodonLayerSubmodules,
        pg_collection: ProcessGroupCollection,
        parallel: ModelParallel,
        device: torch.device,
    ) -> None:
        super().__init__(config, megalodon, pg_collection, parallel)
        hidden_size, eps = config.hidden_size, config.layernorm_epsilon
        self.parallel, split = parallel, self.split
        self.recompute_attention = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

        self.timestep_norm = TimestepNorm(hidden_size, megalodon.norm_num_groups, eps, device)
        with random_states.for_first_values(config):
            self.cema = ComplexEMA(
                hidden_size,
                megalodon.cema_ndim,
                device,
                initialize=config.perform_initialization,
                share=split.rank,
                shares=split.size,
            )
        self.cema_norm = RMSNorm(hidden_size, eps, device)
        self.query_key = QueryKey(
            split.heads,
            megalodon.head_dim,
            eps,
            megalodon.rotary_base,
            megalodon.chunk_size,
            device,
        )

        # Their inputs are gathered before and gradients of those summed after, once for all three.
        column_config = copy.copy(config)
        column_config.sequence_parallel = False
        # Nothing is left to overlap with, and Transformer Engine's buffers have no name for these.
        column_config.tp_comm_overlap = False
        if split.shares_heads:
            # Its gradient is summed in a hook, which a fused accumulation would pass by.
            shared_config = copy.copy(column_config)
            shared_config.gradient_accumulation_fusion = False

        def column(name: str, output_size: int, shared: bool = False) -> torch.nn.Module:
            return getattr(submodules, name)(
                hidden_size,
                output_size // split.head_shares if shared else output_size,
                config=shared_config if shared else column_config,
                init_method=weight_initializer(f"mixer.{name}.weight", megalodon),
                bias=True,
                gather_output=False,
                skip_bias_add=False,
                disable_grad_reduce=True,
                tp_group=split.own_group() if shared else pg_collection.tp,
            )

        self.linear_z = column("linear_z", megalodon.z_dim, shared=split.shares_heads)
        self.linear_v = column("linear_v", megalodon.value_dim)
        self.linear_r = column("linear_r", megalodon.value_dim)
        self.linear_proj = submodules.linear_proj(
            hidden_size + megalodon.value_dim,
            hidden_size,
            config=config,
            init_method=weight_initializer("mixer.linear_proj.weight", megalodon, split.size),
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_comm_buffer_name="proj",
            tp_group=pg_collection.tp,
        )
        self.mark_parameters()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[length, batch, hidden_size] to the update of the same shape.

        The length is this rank's share.
        """
        hidden_dropout = self.megalodon.hidden_dropout
        split = self.split
        shards = self.parallel.residual_shards(*hidden_states.shape[:2])
        normalized = self.timestep_norm(hidden_states, shards)
        normalized = split.whole_sequence(normalized.to(self.config.params_dtype))
        shards = self.parallel.context_shards(*normalized.shape[:2])
        averages = self.cema(split.own_channels(normalized), shards)
        mixed = self.cema_norm(split.all_channels(averages))
        with random_states.for_common_part(split):
            mixed = F.dropout(mixed, hidden_dropout, self.training)

        projections = (self.linear_z(mixed)[0], self.linear_v(normalized)[0])
        projections = (*projections, self.linear_r(mixed)[0])
        if self.recompute_attention and self.training:
            attend = functools.partial(self._gated_attention, shards)
            gated = tensor_parallel.checkpoint(attend, False, *projections)
        else:
            gated = self._gated_attention(shards, *projections)
        update, _ = self.linear_proj(torch.cat([split.own_channels(mixed), gated], dim=-1))
        return update

    def _gated_attention(
        self, shards: SequenceShards, z: Tensor, value: Tensor, gate: Tensor
    ) -> Tensor:
        """a * r from what z, v and r are before normalization and SiLU; [length, batch, ...]."""
        value = F.silu(value).unflatten(-1, (self.split.heads, -1))
        # Ranks that share a head drop the same of its weights.
        attention_rng = (
            random_states.for_common_part if self.split.shares_heads else random_states.for_own_part
        )
        query, key = self.query_key(z, shards.segments)
        key, value, before = with_chunk_prefixes(shards, key, value, self.megalodon.chunk_size)
        with attention_rng(self.split):
            attended, _ = chunked_attention(
                query,
                key,
                value,
                self.megalodon.chunk_size,
                shards.segments,
                before,
                dropout_p=self.config.attention_dropout if self.training else 0.0,
            )
        gated = gated_silu(gate, attended.flatten(-2))
        with random_states.for_own_part(self.split):
            return F.dropout(gated, self.megalodon.hidden_dropout, self.training)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict:
        """As PlacedModule, with the share of a layer's extra state that Megatron does not know."""
        sharded = super().sharded_state_dict(prefix, *args, **kwargs)
        if self.split.shares_heads:
            # The layer takes itself for the only one of its kind.
            extra_state = sharded[f"{prefix}linear_z._extra_state"]
            extra_state.replica_id = sharded[f"{prefix}linear_v._extra_state"].replica_id
        return sharded
