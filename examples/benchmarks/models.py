"""The models that are timed, in one process with Megatron's groups."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megalodon_mcore.config import MegalodonConfig

SIZES = {
    "layers": 4,
    "hidden_size": 512,
    "z_dim": 128,
    "value_dim": 1024,
    "ffn": 1280,
    "chunk": 512,
    "groups": 16,
    "vocabulary": 256,
}
"""The 12M model that the peers are timed on."""

SIZES_200M = {
    "layers": 12,
    "hidden_size": 1024,
    "z_dim": 256,
    "value_dim": 2048,
    "ffn": 2560,
    "chunk": 2048,
    "groups": 32,
    "vocabulary": 32_000,
}


@contextlib.contextmanager
def megatron() -> Iterator[None]:
    """Megatron's process groups of this process alone, over gloo (NCCL with a GPU)."""
    from megalodon_mcore import cpu

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    stand_in = cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    stand_in.undo()


def transformer_config(
    dtype: torch.dtype,
    sizes: dict[str, int] = SIZES,
    **options: Any,
) -> Any:
    """Megatron's configuration of these sizes; `options` replace values."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    values: dict[str, Any] = {
        "num_layers": sizes["layers"],
        "hidden_size": sizes["hidden_size"],
        "num_attention_heads": 1,
        "ffn_hidden_size": sizes["ffn"],
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "add_bias_linear": False,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "use_cpu_initialization": True,
    }
    return TransformerConfig(**(values | options))


def megalodon_config(sizes: dict[str, int]) -> MegalodonConfig:
    """The configuration of a Megalodon of these sizes."""
    return MegalodonConfig(
        num_layers=sizes["layers"],
        hidden_size=sizes["hidden_size"],
        num_heads=sizes.get("heads", 1),
        ffn_hidden_size=sizes["ffn"],
        chunk_size=sizes["chunk"],
        z_dim=sizes["z_dim"],
        value_dim=sizes["value_dim"],
        norm_num_groups=sizes["groups"],
        vocab_size=sizes["vocabulary"],
    )


def engine(recipe: str | None = None) -> dict[str, Any]:
    """Megatron's options for Transformer Engine's layers, in an FP8 recipe or in bfloat16."""
    options = {"transformer_impl": "transformer_engine", "use_cpu_initialization": False}
    return options | ({"fp8": "hybrid", "fp8_recipe": recipe} if recipe else {})


def megalodon(
    dtype: torch.dtype = torch.float32, sizes: dict[str, int] = SIZES, **options: Any
) -> torch.nn.Module:
    """GPTModel with Megalodon's spec; `options` replace values of Megatron's configuration."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megalodon_mcore.spec import MegalodonSpec

    config = megalodon_config(sizes)
    return GPTModel(
        config=transformer_config(dtype, sizes, num_attention_heads=config.num_heads, **options),
        transformer_layer_spec=MegalodonSpec(config),
        vocab_size=sizes["vocabulary"],
        max_sequence_length=1 << 20,
        position_embedding_type="none",
    )


def hugging_face(sizes: dict[str, int] = SIZES) -> torch.nn.Module:
    """The Hugging Face model of these sizes."""
    from megalodon_mcore.hf import MegalodonConfig as HuggingFaceConfig
    from megalodon_mcore.hf import MegalodonForCausalLM

    torch.manual_seed(1)
    own = HuggingFaceConfig(**megalodon_config(sizes).named("hf"))
    return MegalodonForCausalLM(own).eval()


def gpt(
    dtype: torch.dtype,
    length: int,
    sizes: dict[str, int] = SIZES,
    fused: bool = False,
    **options: Any,
) -> torch.nn.Module:
    """Megatron's GPT with about as many parameters: 8 heads, an FFN of 4 widths.

    fused: heads of 128 and attention by torch's scaled_dot_product_attention, or by Transformer
    Engine's where `options`, which replace values of Megatron's configuration, ask for it; it needs
    no mask.
    """
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel

    hidden_size = sizes["hidden_size"]
    heads = max(1, hidden_size // 128) if fused else 8
    by_engine = options.get("transformer_impl") == "transformer_engine"
    spec = get_gpt_layer_with_transformer_engine_spec() if by_engine else get_gpt_layer_local_spec()
    if fused and not by_engine:
        spec.submodules.self_attention.submodules.core_attention = FusedAttention
    return GPTModel(
        config=transformer_config(
            dtype, sizes, num_attention_heads=heads, ffn_hidden_size=4 * hidden_size, **options
        ),
        transformer_layer_spec=spec,
        vocab_size=sizes["vocabulary"],
        max_sequence_length=length,
        position_embedding_type="rope",
    )


class FusedAttention(torch.nn.Module):
    """Causal attention of Megatron's [length, batch, heads, width] by torch's fused kernels."""

    def __init__(self, **unused: Any) -> None:
        super().__init__()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *unused: Any,
        **also_unused: Any,
    ) -> torch.Tensor:
        """[length, batch, heads * width]."""
        given = (z.permute(1, 2, 0, 3) for z in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(*given, is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def forward_backward(
    model: torch.nn.Module,
    batch: int,
    length: int,
    mask: torch.Tensor | None = None,
    bounds: list[int] | None = None,
) -> Callable[[], None]:
    """One forward and backward pass on random tokens, gradients thrown away.

    bounds: where documents start in the one row, and its length; None for one document a row.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    tokens = torch.randint(SIZES["vocabulary"], (batch, length))
    positions = torch.arange(length).expand(batch, length)

    def run() -> None:
        packed = None
        if bounds is not None:
            packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(bounds))
        losses = model(tokens, positions, mask, labels=tokens, packed_seq_params=packed)
        losses.mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return run


def training_step(
    model: torch.nn.Module, batch: int, length: int, masked: bool = True
) -> Callable[[], None]:
    """Forward, backward, Megatron's DDP and its Adam, where the model's parameters are."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    config = model.config
    wrapped = Float16Module(config, model) if config.bf16 else model
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), wrapped
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            clip_grad=1.0,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
        ),
        [ddp],
    )
    device = next(model.parameters()).device
    tokens = torch.randint(model.vocab_size, (batch, length), device=device)
    positions = torch.arange(length, device=device).expand(batch, length)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu_(1) if masked else None

    def run() -> None:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        ddp(tokens, positions, mask, labels=tokens).float().mean().backward()
        finalize_model_grads([ddp])
        optimizer.step()

    return run


def matrix_flops(batch: int, length: int, sizes: dict[str, int] = SIZES) -> float:
    """Flops of the matrix products of forward and backward passes: projections and attention."""
    d, z, e, f = (sizes[name] for name in ("hidden_size", "z_dim", "value_dim", "ffn"))
    projections = d * z + 2 * d * e + (d + e) * d + 2 * d * f
    # Half of a chunk's products is above the diagonal.
    attention = (z + e) * min(length, sizes["chunk"]) / 2
    per_token = sizes["layers"] * (projections + attention) + d * sizes["vocabulary"]
    return 6 * per_token * batch * length
