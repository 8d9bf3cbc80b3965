"""What is not served: refused in a sentence, before a model is built."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.config import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

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
        compilation.cudagraph_mode = _graphs(vllm_config)
        if compilation.cudagraph_mode != CUDAGraphMode.NONE and current_platform.is_cuda_alike():
            _leave_a_page_each(vllm_config, current_platform.get_device_total_memory())


def _graphs(options: VllmConfig) -> CUDAGraphMode:
    """The steps that CUDA graphs hold: those of single tokens.

    Tables of pieces are made on the host, and experts' numbers of tokens asked of the device.
    """
    given = options.compilation_config.cudagraph_mode
    eager = options.model_config.enforce_eager or options.optimization_level == 0
    if options.model_config.hf_config.has("EX") or (given is None and eager):
        graphs = CUDAGraphMode.NONE
    else:
        graphs = CUDAGraphMode.FULL_DECODE_ONLY if given is None else given.without_piecewise()
    if given not in (None, graphs):
        logger.warning("cudagraph_mode is %s; of this model it is %s.", given.name, graphs.name)
    return graphs


# Of a GPU's memory that is left by the weights; steps take the rest.
SHARE_OF_PAGES = 0.8


def _leave_a_page_each(options: VllmConfig, memory: int) -> None:
    """Lowers --max-num-seqs to what has pages in so many bytes: graphs are recorded for as many."""
    from megalodon_mcore.serving.block import state_dtypes, state_shapes

    model, cache, scheduler = options.model_config, options.cache_config, options.scheduler_config
    ranks, config = options.parallel_config.tensor_parallel_size, model.hf_config
    shapes, dtypes = state_shapes(config, ranks), state_dtypes(model.dtype)
    page = sum(math.prod(z) * t.itemsize for z, t in zip(shapes, dtypes, strict=True))
    blocks = sum(symbol in "MX" for symbol in config.symbols)
    weights = sum(file.stat().st_size for file in Path(model.model).glob("*.safetensors")) / ranks
    room = cache.kv_cache_memory_bytes or memory * cache.gpu_memory_utilization - weights
    most = max(1, int(SHARE_OF_PAGES * room / (page * blocks)))
    if scheduler.max_num_seqs > most:
        logger.warning(
            "--max-num-seqs is %d, but about %d requests' states have room: it is lowered to that.",
            *(scheduler.max_num_seqs, most),
        )
        scheduler.max_num_seqs = most


def _refused(options: VllmConfig) -> list[tuple[object, str]]:
    """What is asked for, and what to say if it is."""
    model, cache, ranks = options.model_config, options.cache_config, options.parallel_config
    config, tensor, offload = model.hf_config, ranks.tensor_parallel_size, options.offload_config
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
            cache.mamba_ssm_cache_dtype != "auto",
            f"--mamba-ssm-cache-dtype is {cache.mamba_ssm_cache_dtype}; averages are float32, so "
            "it takes auto.",
        ),
        (
            cache.mamba_block_size not in (None, model.max_model_len),
            f"--mamba-block-size is {cache.mamba_block_size}, but a page holds a request whatever "
            "its length; leave it out.",
        ),
        (
            cache.mamba_cache_mode != "none",
            f"--mamba-cache-mode is {cache.mamba_cache_mode}, but no prefix is cached; leave it "
            "out.",
        ),
        (
            cache.user_specified_block_size and not config.has("*"),
            f"--block-size is {cache.block_size}, but no layer of the model keeps tokens in "
            "blocks; leave it out.",
        ),
        (
            options.kv_transfer_config or cache.kv_offloading_size,
            "--kv-transfer-config or --kv-offloading-size is set, but keys and values alone would "
            "be moved; leave it out.",
        ),
        (
            offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size,
            "--cpu-offload-gb or --offload-group-size is set, but the weights stay on the device; "
            "leave it out.",
        ),
        (
            ranks.decode_context_parallel_size > 1 or ranks.prefill_context_parallel_size > 1,
            "--decode-context-parallel-size or --prefill-context-parallel-size is set, but a "
            "request is not cut among ranks; take --tensor-parallel-size.",
        ),
        (
            ranks.use_ubatching,
            "--enable-dbo or --ubatch-size is set, but a step is computed as one; leave it out.",
        ),
    ]
