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

from megalodon_mcore.config import MegalodonConfig, layers_of_a_depth
from megalodon_mcore.layers.expert_feed_forward import ExpertFeedForward
from megalodon_mcore.layers.feed_forward import MegalodonFeedForward
from megalodon_mcore.layers.mixer import MegalodonMixer
from megalodon_mcore.layers.norms import TimestepNorm
from megalodon_mcore.layers.submodules import MegalodonLayerSubmodules
from megalodon_mcore.parallel.documents import Documents
from megalodon_mcore.parallel.model_parallel import ModelParallel
from megalodon_mcore.parallel.shared_parameters import mark_sequence_parallel


class MegalodonLayer(MegatronModule, BaseTransformerLayer):
    """One block with the two-hop residual: y = x + mixer(x), out = x + FFN(y).

    Whether the FFN is a mixture of experts is for the layer's symbol in the configuration to say.

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
        add_layer_offset: bool = True,
        divides_rows: bool = True,
        pp_layer_offset: int = 0,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        """With divides_rows, packed hidden states leave as the rows that stages exchange.

        A hybrid stack numbers its layers from the model's first (without add_layer_offset), and
        says where its own start and what a layer is called, which nothing here needs. Layers that
        predict further tokens (is_mtp_layer) are numbered from 1 by themselves; they are of the
        kind of the model's last block.
        """
        super().__init__(config=config)
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.layer_number, self.divides_rows = layer_number, divides_rows
        if add_layer_offset and not is_mtp_layer:
            self.layer_number += get_transformer_layer_offset(
                config, vp_stage, get_pg_rank(pg_collection.pp)
            )
        self.embedding_scale = (
            math.sqrt(config.hidden_size)
            if megalodon.scale_embedding and self.layer_number == 1 and not is_mtp_layer
            else None
        )
        symbol = megalodon.symbols[self.layer_number - 1]
        if is_mtp_layer:
            symbol = layers_of_a_depth(None, megalodon.symbols)
        selective = config.recompute_granularity == "selective"
        # Experts are recomputed by themselves, as Megatron's "moe".
        self.recompute_feed_forward = (
            selective and symbol == "M" and "mlp" in config.recompute_modules
        )
        self.parallel = ModelParallel(
            pg_collection, config.sequence_parallel, sequence_order, documents
        )
        common: dict[str, Any] = {
            "config": config,
            "megalodon": megalodon,
            "submodules": submodules,
            "pg_collection": pg_collection,
            "parallel": self.parallel,
            "device": parameter_device(config),
        }
        self.mixer = MegalodonMixer(**common)
        kind = ExpertFeedForward if symbol == "X" else MegalodonFeedForward
        self.feed_forward = kind(
            layer_number=self.layer_number, is_mtp_layer=is_mtp_layer, **common
        )

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
        documents = self.parallel.documents
        documents.set(packed_seq_params, self.parallel.cp_group)
        if documents.packed and self.divides_rows:
            # A pipeline's stages exchange the one row in the shape of those it was made of.
            rows = self.parallel.rows(hidden_states)
            hidden_states = hidden_states.reshape(-1, rows, hidden_states.shape[-1])
        return self._block(hidden_states), context

    def _block(self, hidden_states: Tensor) -> Tensor:
        if self.embedding_scale is not None:
            hidden_states = hidden_states * self.embedding_scale
        row = one_row(hidden_states) if self.parallel.documents.packed else hidden_states
        update = self.mixer(row)
        middle = row + F.dropout(update, self.config.hidden_dropout, self.training)
        if self.recompute_feed_forward and self.training:
            output = self._recomputed_feed_forward(middle)
        else:
            output = self.feed_forward(middle)
        # A sum and no view, of which Megatron could not free the memory.
        return hidden_states + output.view_as(hidden_states)

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
        """Normalizes [length, batch, hidden_size]; packed rows become one."""
        if self.parallel.documents.packed:
            hidden_states = one_row(hidden_states)
        shards = self.parallel.residual_shards(*hidden_states.shape[:2])
        normalized = super().forward(hidden_states, shards)
        return normalized.to(self.output_dtype).contiguous()


def one_row(hidden_states: Tensor) -> Tensor:
    """[length, batch, D] as [length * batch, 1, D], in which packed rows were put together."""
    return hidden_states.reshape(-1, 1, hidden_states.shape[-1])


def parameter_device(config: TransformerConfig) -> torch.device:
    """Where Megatron's own layers put their parameters under this configuration."""
    if config.init_model_with_meta_device:
        return torch.device("meta")
    if config.use_cpu_initialization or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
