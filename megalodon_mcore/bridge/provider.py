"""The model in Bridge's form: a configuration that builds Megatron's GPTModel with our layers."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch.nn import functional as F

from megalodon_mcore.config import (
    SIZES,
    MegalodonConfig,
    MegalodonSize,
    ResolvedMegalodonConfig,
    config_from_environment,
)
from megalodon_mcore.conversion.architecture import Architecture
from megalodon_mcore.options import refusal, refusals
from megalodon_mcore.spec import ARGUMENT_PREFIX, MegalodonSpec
from megalodon_mcore.throughput import training_flops_per_token
from megalodon_mcore.validation import check_layout

SEQUENCE_ORDER = "zigzag"
"""How Bridge's get_batch cuts sequences for context parallelism."""


def megalodon_block_spec(
    config: MegalodonModelProvider, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """What the provider calls for the layers of one pipeline stage."""
    groups = config._pg_collection
    return config.megalodon_spec().block_submodules(
        config,
        rotary_base=config.rotary_base,
        position_embedding_type=config.position_embedding_type,
        vp_stage=vp_stage,
        pp_rank=groups.pp.rank() if groups is not None else None,
    )


@dataclass
class MegalodonModelProvider(GPTModelProvider):
    """Builds a Megalodon from Megatron's configuration and `megalodon_*` values.

    Those are `megalodon_mcore.config.MegalodonConfig`'s, None where they follow from hidden_size.
    What is set on a provider comes before the environment variable MEGALODON_CONFIG, and that
    before the values of the model that `of` was given.
    """

    transformer_layer_spec: Callable = megalodon_block_spec
    transformer_impl: str = "local"
    position_embedding_type: str = "none"
    normalization: str = "RMSNorm"
    activation_func: Callable = F.silu
    add_bias_linear: bool = False
    share_embeddings_and_output_weights: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    should_pad_vocab: bool = True

    megalodon_num_heads: int | None = None
    megalodon_chunk_size: int = 2048
    megalodon_z_dim: int | None = None
    megalodon_value_dim: int | None = None
    megalodon_cema_ndim: int = 16
    megalodon_norm_num_groups: int | None = None
    megalodon_rescale_nffn: bool = False
    megalodon_scale_embedding: bool = False
    megalodon_hidden_dropout: float = 0.0
    megalodon_init_mode: str = "he"

    @classmethod
    def of(cls, model: Architecture | MegalodonSize | str, **values: Any) -> MegalodonModelProvider:
        """The provider of a model from its architecture, a size or a size's name.

        Args:
            model: as said.
            **values: of fields, over the model's own.
        """
        if isinstance(model, str):
            model = SIZES[model]
        if isinstance(model, MegalodonSize):
            fields = _fields_of_size(model)
        else:
            fields = _fields_of_architecture(model)
        provider = cls(**(fields | values))
        provider._models_own = {name: z for name, z in fields.items() if name not in values}
        return provider

    def finalize(self) -> None:
        """Checks all values once they are set, before anything is built.

        Raises:
            ValueError: a value does not fit; one sentence names it and what would work.
        """
        for name, value in config_from_environment().items():
            if not self._is_set(ARGUMENT_PREFIX + name):
                setattr(self, ARGUMENT_PREFIX + name, value)
        if self.megalodon_num_heads is None:
            self.megalodon_num_heads = self.num_attention_heads
        for name, derived in (
            ("kv_channels", self.hidden_size // self.num_attention_heads),
            ("num_query_groups", self.num_attention_heads),
        ):
            if getattr(self, name) not in (None, derived):
                raise ValueError(refusal(name, getattr(self, name), refusals()[name]))
        # Ranks can share a Megalodon head; Megatron wants a multiple, which no layer goes by.
        heads = math.lcm(self.megalodon_num_heads, self.tensor_model_parallel_size)
        self.num_attention_heads = self.num_query_groups = heads
        self.kv_channels = None
        # The output layer is Megatron's own whatever the others are.
        if not _has_fused_accumulation():
            self.gradient_accumulation_fusion = False
        super().finalize()
        megalodon, order = self.megalodon_spec().check(self, self.position_embedding_type)
        check_layout(self, megalodon, order, self.seq_length)

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """The model of this pipeline stage."""
        if self.megalodon_num_heads is None:
            self.finalize()
        return super().provide(pre_process, post_process, vp_stage)

    def megalodon_spec(self) -> MegalodonSpec:
        """Builds the layers with this provider's values."""
        own = MegalodonConfig(**self._own_values())
        size = MegalodonSize(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            ffn_hidden_size=self.ffn_hidden_size,
            swiglu=self.gated_linear_unit,
            rotary_base=self.rotary_base,
            tied_embeddings=self.share_embeddings_and_output_weights,
            megalodon=own,
        )
        return MegalodonSpec(size, SEQUENCE_ORDER)

    def resolved(self) -> ResolvedMegalodonConfig:
        """Megalodon's values, every width a number."""
        own = MegalodonConfig(**self._own_values())
        return own.resolve(self.hidden_size, own.num_heads or self.num_attention_heads)

    def architecture(self) -> Architecture:
        """The model's architecture, as `megalodon-mcore convert` knows it."""
        return Architecture(
            vocab_size=self.vocab_size,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            rotary_base=float(self.rotary_base),
            norm_eps=self.layernorm_epsilon,
            swiglu=self.gated_linear_unit,
            tied=self.share_embeddings_and_output_weights,
            dropout=self.hidden_dropout,
            attention_dropout=self.attention_dropout,
            **dataclasses.asdict(self.resolved()),
        )

    def _is_set(self, name: str) -> bool:
        """Whether somebody gave a field another value than the class or the model has for it."""
        own = getattr(self, "_models_own", {}).get(
            name, type(self).__dataclass_fields__[name].default
        )
        return getattr(self, name) != own

    def _own_values(self) -> dict[str, Any]:
        names = (field.name for field in dataclasses.fields(MegalodonConfig))
        return {name: getattr(self, ARGUMENT_PREFIX + name) for name in names}

    def _get_num_floating_point_operations(self, batch_size: int) -> float:
        """What Bridge logs TFLOP/s by."""
        flops = training_flops_per_token(
            self.resolved(),
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            swiglu=self.gated_linear_unit,
            vocab_size=self.vocab_size,
            seq_length=self.seq_length,
        )
        return flops * batch_size * self.seq_length


def _fields_of_size(size: MegalodonSize) -> dict[str, Any]:
    return {
        "num_layers": size.num_layers,
        "hidden_size": size.hidden_size,
        "num_attention_heads": size.num_attention_heads,
        "ffn_hidden_size": size.ffn_hidden_size,
        "gated_linear_unit": size.swiglu,
        "rotary_base": size.rotary_base,
        "share_embeddings_and_output_weights": size.tied_embeddings,
    } | _prefixed(dataclasses.asdict(size.megalodon))


def _fields_of_architecture(architecture: Architecture) -> dict[str, Any]:
    return {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "num_attention_heads": architecture.num_heads,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "gated_linear_unit": architecture.swiglu,
        "rotary_base": architecture.rotary_base,
        "layernorm_epsilon": architecture.norm_eps,
        "share_embeddings_and_output_weights": architecture.tied,
        "hidden_dropout": architecture.dropout,
        "attention_dropout": architecture.attention_dropout,
        "vocab_size": architecture.vocab_size,
    } | _prefixed(dataclasses.asdict(architecture.megalodon_values()))


def _prefixed(values: dict[str, Any]) -> dict[str, Any]:
    return {ARGUMENT_PREFIX + name: value for name, value in values.items()}


def _has_fused_accumulation() -> bool:
    """Whether Megatron's own linear layers can add gradients up in their kernel (apex)."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
