"""The plugin of vLLM, by which `vllm serve FOLDER` serves an exported folder; needs no Megatron."""

ARCHITECTURE = "MegalodonForCausalLM"
HYBRID = "MegalodonHybridForCausalLM"
"""A model with attention layers beside its blocks, of which vLLM has to know by the name."""


def register() -> None:
    """Makes Megalodons known to vLLM, which calls this in each of its processes."""
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_REGISTRY
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

    from megalodon_mcore.serving.config import ServedConfig, Shape
    from megalodon_mcore.serving.limits import Limits

    if "MEGALODON" not in MambaAttentionBackendEnum.__members__:
        backend = "megalodon_mcore.serving.batch.MegalodonBackend"
        MambaAttentionBackendEnum.register("MEGALODON", backend)
    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    # vLLM's own registry comes before the code beside the weights, which then nobody has to trust.
    _CONFIG_REGISTRY[ServedConfig.model_type] = ServedConfig
    MODEL_ARCH_CONFIG_CONVERTORS[ServedConfig.model_type] = Shape
    for name in (ARCHITECTURE, HYBRID):
        MODELS_CONFIG_MAP[name] = Limits
        ModelRegistry.register_model(name, f"megalodon_mcore.serving.model:{name}")
