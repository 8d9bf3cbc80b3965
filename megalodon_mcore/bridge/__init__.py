"""Megalodon in NVIDIA's Megatron-Bridge: importing this package registers it.

    import megalodon_mcore.bridge
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained("my-model", trust_remote_code=True)
    model = bridge.to_megatron_provider().provide_distributed_model(wrap_with_ddp=False)
    bridge.save_hf_pretrained(model, "trained-model")

Nothing outside this package imports Megatron-Bridge.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from megalodon_mcore.bridge.model_bridge import MegalodonBridge
from megalodon_mcore.bridge.provider import MegalodonHybridProvider, MegalodonModelProvider
from megalodon_mcore.hf import MegalodonConfig, MegalodonForCausalLM

__all__ = ["MegalodonBridge", "MegalodonHybridProvider", "MegalodonModelProvider"]

# Lets Bridge read an export's configuration without running the code in its folder.
AutoConfig.register("megalodon", MegalodonConfig, exist_ok=True)
AutoModelForCausalLM.register(MegalodonConfig, MegalodonForCausalLM, exist_ok=True)
