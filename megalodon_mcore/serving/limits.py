"""What is not served: refused in a sentence, before a model is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


class Limits(VerifyAndUpdateConfig):
    """vLLM calls it with all of a server's options."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuses what cannot be served, and settles what follows from the model.

        Raises:
            ValueError: an option asks for it; one sentence names it and what would work.
        """
        for asked, sentence in _refused(vllm_config):
            if asked:
                raise ValueError(sentence)
        cache = vllm_config.cache_config
        if cache.enable_prefix_caching:
            # With attention layers vLLM turns it on unasked.
            logger.warning(
                "Prefix caching is off: a Megalodon's state is that after all of its tokens."
            )
            cache.enable_prefix_caching = False
        cache.mamba_cache_mode = "none"
        # One page holds all that a request ever needs of a layer.
        cache.mamba_block_size = vllm_config.model_config.max_model_len
        compilation = vllm_config.compilation_config
        compilation.mode = CompilationMode.NONE
        # A graph holds a step of single tokens; tables of pieces are made on the host. Experts'
        # numbers of tokens are asked of the device.
        given = compilation.cudagraph_mode
        graphs = CUDAGraphMode.FULL_DECODE_ONLY if given is None else given.without_piecewise()
        experts = vllm_config.model_config.hf_config.has("EX")
        compilation.cudagraph_mode = CUDAGraphMode.NONE if experts else graphs


def _refused(options: VllmConfig) -> list[tuple[object, str]]:
    """What is asked for, and what to say if it is."""
    model, cache, ranks = options.model_config, options.cache_config, options.parallel_config
    config, tensor = model.hf_config, ranks.tensor_parallel_size
    heads = config.num_attention_heads
    shared = [("value_dim", config.value_dim)]
    if config.has("M-"):
        shared.append(("intermediate_size", config.intermediate_size))
    if config.has("EX"):
        shared.append(("moe_intermediate_size", config.moe_intermediate_size))
        if shared_expert := config.shared_expert_intermediate_size:
            shared.append(("shared_expert_intermediate_size", shared_expert))
    if config.has("*"):
        shared.append(("num_key_value_heads", config.num_key_value_heads))
    return [
        (
            not config.has("MX"),
            f"layer_symbols is {config.symbols!r}; the final norm's state lies with a block's, so "
            "it takes a block (M or X) at least.",
        ),
        *(
            (
                value % tensor,
                f"--tensor-parallel-size is {tensor}; ranks share {name}, so it takes a divisor of "
                f"{value}.",
            )
            for name, value in shared
        ),
        (
            heads % tensor and tensor % heads,
            f"--tensor-parallel-size is {tensor}; ranks share num_attention_heads or values in a "
            f"head, so it takes a divisor or a multiple of {heads}.",
        ),
        (
            ranks.enable_expert_parallel,
            "--enable-expert-parallel is set, but ranks share every expert's columns; leave it "
            "out.",
        ),
        (
            model.runner_type != "generate",
            f"--runner is {model.runner_type}; a Megalodon generates, so it takes generate.",
        ),
        (
            ranks.pipeline_parallel_size > 1,
            f"--pipeline-parallel-size is {ranks.pipeline_parallel_size}; a Megalodon is served by "
            "one stage, on more devices with --tensor-parallel-size.",
        ),
        (
            cache.enable_prefix_caching and not model.is_hybrid,
            "--enable-prefix-caching is set, but a Megalodon's state is that after all of its "
            "tokens; leave it out.",
        ),
        (
            options.speculative_config,
            "--speculative-config is set, but a Megalodon's state cannot take steps back; leave it "
            "out.",
        ),
        (options.lora_config, "--enable-lora is set; merge adapters into the weights instead."),
        (
            model.quantization,
            f"quantization is {model.quantization!r}; the weights are served in --dtype.",
        ),
        (
            cache.cache_dtype != "auto",
            f"--kv-cache-dtype is {cache.cache_dtype}; states have the model's type, so it takes "
            "auto.",
        ),
        (
            cache.mamba_cache_dtype != "auto",
            f"--mamba-cache-dtype is {cache.mamba_cache_dtype}; running averages are float32 and "
            "float64, keys and values of the model's type, so it takes auto.",
        ),
        (
            options.kv_transfer_config,
            "--kv-transfer-config is set, but it moves keys and values alone; leave it out.",
        ),
    ]
