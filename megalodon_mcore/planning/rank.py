"""One rank of a large world, alone in this process, over torch's fake process group.

Its collectives return at once and leave their outputs as they were. A rank's share of a model can
be built and run so, to see what it holds, keeps and sends; on the meta device it takes no memory.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from torch import Tensor

from megalodon_mcore import cpu
from megalodon_mcore.config import BLOCKS, MegalodonConfig
from megalodon_mcore.kernels import dispatch
from megalodon_mcore.planning.layout import ParallelLayout

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

META = torch.device("meta")

RECOMPUTE_OPTIONS = {
    "none": {},
    "selective": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "mlp"],
    },
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}

EVEN_EXPERTS = {
    "moe_token_dispatcher_type": "alltoall",
    "moe_expert_capacity_factor": 1.0,
    "moe_pad_expert_input_to_capacity": True,
    "moe_router_load_balancing_type": "none",
}
"""Options by which every expert gets as many tokens as any other, whatever the data."""


@contextmanager
def fake_rank(
    layout: ParallelLayout, stage: int = 0, tp_rank: int = 0, cp_rank: int = 0
) -> Iterator[None]:
    """Megatron's process groups as this rank of the layout has them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    stand_in = cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    # Megatron's default order of ranks: tp, cp, dp, pp from the fastest to the slowest.
    rank = tp_rank + layout.tp * (cp_rank + layout.cp * layout.dp * stage)
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=layout.ranks
    )
    try:
        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            create_gloo_process_groups=False,
        )
        torch.manual_seed(1234)
        model_parallel_cuda_manual_seed(1234)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        stand_in.undo()


