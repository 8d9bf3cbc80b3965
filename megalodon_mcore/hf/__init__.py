"""The stand-alone Hugging Face model; its files *_megalodon.py are copied into every export."""

from megalodon_mcore.hf.cache_megalodon import MegalodonCache
from megalodon_mcore.hf.configuration_megalodon import MegalodonConfig
from megalodon_mcore.hf.modeling_megalodon import MegalodonForCausalLM, MegalodonModel

# So that save_pretrained writes the files beside the weights.
MegalodonConfig.register_for_auto_class()
MegalodonModel.register_for_auto_class("AutoModel")
MegalodonForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["MegalodonCache", "MegalodonConfig", "MegalodonForCausalLM", "MegalodonModel"]
