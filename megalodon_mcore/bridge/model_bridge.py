"""Answers to Bridge about a model: its provider from a configuration, where every tensor goes.

The tensors are those of `megalodon_mcore.parameters`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    ColumnParallelMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    ReplicatedMapping,
    RowParallelMapping,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel

from megalodon_mcore.bridge.parameter_mappings import (
    ColumnPartsMapping,
    ExpertMapping,
    HeadsMapping,
    VocabularyMapping,
    parts_of,
)
from megalodon_mcore.bridge.provider import MegalodonHybridProvider, MegalodonModelProvider
from megalodon_mcore.config import MegalodonConfig, config_from, names
from megalodon_mcore.conversion.hf_folder import AUTO_MAP, CODE
from megalodon_mcore.parameters import LAYER_PREFIXES, MODEL_ROWS, Row, layer_rows


@MegatronModelBridge.register_bridge(
    source="MegalodonForCausalLM",
    target=HybridModel,
    provider=MegalodonHybridProvider,
    model_type="megalodon",
)
@MegatronModelBridge.register_bridge(
    source="MegalodonForCausalLM",
    target=GPTModel,
    provider=MegalodonModelProvider,
    model_type="megalodon",
)
class MegalodonBridge(MegatronModelBridge):
    """Between Megalodon's Hugging Face model and Megatron's."""

    ADDITIONAL_FILE_PATTERNS = list(CODE)

    def provider_bridge(
        self, hf_pretrained: Any
    ) -> MegalodonModelProvider | MegalodonHybridProvider:
        """The provider of the model that a Hugging Face configuration describes.

        Raises:
            ValueError: the configuration lacks a value, or has one that does not fit.
        """
        provider = MegalodonModelProvider.of(config_of(hf_pretrained.config))
        dtype = self.dtype_from_hf(hf_pretrained.config, default=torch.float32)
        provider.params_dtype = dtype
        provider.bf16, provider.fp16 = dtype == torch.bfloat16, dtype == torch.float16
        return provider

    @classmethod
    def megatron_to_hf_config(
        cls, provider: MegalodonModelProvider | MegalodonHybridProvider
    ) -> dict[str, Any]:
        """The config.json of a provider's model."""
        config = provider.config()
        dtype = torch.bfloat16 if provider.bf16 else torch.float32
        return config.named("hf") | {
            "model_type": cls.MODEL_TYPE,
            "architectures": [cls.SOURCE_NAME],
            "auto_map": AUTO_MAP,
            "rope_theta": float(config.rotary_base),
            "dtype": str(torch.float16 if provider.fp16 else dtype).removeprefix("torch."),
        }

    def mapping_registry(self) -> MegatronMappingRegistry:
        """A mapping for every parameter of the model that `hf_config` describes."""
        config = config_of(self.hf_config)
        in_model = [row for row in MODEL_ROWS if row.exists_in(config)]
        # Which parameters a layer has says what layer it is.
        in_layers = [row for symbol in set(config.symbols) for row in layer_rows(config, symbol)]
        layers = (f"{LAYER_PREFIXES['mcore']}*.", f"{LAYER_PREFIXES['hf']}*.")
        mappings = []
        for rows, prefixes in ((in_model, ("", "")), (in_layers, layers)):
            by_parameter: dict[str, list[Row]] = {}
            for row in dict.fromkeys(rows):
                by_parameter.setdefault(row.mcore, []).append(row)
            for parts in by_parameter.values():
                mappings += _mappings(parts, *prefixes, config)
        return MegatronMappingRegistry(*mappings)

    def _merge_lora_adapter_weights(
        self,
        megatron_model: list[torch.nn.Module],
        converted_weights_dict: dict[str, torch.Tensor],
        adapter_weights: list[Any],
    ) -> dict[str, torch.Tensor]:
        """Adds an adapter to the exported weights; Bridge tells parts by names of its own models.

        Raises:
            ValueError: it is an adapter of experts, or of another kind.
        """
        if not converted_weights_dict:
            return converted_weights_dict
        adapter, *others = adapter_weights
        base = adapter.global_base_prefix
        if others or adapter.adapter_key or EXPERTS in base:
            raise ValueError(
                f"{base} has adapters that no export can have merged in; fine-tune with --lora, "
                "whose adapters are LoRA's of linear layers."
            )
        mapping = self.mapping_registry().megatron_to_hf_lookup(f"{base}.weight")
        inner, outer = (
            z.weight.float() for z in (adapter.linear_in_weight, adapter.linear_out_weight)
        )
        updates = parts_of(mapping, adapter.alpha / adapter.dim * (outer @ inner))
        return {
            name: (weight.float() + updates[name].to(weight.device)).to(weight.dtype)
            for name, weight in converted_weights_dict.items()
        }


def config_of(hf_config: Any) -> MegalodonConfig:
    """The model that a Hugging Face configuration describes.

    Raises:
        ValueError: as `config_from`.
    """
    values = {theirs: getattr(hf_config, theirs, None) for theirs in names("hf").values()}
    return config_from(values, "hf", "The Hugging Face configuration")


EXPERTS = "experts.experts."
"""In a name of the table: the experts of a layer, which a checkpoint has in one tensor."""


def _mappings(
    rows: list[Row], mcore_prefix: str, hf_prefix: str, config: MegalodonConfig
) -> list[MegatronParamMapping]:
    """The mappings of one Megatron parameter and the rows of the table that it holds."""
    row = rows[0]
    mcore, hf = mcore_prefix + row.mcore, {row.hf: hf_prefix + row.hf for row in rows}
    layer, _, name = mcore.rpartition(EXPERTS)
    if layer:
        # One expert's axes are one less than those of all.
        return [
            ExpertMapping(layer + form, hf, row.tp - 1)
            for form in (f"experts.local_experts.*.{name}", f"experts.{name}*")
        ]
    return [_mapping(rows, mcore, hf, config)]


def _mapping(
    rows: list[Row], mcore: str, hf: dict[str, str], config: MegalodonConfig
) -> MegatronParamMapping:
    """The mapping of a parameter that is no expert's; `hf` has the names by the rows' own."""
    row, first = rows[0], hf[rows[0].hf]
    if len(rows) > 1 and row.part.axis == 1:
        return ColumnPartsMapping(mcore, hf, {row.hf: row.shape_in(config)[1] for row in rows})
    if len(rows) > 1:
        gate, up = hf.values()
        return GatedMLPMapping(mcore, gate=gate, up=up)
    if row.tp is None:
        return ReplicatedMapping(mcore, first)
    if row.shape.split()[row.tp] == "V":
        return VocabularyMapping(mcore, first, config.vocab_size)
    if row.by_heads:
        return HeadsMapping(mcore, first, row.tp, config.num_heads)
    return (ColumnParallelMapping, RowParallelMapping)[row.tp](mcore, first)