@contextmanager
def meta_as_cuda() -> Iterator[None]:
    """Where Megatron makes a tensor on the current CUDA device it is on the meta device.

    Operators take the kernels of a GPU, whose launches do nothing, to keep what they keep; without
    Triton they keep some statistics less.
    """
    from megalodon_mcore.layers import attention_layer

    kernels = find_spec("triton") is not None
    launches = patch("triton.runtime.jit.JITFunction.run", lambda *_, **__: None)
    autocast = torch.autocast.__init__

    def known_autocast(context: object, device_type: str, *args: object, **kwargs: object) -> None:
        autocast(context, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    random = "megatron.core.tensor_parallel.random"
    dispatcher = "megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher"
    places = attention_layer._places
    with (
        patch("torch.cuda.current_device", lambda: META),
        patch.dict(os.environ, {dispatch.VARIABLE: "triton" if kernels else "torch"}),
        launches if kernels else nullcontext(),
        patch("torch.autocast.__init__", known_autocast),
        patch("torch.nn.functional.scaled_dot_product_attention", _attention_of_a_gpu),
        # A mask of all positions is no smaller in this machine's memory.
        patch.object(attention_layer, "_places", lambda spans: [z.to(META) for z in places(spans)]),
        # It makes one on the current device, for counts that EVEN_EXPERTS leaves it none of.
        patch(f"{dispatcher}.cuda_dtoh_stream", object()),
        # Transformer Engine's, which the router takes where there is one, keeps what torch's does.
        patch("megatron.core.transformer.moe.moe_utils.te_general_gemm", None),
        # They look for the current device's generator.
        patch(f"{random}._get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        patch(f"{random}._set_cuda_rng_state", lambda *_, **__: None),
    ):
        yield


def _attention_of_a_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's flash attention or, beside a mask and in float32, its memory-efficient one.

    On the meta device torch itself takes the path that keeps every score.
    """
    aten = torch.ops.aten
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (z.repeat_interleave(groups, dim=1) for z in (key, value))
    if attn_mask is not None:
        # As torch makes it, for every layer anew.
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:2], *attn_mask.shape)
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def build_stage(
    megalodon: MegalodonConfig,
    layout: ParallelLayout,
    stage: int,
    layers: str,
    device: torch.device = META,
) -> torch.nn.Module:
    """The GPTModel or HybridModel of a pipeline stage, in the groups that fake_rank made.

    Args:
        megalodon: the model; its vocabulary with padding.
        layout: that of the groups.
        stage: from 0.
        layers: the symbols of every stage's, in the place of the model's own.
        device: meta, or the CPU.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megalodon_mcore.spec import MegalodonSpec

    # That it is deprecated helps nobody here.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    symbols = layers * layout.pp
    megalodon = dataclasses.replace(megalodon, num_layers=len(symbols), layers=symbols)
    config = transformer_config(megalodon, layout)
    config.init_model_with_meta_device = device == META
    spec = MegalodonSpec(settled=megalodon, sequence_order=layout.order)
    if set(layers) <= set(BLOCKS):
        made, own = GPTModel, {"transformer_layer_spec": spec}
    else:
        pattern = "|".join([layers.replace("X", "M")] * layout.pp)
        made, own = HybridModel, {"hybrid_stack_spec": spec, "hybrid_layer_pattern": pattern}
    with device:
        model = made(
            config=config,
            vocab_size=megalodon.vocab_size,
            max_sequence_length=layout.seq_length,
            pre_process=stage == 0,
            post_process=stage == layout.pp - 1,
            share_embeddings_and_output_weights=megalodon.tied,
            position_embedding_type=megalodon.attention_positions,
            rotary_base=megalodon.rotary_base,
            rotary_percent=megalodon.rotary_percent,
            **own,
        )
    return model.bfloat16() if layout.bf16 else model


def transformer_config(megalodon: MegalodonConfig, layout: ParallelLayout) -> TransformerConfig:
    """Megatron's configuration of a model in a layout."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    values = {name: z for name, z in megalodon.named("core").items() if name in known}
    recompute = RECOMPUTE_OPTIONS[layout.recompute]
    if not megalodon.has("attention_heads"):
        # It wants a multiple of TP, while ranks can share Megalodon's own heads.
        values["num_attention_heads"] = math.lcm(megalodon.num_heads, layout.tp)
    if megalodon.has("num_experts"):
        values |= EVEN_EXPERTS | {"expert_model_parallel_size": layout.ep}
        if layout.recompute == "selective":
            recompute = {**recompute, "recompute_modules": ["core_attn", "mlp", "moe"]}
    if "X" in megalodon.symbols:
        values["moe_layer_freq"] = [int(z == "X") for z in megalodon.symbols if z in BLOCKS]
    return TransformerConfig(
        **values | {"add_bias_linear": megalodon.linear_bias},
        activation_func=torch.nn.functional.silu,
        transformer_impl="local",
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.splits_residual,
        bf16=layout.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        **recompute,
    )


def check(megalodon: MegalodonConfig, layout: ParallelLayout) -> None:
    """Checks that the model and its sequences can be cut so.

    Raises:
        ValueError: the first value that does not fit; one sentence names it and what would work.
    """
    from megalodon_mcore.argument_values import in_one_sentence
    from megalodon_mcore.validation import check_layout

    layout.check(megalodon)
    if megalodon.has("num_experts") and layout.tp > 1 and not layout.sequence_parallel:
        raise ValueError(
            f"--no-sequence-parallel is set with --tp {layout.tp}, but Megatron trains experts "
            "over tensor-parallel ranks with sequence parallelism alone; leave it out."
        )
    with in_one_sentence():
        config = transformer_config(megalodon, layout)
    # Uneven stages are checked above.
    config.num_layers = layout.pp if layout.layers_by_stage else megalodon.num_layers
    check_layout(config, megalodon, layout.order, layout.seq_length)
    vocab_size = megalodon.vocab_size
    if vocab_size % layout.tp:
        padded = math.ceil(vocab_size / (128 * layout.tp)) * 128 * layout.tp
        raise ValueError(
            f"--vocab-size is {vocab_size}, which --tp {layout.tp} does not divide; take {padded}, "
            "to which Megatron would pad it."
        )
