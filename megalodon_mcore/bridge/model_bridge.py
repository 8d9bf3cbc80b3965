"""Answers to Bridge about a model: its provider from a configuration, where every tensor goes.

The tensors are those of `megalodon_mcore.parameters`.
"""

from __future__ import annotations

from itertools import groupby
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

from megalodon_mcore.bridge.parameter_mappings import (
    ColumnPartsMapping,
    HeadsMapping,
    VocabularyMapping,
)
from megalodon_mcore.bridge.provider import MegalodonModelProvider
from megalodon_mcore.config import MegalodonConfig, config_from, names
from megalodon_mcore.conversion.hf_folder import AUTO_MAP, CODE
from megalodon_mcore.parameters import LAYER_PREFIXES, LAYER_ROWS, MODEL_ROWS, Row


@MegatronModelBridge.register_bridge(
    source="MegalodonForCausalLM",
    target=GPTModel,
    provider=MegalodonModelProvider,
    model_type="megalodon",
)
class MegalodonBridge(MegatronModelBridge):
    """Between Megalodon's Hugging Face model and Megatron's."""

    ADDITIONAL_FILE_PATTERNS = list(CODE)

    def provider_bridge(self, hf_pretrained: Any) -> MegalodonModelProvider:
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
    def megatron_to_hf_config(cls, provider: MegalodonModelProvider) -> dict[str, Any]:
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
        mappings = []
        for rows, prefixes in (
            (MODEL_ROWS, ("", "")),
            (LAYER_ROWS, (f"{LAYER_PREFIXES['mcore']}*.", f"{LAYER_PREFIXES['hf']}*.")),
        ):
            present = [row for row in rows if row.exists_in(config)]
            by_parameter = sorted(present, key=lambda row: row.mcore)
            mappings += [
                _mapping(list(parts), *prefixes, config)
                for _, parts in groupby(by_parameter, key=lambda row: row.mcore)
            ]
        return MegatronMappingRegistry(*mappings)


def config_of(hf_config: Any) -> MegalodonConfig:
    """The model that a Hugging Face configuration describes.

    Raises:
        ValueError: as `config_from`.
    """
    values = {theirs: getattr(hf_config, theirs, None) for theirs in names("hf").values()}
    return config_from(values, "hf", "The Hugging Face configuration")


def _mapping(
    rows: list[Row], mcore_prefix: str, hf_prefix: str, config: MegalodonConfig
) -> MegatronParamMapping:
    """The mapping of one Megatron parameter and the rows of the table that it holds."""
    row = rows[0]
    mcore, hf = mcore_prefix + row.mcore, hf_prefix + row.hf
    if len(rows) > 1 and row.part.axis == 1:
        return ColumnPartsMapping(
            mcore,
            {row.hf: hf_prefix + row.hf for row in rows},
            {row.hf: row.shape_in(config)[1] for row in rows},
        )
    if len(rows) > 1:
        gate, up = rows
        return GatedMLPMapping(mcore, gate=hf, up=hf_prefix + up.hf)
    if row.tp is None:
        return ReplicatedMapping(mcore, hf)
    if row.shape.split()[row.tp] == "V":
        return VocabularyMapping(mcore, hf, config.vocab_size)
    if row.by_heads:
        return HeadsMapping(mcore, hf, row.tp, config.num_heads)
    return (ColumnParallelMapping, RowParallelMapping)[row.tp](mcore, hf)
