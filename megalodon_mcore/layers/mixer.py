"""The sequence mixer: TimestepNorm, CEMA and gated chunked attention."""

from __future__ import annotations

import copy
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
from megalodon_mcore.kernels.gates import gated_silu
from megalodon_mcore.kernels.timestep_norm import TimestepNormState
from megalodon_mcore.layers.cema import ComplexEMA
from megalodon_mcore.layers.initialization import concatenated_initializer, projection_initializer
from megalodon_mcore.layers.norms import RMSNorm, TimestepNorm
from megalodon_mcore.layers.query_key import QueryKey
from megalodon_mcore.layers.submodules import Builder, MegalodonLayerSubmodules
from megalodon_mcore.muon import Matrices, mark_matrices
from megalodon_mcore.parallel import dropout_rng
from megalodon_mcore.parallel.checkpoint_shards import (
    TensorShare,
    column_parts_factory,
    sharded_module,
)
from megalodon_mcore.parallel.chunk_prefix import with_chunk_prefixes
from megalodon_mcore.parallel.model_parallel import ModelParallel
from megalodon_mcore.parallel.sequence_shards import SequenceShards
from megalodon_mcore.parallel.shared_parameters import (
    mark_sequence_parallel,
    mark_split,
    start_alike,
    sum_gradient_over,
)
from megalodon_mcore.parallel.tensor_split import TensorSplit


class MixerState(NamedTuple):
    """The state of a mixer between pieces of a sequence."""

    timestep_norm: TimestepNormState | None = None
    cema: Tensor | None = None
    attention: AttentionState | None = None


