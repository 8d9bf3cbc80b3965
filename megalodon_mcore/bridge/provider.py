"""The model in Bridge's form: configurations that build Megatron's models with our layers.

MegalodonModelProvider builds a GPTModel of Megalodon blocks, MegalodonHybridProvider a HybridModel
that has Megatron's own layers beside them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch.nn import functional as F

from megalodon_mcore.config import (
    ARGUMENT_PREFIX,
    BLOCKS,
    FIELDS,
    OWN,
    MegalodonConfig,
    layers_of,
    names,
)
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


def megalodon_spec(config: _Megalodon) -> MegalodonSpec:
    """What a provider builds its layers with; the hooks on Megatron's models resolve it.

    Bridge cuts packed sequences apart, and a plain row as if it were one of them.
    """
    return MegalodonSpec(settled=config.config(), sequence_order=DOCUMENT_ZIGZAG)


@dataclass
class _Megalodon(OwnValues):
    """What both providers have in common, beside one of Bridge's own.

    `megalodon_*` values are None where they follow from hidden_size, or from num_attention_heads.
    What is set on a provider comes before the environment variable MEGALODON_CONFIG, and that
    before the values of the model that `of` was given.
    """

    def finalize(self) -> None:
        """Checks all values once they are set, before anything is built.

        Raises:
            ValueError: a value does not fit; one sentence names it and what would work.
        """
        if self.mtp_num_layers:
            raise ValueError(
                f"mtp_num_layers is {self.mtp_num_layers}, but Bridge's conversion has no place "
                "for layers that predict further tokens; leave it out, or take megalodon-mcore "
                "pretrain."
            )
        given = [name for name in OWN if self._is_set(ARGUMENT_PREFIX + name)]
        given = {name: getattr(self, ARGUMENT_PREFIX + name) for name in given}
        for name, value in settle(given).items():
            setattr(self, ARGUMENT_PREFIX + name, value)
        if self.megalodon_num_heads is None:
            self.megalodon_num_heads = self.num_attention_heads
        self._settle_attention()
        # The output layer is Megatron's own whatever the others are.
        if not _has_fused_accumulation():
            self.gradient_accumulation_fusion = False
        super().finalize()
        pattern = self.hybrid_layer_pattern
        megalodon, order = megalodon_spec(self).check(
            self, self.position_embedding_type, self.rotary_base, pattern
        )
        check_layout(self, megalodon, order, self.seq_length, pattern)

    def _settle_attention(self) -> None:
        """Settles the values of layers of attention."""

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel | HybridModel:
        """The model of this pipeline stage."""
        if self.megalodon_num_heads is None:
            self.finalize()
        return super().provide(pre_process, post_process, vp_stage)

    def config(self) -> MegalodonConfig:
        """The model's configuration, every width a number."""
        values = {ours: getattr(self, theirs) for ours, theirs in names("core").items()}
        values = {name: value for name, value in values.items() if value is not None}
        pattern, experts = self.hybrid_layer_pattern, self.num_moe_experts
        layers = layers_of(pattern, self.num_layers or 0, experts, self.moe_layer_freq)
        values |= {"layers": layers, "num_layers": len(layers)}
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


@dataclass
class MegalodonModelProvider(_Megalodon, GPTModelProvider):
    """Builds a Megalodon from Megatron's configuration and `megalodon_*` values."""

    transformer_layer_spec: Callable = megalodon_spec
    transformer_impl: str = "local"
    position_embedding_type: str = "none"
    normalization: str = "RMSNorm"
    activation_func: Callable = F.silu
    add_bias_linear: bool = False
    share_embeddings_and_output_weights: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    should_pad_vocab: bool = True

    # No field: this is no model of a pattern.
    hybrid_layer_pattern = None

    @staticmethod
    def of(
        model: MegalodonConfig | str, **values: Any
    ) -> MegalodonModelProvider | MegalodonHybridProvider:
        """The provider of a model from its configuration or a size's name.

        Args:
            model: as said. A size has no vocabulary of its own.
            **values: of fields, over the model's own.
        """
        config = SIZES[model] if isinstance(model, str) else model
        made, fields = MegalodonModelProvider, {"num_attention_heads": config.num_heads}
        fields |= config.named("core")
        blocks = [symbol for symbol in config.symbols if symbol in BLOCKS]
        if len(set(blocks)) > 1:
            fields["moe_layer_freq"] = [int(symbol == "X") for symbol in blocks]
        if set(config.symbols) - set(BLOCKS):
            made = MegalodonHybridProvider
            fields["hybrid_layer_pattern"] = config.symbols.replace("X", "M")
        if isinstance(model, str):
            del fields["vocab_size"]
        provider = made(**(fields | values))
        provider._models_own = {name: z for name, z in fields.items() if name not in values}
        return provider

    def _settle_attention(self) -> None:
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


@dataclass
class MegalodonHybridProvider(_Megalodon, HybridModelProvider):
    """Builds a Megalodon with layers beside its blocks, which hybrid_layer_pattern names.

    Attention has num_attention_heads, blocks have megalodon_num_heads.
    """

    hybrid_stack_spec: Callable = megalodon_spec
    transformer_impl: str = "local"
    normalization: str = "LayerNorm"
    activation_func: Callable = F.silu
    should_pad_vocab: bool = True
    # Megatron's fused one is Transformer Engine's, which computes on a GPU alone.
    apply_rope_fusion: bool = False


def _has_fused_accumulation() -> bool:
    """Whether Megatron's own linear layers can add gradients up in their kernel (apex)."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
