"""A layer of attention over whole documents, beside Megalodon blocks in a hybrid stack."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn import functional as F

from megalodon_mcore.kernels.segments import Segments
from megalodon_mcore.parallel.documents import Documents
from megalodon_mcore.parallel.model_parallel import ModelParallel
from megalodon_mcore.parallel.sequence_shards import SequenceShards


class DocumentAttention(MegatronModule):
    """Causal softmax attention inside documents, the core of Megatron's SelfAttention.

    Queries stay where they are; keys and values of a context-parallel group are gathered, whatever
    the order in which it cuts. Megatron's own core attention knows neither groups nor documents
    without Transformer Engine, and with it two of the orders.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.dropout, self.softmax_scale = dropout, softmax_scale
        # What AttentionLayer gives it.
        self.parallel: ModelParallel

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """[length, batch, heads, width] of queries and groups of keys and values, to [.., D]."""
        length, batch = query.shape[:2]
        shards = self.parallel.context_shards(length, batch)
        if shards.group is not None:
            key, value = (
                gather_from_sequence_parallel_region(z, group=shards.group) for z in (key, value)
            )
        mask = attention_mask(shards, query.device)
        # Ranks have different heads; under sequence parallelism the stack sees to it.
        random = nullcontext() if self.config.sequence_parallel else get_cuda_rng_tracker().fork()
        with random:
            out = F.scaled_dot_product_attention(
                *(z.permute(1, 2, 0, 3) for z in (query, key, value)),
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=mask is None,
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return out.permute(2, 0, 1, 3).reshape(length, batch, -1)


def attention_mask(shards: SequenceShards, device: torch.device) -> Tensor | None:
    """Which keys of all ranks a rank's queries see, bool [queries, keys]; None for plain causal."""
    segments = shards.segments
    if shards.group is None and segments.whole_rows and not segments.continued:
        return None

    def make() -> Tensor:
        ranks = [_places(spans) for spans in shards.layout.spans]
        documents, positions = (torch.cat(z) for z in zip(*ranks, strict=True))
        document, position = ranks[shards.rank]
        seen = (document[:, None] == documents) & (position[:, None] >= positions)
        return seen.to(device)

    return segments.kept(("attention mask", device), make)


def _places(spans: list[Any]) -> tuple[Tensor, Tensor]:
    """The document of each step that a rank holds of a row, and its position in it."""
    documents = [torch.full((span.length,), span.document) for span in spans]
    positions = [torch.arange(span.position, span.position + span.length) for span in spans]
    return torch.cat(documents), torch.cat(positions)


class AttentionLayer(TransformerLayer):
    """Megatron's layer with attention alone, that goes by documents as Megalodon blocks do.

    Its RoPE, where the model has one, counts from each document's start, in every order.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        sequence_order: str,
        documents: Documents,
        rotary_base: float,
        rotary_percent: float,
        pg_collection: ProcessGroupCollection,
        **rest: Any,
    ) -> None:
        super().__init__(config, submodules, pg_collection=pg_collection, **rest)
        self.parallel = ModelParallel(
            pg_collection, config.sequence_parallel, sequence_order, documents
        )
        self.self_attention.core_attention.parallel = self.parallel
        self.rotary_embedding = RotaryEmbedding(
            config.kv_channels,
            rotary_percent,
            rotary_interleaved=config.rotary_interleaved,
            rotary_base=rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
        )

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: object | None = None,
        **kwargs: Any,
    ) -> Any:
        """As TransformerLayer; of `rotary_pos_emb` it only matters whether there is one.

        Raises:
            ValueError: impossible bounds of documents.
        """
        self.parallel.documents.set(packed_seq_params, self.parallel.cp_group)
        if rotary_pos_emb is not None:
            tp = self.parallel.tp_group.size() if self.parallel.sequence_parallel else 1
            shards = self.parallel.context_shards(hidden_states.shape[0] * tp, 1)
            rotary_pos_emb = self._turns(shards.segments, hidden_states.device)
        # Nothing in it goes by documents besides what is settled here.
        return super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)

    def _turns(self, segments: Segments, device: torch.device) -> Tensor:
        """RoPE's angles of a rank's steps, float32 [length, 1, 1, width]."""
        positions = segments.positions(device)[:, 0]
        longest = max(segment.position + segment.length for segment in segments)
        return self.rotary_embedding(longest, packed_seq=True)[positions]