class MegalodonMixer(MegatronModule):
    """The first half of a block, without its residual (m, z, q, k, v, r, a of examples/model.md).

    `linear_proj` is Wh1 and Wh2 side by side: one product of [m, a * r].

    A tensor-parallel rank runs CEMA on its channels of the whole (context-parallel share of the)
    sequence, attends with its heads or its value columns of one, and ends in one reduction.
    """

    def __init__(
        self,
        config: TransformerConfig,
        megalodon: ResolvedMegalodonConfig,
        rotary_base: float,
        submodules: MegalodonLayerSubmodules,
        pg_collection: ProcessGroupCollection,
        parallel: ModelParallel,
        device: torch.device,
    ) -> None:
        super().__init__(config=config)
        hidden_size, eps = config.hidden_size, config.layernorm_epsilon
        self.megalodon = megalodon
        self.tp_group = pg_collection.tp
        self.parallel = parallel
        self.split = split = TensorSplit(
            pg_collection.tp, megalodon.num_heads, parallel.sequence_parallel
        )
        self.recompute_attention = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

        self.timestep_norm = TimestepNorm(hidden_size, megalodon.norm_num_groups, eps, device)
        self.cema = ComplexEMA(
            hidden_size,
            megalodon.cema_ndim,
            device,
            initialize=config.perform_initialization,
            share=split.rank,
            shares=split.size,
        )
        self.cema_norm = RMSNorm(hidden_size, eps, device)
        head_dim = megalodon.z_dim // megalodon.num_heads
        self.query_key = QueryKey(
            split.heads, head_dim, eps, rotary_base, megalodon.chunk_size, device
        )

        def initializer(fan_in: int, fan_out: int):  # noqa: ANN202
            return projection_initializer(megalodon.init_mode, fan_in, fan_out)

        # Their inputs are gathered before and gradients of those summed after, once for all three.
        column_config = copy.copy(config)
        column_config.sequence_parallel = False
        # Nothing is left to overlap with, and Transformer Engine's buffers have no name for these.
        column_config.tp_comm_overlap = False
        if split.shares_heads:
            # Its gradient is summed in a hook, which a fused accumulation would pass by.
            shared_config = copy.copy(column_config)
            shared_config.gradient_accumulation_fusion = False

        def column(build: Builder, output_size: int, shared: bool = False) -> torch.nn.Module:
            return build(
                hidden_size,
                output_size // split.head_shares if shared else output_size,
                config=shared_config if shared else column_config,
                init_method=initializer(hidden_size, output_size),
                bias=True,
                gather_output=False,
                skip_bias_add=False,
                disable_grad_reduce=True,
                tp_group=split.own_group() if shared else pg_collection.tp,
            )

        self.linear_z = column(submodules.linear_z, megalodon.z_dim, shared=split.shares_heads)
        self.linear_v = column(submodules.linear_v, megalodon.value_dim)
        self.linear_r = column(submodules.linear_r, megalodon.value_dim)
        self.proj_columns = [hidden_size // split.size, megalodon.value_dim // split.size]
        self.linear_proj = submodules.linear_proj(
            hidden_size + megalodon.value_dim,
            hidden_size,
            config=config,
            init_method=concatenated_initializer(
                [
                    initializer(hidden_size, hidden_size),
                    initializer(megalodon.value_dim, hidden_size),
                ],
                self.proj_columns,
            ),
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_comm_buffer_name="proj",
            tp_group=pg_collection.tp,
        )
        mark_matrices(self.linear_proj.weight, Matrices(self.proj_columns, axis=1))
        if split.size > 1:
            self._keep_ranks_in_step()

    def _keep_ranks_in_step(self) -> None:
        split = self.split
        for parameter in self.cema.parameters():
            mark_split(parameter, axis=0)
        if split.sequence_parallel:
            mark_sequence_parallel(self.timestep_norm)
        # Every rank computes it whole, and sees the gradient of what it goes on to compute.
        sum_gradient_over(self.cema_norm.weight, split.group)
        for parameter in self.query_key.parameters():
            mark_split(parameter, axis=1, counts_here=split.rank_in_head == 0)
        if split.shares_heads:
            for parameter in self.linear_z.parameters():
                mark_split(parameter, axis=0, counts_here=split.rank_in_head == 0)
                start_alike(parameter, split.head_group())
            rows = [self.linear_z.weight.shape[0]]
            mark_matrices(self.linear_z.weight, Matrices(rows, 0, split.ranks_per_head))
            for parameter in (*self.linear_z.parameters(), *self.query_key.parameters()):
                sum_gradient_over(parameter, split.head_group())

    def forward(
        self,
        hidden_states: Tensor,
        state: MixerState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, MixerState | None]:
        """[length, batch, hidden_size] to the update of the same shape, and the outgoing state.

        The length is this rank's share. States go with whole sequences on a single rank.
        """
        state = state or MixerState()
        hidden_dropout = self.megalodon.hidden_dropout
        split = self.split
        normalized, norm_state = self.timestep_norm(
            hidden_states,
            self.parallel.residual_shards(hidden_states.shape[0]),
            state.timestep_norm,
            return_state,
        )
        normalized = split.whole_sequence(normalized.to(self.config.params_dtype))
        shards = self.parallel.context_shards(normalized.shape[0])
        averages, cema_state = self.cema(
            split.own_channels(normalized), shards, state.cema, return_state
        )
        mixed = self.cema_norm(split.all_channels(averages))
        with dropout_rng.for_common_part(split):
            mixed = F.dropout(mixed, hidden_dropout, self.training)

        projections = (self.linear_z(mixed)[0], self.linear_v(normalized)[0])
        projections = (*projections, self.linear_r(mixed)[0])
        if self.recompute_attention and self.training and not return_state:
            gated = tensor_parallel.checkpoint(self._gated_attention, False, *projections)
            attention_state = None
        else:
            gated, attention_state = self._gated_attention_and_state(
                *projections, state.attention, return_state
            )
        update, _ = self.linear_proj(torch.cat([split.own_channels(mixed), gated], dim=-1))

        if not return_state:
            return update, None
        return update, MixerState(norm_state, cema_state, attention_state)

    def _gated_attention(self, z: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        return self._gated_attention_and_state(z, value, gate, None, False)[0]

    def _gated_attention_and_state(
        self,
        z: Tensor,
        value: Tensor,
        gate: Tensor,
        state: AttentionState | None,
        return_state: bool,
    ) -> tuple[Tensor, AttentionState | None]:
        """a * r from what z, v and r are before normalization and SiLU; [length, batch, ...]."""
        value = F.silu(value).unflatten(-1, (self.split.heads, -1))
        shards = self.parallel.context_shards(z.shape[0])
        # Ranks that share a head drop the same of its weights.
        attention_rng = (
            dropout_rng.for_common_part if self.split.shares_heads else dropout_rng.for_own_part
        )
        with attention_rng(self.split):
            if shards is None:
                query, key = self.query_key(z, 0 if state is None else state.key.shape[1])
                attended, state = self._attend(query, key, value, state, return_state)
            else:
                attended = self._attend_shards(z, value, shards)
        gated = gated_silu(gate, attended.flatten(-2))
        with dropout_rng.for_own_part(self.split):
            return F.dropout(gated, self.megalodon.hidden_dropout, self.training), state

    def _attend_shards(self, z: Tensor, value: Tensor, shards: SequenceShards) -> Tensor:
        queries, keys = zip(
            *[
                self.query_key(part, segment.start)
                for segment, part in zip(shards.own, shards.split(z), strict=True)
            ],
            strict=True,
        )
        key = torch.cat(keys) if len(keys) > 1 else keys[0]
        width = key.shape[-1]
        pieces = with_chunk_prefixes(
            shards, torch.cat([key, value], dim=-1), self.megalodon.chunk_size
        )
        attended = []
        for query, (before, held) in zip(queries, pieces, strict=True):
            before = before.transpose(0, 1)
            prefix = AttentionState(before[..., :width], before[..., width:])
            attended.append(self._attend(query, held[..., :width], held[..., width:], prefix)[0])
        return torch.cat(attended) if len(attended) > 1 else attended[0]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: AttentionState | None,
        return_state: bool = False,
    ) -> tuple[Tensor, AttentionState | None]:
        attended, state = chunked_attention(
            *(part.transpose(0, 1) for part in (query, key, value)),
            self.megalodon.chunk_size,
            state=state,
            dropout_p=self.config.attention_dropout if self.training else 0.0,
            return_state=return_state,
        )
        return attended.transpose(0, 1), state

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> dict:
        """Megatron's entries, with the shares that its default does not know."""
        split = self.split
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        shares = {
            "cema": TensorShare(0, split.rank, split.size, 0),
            "query_key": TensorShare(1, split.head_share, split.head_shares, split.rank_in_head),
        }
        if split.shares_heads:
            shares["linear_z"] = TensorShare(
                0, split.head_share, split.head_shares, split.rank_in_head
            )
            # The layer takes itself for the only one of its kind.
            extra_state = sharded[f"{prefix}linear_z._extra_state"]
            extra_state.replica_id = sharded[f"{prefix}linear_v._extra_state"].replica_id
        for name, share in shares.items():
            sharded |= sharded_module(
                getattr(self, name), f"{prefix}{name}.", share, sharded_offsets, metadata
            )
        key = f"{prefix}linear_proj.weight"
        sharded[key] = column_parts_factory(
            sharded[key], self.proj_columns, ["_h1", "_h2"], split.rank, split.size, sharded_offsets
        )
        return sharded
