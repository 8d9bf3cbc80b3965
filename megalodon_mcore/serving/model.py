"""A Megalodon as vLLM runs it: embedding, layers, final TimestepNorm and output projection."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree, IsHybrid

from megalodon_mcore.serving.beside import PlainLayer, place_of
from megalodon_mcore.serving.block import (
    FINAL,
    MegalodonBlock,
    PagedTimestepNorm,
    state_dtypes,
    state_shapes,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def layer_of(vllm_config: VllmConfig, index: int, prefix: str) -> MegalodonBlock | PlainLayer:
    """A model's layer, by its symbol."""
    symbol = vllm_config.model_config.hf_config.symbols[index]
    if symbol in "MX":
        return MegalodonBlock(vllm_config, index, prefix, symbol == "X")
    return PlainLayer(vllm_config, symbol, prefix)


class MegalodonModel(nn.Module):
    """Embedding, layers and final TimestepNorm, whose state lies in the last block's page."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            layer_of(vllm_config, index, f"{prefix}.layers.{index}")
            for index in range(config.num_hidden_layers)
        )
        self.norm = PagedTimestepNorm(config)

    @property
    def blocks(self) -> list[MegalodonBlock]:
        """The layers that have states."""
        return [layer for layer in self.layers if isinstance(layer, MegalodonBlock)]

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Token numbers [steps], or embeddings [steps, D] before scaling, to [steps, D]."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.hidden_size)
        place = place_of(self.config, positions, x)
        for layer in self.layers:
            x = layer(x, place)
        last = self.blocks[-1]
        mean, var, *_ = last.kv_cache
        return self.norm(x, last.batch(x), mean[:, FINAL], var[:, FINAL])


class _CausalLM(nn.Module, HasInnerState):
    """A Megalodon with its output projection; parameters have the names of the export."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.model = MegalodonModel(vllm_config, f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [steps, D] of token numbers [steps], before scaling."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """Hidden states [steps, D]; positions int64 [steps] are in the batch's segments, too."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [steps, vocabulary] of hidden states [steps, D]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Takes an export's weights, each of them once.

        Raises:
            ValueError: one is missing, unknown or there twice, or has another shape.
        """
        parameters, loaded = dict(self.named_parameters()), set()
        for name, weight in weights:
            if self.config.tie_word_embeddings and name == "lm_head.weight":
                continue
            if name not in parameters or name in loaded:
                what = "twice" if name in loaded else "and the model has no such parameter"
                raise ValueError(f"The weights have {name} {what}; convert the checkpoint anew.")
            parameter = parameters[name]
            try:
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight)
            except (AssertionError, RuntimeError) as error:
                raise ValueError(
                    f"The weights have {name} of shape {list(weight.shape)}, which does not fit "
                    "config.json; convert the checkpoint anew."
                ) from error
            loaded.add(name)
        if missing := sorted(parameters.keys() - loaded):
            raise ValueError(f"The weights lack {', '.join(missing)}; convert the checkpoint anew.")
        for layer in self.model.blocks:
            layer.cema.renew()
        return loaded

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple, ...]:
        """Of a page's tensors."""
        ranks = vllm_config.parallel_config.tensor_parallel_size
        return state_shapes(vllm_config.model_config.hf_config, ranks)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Of a page's tensors."""
        return state_dtypes(vllm_config.model_config.dtype)


class MegalodonForCausalLM(_CausalLM, IsAttentionFree):
    """A model without attention over documents: a request's memory is constant."""


class MegalodonHybridForCausalLM(_CausalLM, IsHybrid):
    """A model with such layers, whose keys and values grow."""
