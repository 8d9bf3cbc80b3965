"""A Megalodon's configuration as vLLM reads it."""

from __future__ import annotations

from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from megalodon_mcore.hf import MegalodonConfig
from megalodon_mcore.serving import HYBRID

DEFAULT_LENGTH = 2**20
"""Of a request, where --max-model-len says nothing: vLLM keeps 5 bytes of it for each request."""


class ServedConfig(MegalodonConfig):
    """The configuration of an exported folder."""

    # What --max-model-len may ask for: the model has no bound, vLLM's positions have one.
    model_max_length: int = 2**31 - 1

    def __post_init__(self, **kwargs: object) -> None:
        """Names the architecture, by which vLLM tells whether there are keys of whole documents."""
        super().__post_init__(**kwargs)
        if self.has("*"):
            self.architectures = [HYBRID]


class Shape(ModelArchConfigConvertorBase):
    """What vLLM asks of a model's shape: that of its attention layers."""

    def get_total_num_attention_heads(self) -> int:
        """Query heads; of blocks the columns of values, which ranks may share as they like."""
        config = self.hf_config
        return config.attention_heads if config.has("*") else config.value_dim

    def get_total_num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.hf_config.num_key_value_heads or 0

    def get_head_size(self) -> int:
        """A head's width."""
        return self.hf_config.head_dim or 0

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        """How long requests may be by default; see ServedConfig.model_max_length for the bound."""
        return DEFAULT_LENGTH, "megalodon_mcore's default"
