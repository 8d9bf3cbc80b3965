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
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch

from megalodon_mcore import cpu
from megalodon_mcore.config import CONFIG_VARIABLE, MegalodonSize
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

    Operators take their portable path, which keeps for backward what the kernels of a GPU do, but
    for some states of CEMA.
    """
    autocast = torch.autocast.__init__

    def known_autocast(context: object, device_type: str, *args: object, **kwargs: object) -> None:
        autocast(context, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    random = "megatron.core.tensor_parallel.random"
    with (
        patch("torch.cuda.current_device", lambda: META),
        patch.dict(os.environ, {dispatch.VARIABLE: "torch"}),
        patch("torch.autocast.__init__", known_autocast),
        # They look for the current device's generator.
        patch(f"{random}._get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        patch(f"{random}._set_cuda_rng_state", lambda *_, **__: None),
    ):
        yield


def build_stage(
    size: MegalodonSize,
    vocab_size: int,
    layout: ParallelLayout,
    stage: int,
    layers: int,
    device: torch.device = META,
) -> torch.nn.Module:
    """The GPTModel of a pipeline stage, in the groups that fake_rank made.

    Args:
        size: a size whose Megalodon values are resolved.
        vocab_size: padded.
        layout: that of the groups.
        stage: from 0.
        layers: of every stage.
        device: meta, or the CPU.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megalodon_mcore.spec import MegalodonSpec

    # That it is deprecated helps nobody here.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    config = transformer_config(size, layout, layers * layout.pp)
    config.init_model_with_meta_device = device == META
    built = {name: getattr(config, name) for name in ("num_layers", "num_attention_heads")}
    size = dataclasses.replace(size, **built)
    with device, patch.dict(os.environ):
        # Its values are in the size.
        os.environ.pop(CONFIG_VARIABLE, None)
        model = GPTModel(
            config=config,
            transformer_layer_spec=MegalodonSpec(size, layout.order),
            vocab_size=vocab_size,
            max_sequence_length=layout.seq_length,
            pre_process=stage == 0,
            post_process=stage == layout.pp - 1,
            share_embeddings_and_output_weights=size.tied_embeddings,
            position_embedding_type="none",
            rotary_base=size.rotary_base,
        )
    return model.bfloat16() if layout.bf16 else model


def transformer_config(
    size: MegalodonSize, layout: ParallelLayout, num_layers: int
) -> TransformerConfig:
    """Megatron's configuration of a size in a layout."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=size.hidden_size,
        # It wants a multiple of TP, while ranks can share Megalodon's own heads.
        num_attention_heads=math.lcm(size.num_attention_heads, layout.tp),
        ffn_hidden_size=size.ffn_hidden_size,
        gated_linear_unit=size.swiglu,
        activation_func=torch.nn.functional.silu,
        layernorm_epsilon=1e-5,
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


def check(size: MegalodonSize, vocab_size: int, layout: ParallelLayout) -> None:
    """Checks that the model and its sequences can be cut so.

    Raises:
        ValueError: the first value that does not fit; one sentence names it and what would work.
    """
    from megalodon_mcore.argument_values import in_one_sentence
    from megalodon_mcore.validation import check_layout

    layout.check(size.num_layers)
    with in_one_sentence():
        # Uneven stages are checked above.
        layers = layout.pp if layout.layers_by_stage else size.num_layers
        config = transformer_config(size, layout, layers)
    check_layout(config, size.megalodon, layout.order, layout.seq_length)
    if vocab_size % layout.tp:
        padded = math.ceil(vocab_size / (128 * layout.tp)) * 128 * layout.tp
        raise ValueError(
            f"--vocab-size is {vocab_size}, which --tp {layout.tp} does not divide; take {padded}, "
            "to which Megatron would pad it."
        )
