"""One rank of a large world, alone in this process, over torch's fake process group.

Its collectives return at once and leave their outputs as they were. A rank's share of a model can
be built and run so, to see what it holds, keeps and sends; on the meta device it takes no memory.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch

from megalodon_mcore import cpu
from megalodon_mcore.config import MegalodonConfig
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
    kernels = find_spec("triton") is not None
    launches = patch("triton.runtime.jit.JITFunction.run", lambda *_, **__: None)
    autocast = torch.autocast.__init__

    def known_autocast(context: object, device_type: str, *args: object, **kwargs: object) -> None:
        autocast(context, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    random = "megatron.core.tensor_parallel.random"
    with (
        patch("torch.cuda.current_device", lambda: META),
        patch.dict(os.environ, {dispatch.VARIABLE: "triton" if kernels else "torch"}),
        launches if kernels else nullcontext(),
        patch("torch.autocast.__init__", known_autocast),
        # They look for the current device's generator.
        patch(f"{random}._get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        patch(f"{random}._set_cuda_rng_state", lambda *_, **__: None),
    ):
        yield


def build_stage(
    megalodon: MegalodonConfig,
    layout: ParallelLayout,
    stage: int,
    layers: int,
    device: torch.device = META,
) -> torch.nn.Module:
    """The GPTModel of a pipeline stage, in the groups that fake_rank made.

    Args:
        megalodon: the model; its vocabulary with padding.
        layout: that of the groups.
        stage: from 0.
        layers: of every stage.
        device: meta, or the CPU.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megalodon_mcore.spec import MegalodonSpec

    # That it is deprecated helps nobody here.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    config = transformer_config(megalodon, layout, layers * layout.pp)
    config.init_model_with_meta_device = device == META
    with device:
        model = GPTModel(
            config=config,
            transformer_layer_spec=MegalodonSpec(settled=megalodon, sequence_order=layout.order),
            vocab_size=megalodon.vocab_size,
            max_sequence_length=layout.seq_length,
            pre_process=stage == 0,
            post_process=stage == layout.pp - 1,
            share_embeddings_and_output_weights=megalodon.tied,
            position_embedding_type="none",
            rotary_base=megalodon.rotary_base,
        )
    return model.bfloat16() if layout.bf16 else model


def transformer_config(
    megalodon: MegalodonConfig, layout: ParallelLayout, num_layers: int
) -> TransformerConfig:
    """Megatron's configuration of a model in a layout."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=megalodon.hidden_size,
        # It wants a multiple of TP, while ranks can share Megalodon's own heads.
        num_attention_heads=math.lcm(megalodon.num_heads, layout.tp),
        ffn_hidden_size=megalodon.ffn_hidden_size,
        gated_linear_unit=megalodon.swiglu,
        activation_func=torch.nn.functional.silu,
        layernorm_epsilon=megalodon.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
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
        **RECOMPUTE_OPTIONS[layout.recompute],
    )


def check(megalodon: MegalodonConfig, layout: ParallelLayout) -> None:
    """Checks that the model and its sequences can be cut so.

    Raises:
        ValueError: the first value that does not fit; one sentence names it and what would work.
    """
    from megalodon_mcore.argument_values import in_one_sentence
    from megalodon_mcore.validation import check_layout

    layout.check(megalodon.num_layers)
    with in_one_sentence():
        # Uneven stages are checked above.
        layers = layout.pp if layout.layers_by_stage else megalodon.num_layers
        config = transformer_config(megalodon, layout, layers)
    check_layout(config, megalodon, layout.order, layout.seq_length)
    vocab_size = megalodon.vocab_size
    if vocab_size % layout.tp:
        padded = math.ceil(vocab_size / (128 * layout.tp)) * 128 * layout.tp
        raise ValueError(
            f"--vocab-size is {vocab_size}, which --tp {layout.tp} does not divide; take {padded}, "
            "to which Megatron would pad it."
        )
