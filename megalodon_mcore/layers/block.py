"""A Megalodon block as the layer of Megatron's TransformerBlock, and the model's final norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    BaseTransformerLayer,
    TransformerLayer,
    get_transformer_layer_offset,
)
from megatron.core.utils import get_pg_rank
from torch import Tensor
from torch.nn import functional as F

from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.layers.feed_forward import MegalodonFeedForward
from megalodon_mcore.layers.mixer import MegalodonMixer
from megalodon_mcore.layers.norms import TimestepNorm
from megalodon_mcore.layers.submodules import MegalodonLayerSubmodules
from megalodon_mcore.parallel.documents import Documents
from megalodon_mcore.parallel.model_parallel import ModelParallel
from megalodon_mcore.parallel.shared_parameters import mark_sequence_parallel


class MegalodonLayer(MegatronModule, BaseTransformerLayer):
    """One block with the two-hop residual: y = x + mixer(x), out = x + FFN(y).

    The first layer also scales the embedding, where the configuration asks for it: Megatron's
    embedding has no such option, and nothing lies between the two.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MegalodonLayerSubmodules,
        megalodon: MegalodonConfig,
        sequence_order: str,
        documents: Documents,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.layer_number = layer_number + get_transformer_layer_offset(
            config, vp_stage, get_pg_rank(pg_collection.pp)
        )
        self.embedding_scale = (
            math.sqrt(config.hidden_size)
            if megalodon.scale_embedding and self.layer_number == 1
            else None
        )
        self.recompute_feed_forward = (
            config.recompute_granularity == "selective" and "mlp" in config.recompute_modules
        )
        common: dict[str, Any] = {
            "config": config,
            "megalodon": megalodon,
            "submodules": submodules,
            "pg_collection": pg_collection,
            "parallel": ModelParallel(
                pg_collection, config.sequence_parallel, sequence_order, documents
            ),
            "device": parameter_device(config),
        }
        self.documents = documents
        self.mixer = MegalodonMixer(**common)
        self.feed_forward = MegalodonFeedForward(layer_number=self.layer_number, **common)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        inference_context: object | None = None,
        packed_seq_params: object | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Called by TransformerBlock; masks and rotary embeddings it passes are not needed.

        Raises:
            ValueError: impossible bounds of documents, or an inference context, which a block
                cannot honour.
        """
        if inference_context is not None:
            raise ValueError(
                "Megalodon does not generate in Megatron; use `megalodon-mcore generate`."
            )
        self.documents.set(packed_seq_params)
        if self.documents.packed:
            # A pipeline's stage receives the row in the shape of the rows that were put together.
            hidden_states = hidden_states.reshape(-1, 1, hidden_states.shape[-1])
        return self._block(hidden_states), context

    def _block(self, hidden_states: Tensor) -> Tensor:
        if self.embedding_scale is not None:
            hidden_states = hidden_states * self.embedding_scale
        update = self.mixer(hidden_states)
        middle = hidden_states + F.dropout(update, self.config.hidden_dropout, self.training)
        if self.recompute_feed_forward and self.training:
            output = self._recomputed_feed_forward(middle)
        else:
            output = self.feed_forward(middle)
        return hidden_states + output

    def _recomputed_feed_forward(self, hidden_states: Tensor) -> Tensor:
        if not self.config.fp8:
            return tensor_parallel.checkpoint(self.feed_forward, False, hidden_states)
        # It sees to it that the second pass scales as the first, and leaves histories alone.
        from megatron.core.extensions.transformer_engine import te_checkpoint

        return te_checkpoint(
            self.feed_forward,
            False,
            tensor_parallel.random.get_cuda_rng_tracker,
            self.feed_forward.tp_group,
            hidden_states,
        )


# Megatron-FSDP and its checkpoints know by this class what to shard as one unit.
TransformerLayer.register(MegalodonLayer)


class FinalTimestepNorm(TimestepNorm):
    """The model's last norm, called by TransformerBlock with hidden states alone."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        num_groups: int,
        sequence_order: str,
        documents: Documents,
    ) -> None:
        super().__init__(hidden_size, num_groups, eps, parameter_device(config))
        self.output_dtype = config.params_dtype
        self.parallel = ModelParallel(
            ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "tp_cp"]),
            config.sequence_parallel,
            sequence_order,
            documents,
        )
        if self.parallel.sequence_parallel:
            mark_sequence_parallel(self)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalizes [length, batch, hidden_size]."""
        shards = self.parallel.residual_shards(*hidden_states.shape[:2])
        normalized = super().forward(hidden_states, shards)
        return normalized.to(self.output_dtype).contiguous()


def parameter_device(config: TransformerConfig) -> torch.device:
    """Where Megatron's own layers put their parameters under this configuration."""
    if config.init_model_with_meta_device:
        return torch.device("meta")
    if config.use_cpu_initialization or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
