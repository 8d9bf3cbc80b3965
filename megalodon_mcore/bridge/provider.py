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

from megalodon_mcore.config import ARGUMENT_PREFIX, FIELDS, OWN, MegalodonConfig, names
from megalodon_mcore.config_sources import settle
from megalodon_mcore.options import refusal, refusals
from megalodon_mcore.parallel.sequence_layout import DOCUMENT_ZIGZAG
from megalodon_mcore.sizes import SIZES
from megalodon_mcore.spec import MegalodonSpec
from megalodon_mcore.throughput import training_flops_per_token
from megalodon_mcore.validation import check_layout


def _own_field(name: str) -> tuple[str, Any, Any]:
    default = FIELDS[name].default
    default = None if default is dataclasses.MISSING else default
    return ARGUMENT_PREFIX + name, FIELDS[name].type, dataclasses.field(default=default)


OwnValues = dataclasses.make_dataclass(
    "OwnValues", [_own_field(name) for name in OWN], module=__name__
)
"""`megalodon_*`: the values of MegalodonConfig that Megatron has no argument for."""


def megalodon_block_spec(
    config: MegalodonModelProvider, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Builds the layers' spec of one pipeline stage; the provider calls it."""
    groups = config._pg_collection
    return config.megalodon_spec().block_submodules(
        config,
        rotary_base=config.rotary_base,
        position_embedding_type=config.position_embedding_type,
        vp_stage=vp_stage,
        pp_rank=groups.pp.rank() if groups is not None else None,
    )


@dataclass
class MegalodonModelProvider(OwnValues, GPTModelProvider):
    """Builds a Megalodon from Megatron's configuration and `megalodon_*` values.

    Those are None where they follow from hidden_size, or from num_attention_heads.
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

    @classmethod
    def of(cls, model: MegalodonConfig | str, **values: Any) -> MegalodonModelProvider:
        """The provider of a model from its configuration or a size's name.

        Args:
            model: as said. A size has no vocabulary of its own.
            **values: of fields, over the model's own.
        """
        config = SIZES[model] if isinstance(model, str) else model
        fields = config.named("core") | {"num_attention_heads": config.num_heads}
        if isinstance(model, str):
            del fields["vocab_size"]
        provider = cls(**(fields | values))
        provider._models_own = {name: z for name, z in fields.items() if name not in values}
        return provider

    def finalize(self) -> None:
        """Checks all values once they are set, before anything is built.

        Raises:
            ValueError: a value does not fit; one sentence names it and what would work.
        """
        given = [name for name in OWN if self._is_set(ARGUMENT_PREFIX + name)]
        given = {name: getattr(self, ARGUMENT_PREFIX + name) for name in given}
        for name, value in settle(given).items():
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
        """Builds the layers with this provider's values.

        Bridge cuts packed sequences apart, and a plain row as if it were one of them.
        """
        return MegalodonSpec(settled=self.config(), sequence_order=DOCUMENT_ZIGZAG)

    def config(self) -> MegalodonConfig:
        """The model's configuration, every width a number."""
        values = {ours: getattr(self, theirs) for ours, theirs in names("core").items()}
        values = {name: value for name, value in values.items() if value is not None}
        return MegalodonConfig(**({"num_heads": self.num_attention_heads} | values))

    def _is_set(self, name: str) -> bool:
        """Whether somebody gave a field another value than the class or the model has for it."""
        own = getattr(self, "_models_own", {}).get(
            name, type(self).__dataclass_fields__[name].default
        )
        return getattr(self, name) != own

    def _get_num_floating_point_operations(self, batch_size: int) -> float:
        """The operations of a batch, by which Bridge logs TFLOP/s."""
        flops = training_flops_per_token(self.config(), self.seq_length)
        return flops * batch_size * self.seq_length


def _has_fused_accumulation() -> bool:
    """Whether Megatron's own linear layers can add gradients up in their kernel (apex)."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
