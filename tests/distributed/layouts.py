"""What is trained, and how it is spread over ranks."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from building import megalodon_config, transformer_config
from megalodon_mcore.spec import MegalodonSpec


@dataclass(frozen=True)
class Model:
    """A tiny model and its batches: 4 sequences in micro-batches of 2."""

    num_layers: int = 2
    hidden_size: int = 32
    heads: int = 2
    ffn: int = 48
    swiglu: bool = False
    tied: bool = False
    dropout: float = 0.0
    bf16: bool = False
    optimizer: str = "adam"
    clip_grad: float = 1.0
    vocab_size: int = 64
    sequence_length: int = 48
    global_batch: int = 4
    micro_batch: int = 2
    documents: int | None = None
    """Every sequence is documents of random lengths, multiples of this; None: it is one."""
    own: tuple[tuple[str, Any], ...] = (
        ("chunk_size", 16),
        ("cema_ndim", 4),
        ("norm_num_groups", 4),
    )
    """Values that Megatron has no argument for."""

    def with_megalodon(self, **values: Any) -> "Model":
        """A copy with some of Megalodon's own values replaced."""
        return dataclasses.replace(self, own=(*self.own, *values.items()))


@dataclass(frozen=True)
class Layout:
    """How many ranks share what; Megatron's order of ranks is tp, cp, dp, pp."""

    tp: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    sequence_order: str = "zigzag"
    pp: int = 1
    virtual_stages: int | None = None
    layers_in_first_stage: int | None = None
    layers_in_last_stage: int | None = None
    stages: str | None = None
    """Megatron's --pipeline-model-parallel-layout, such as "Et|ttL"."""
    dp: int = 1
    distributed_optimizer: bool = False
    """With gradients reduced and parameters gathered during the passes."""
    bucket_size: int | None = 2000
    """Elements that are reduced or gathered together, there; None makes one bucket of them all."""
    recompute: str | None = None
    """full or selective"""
    transformer_impl: str = "local"

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def groups(self) -> dict[str, Any]:
        """What parallel_state.initialize_model_parallel takes."""
        return {
            "tensor_model_parallel_size": self.tp,
            "context_parallel_size": self.cp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.virtual_stages,
        }

    def options(self) -> dict[str, Any]:
        """What TransformerConfig takes."""
        recompute = {
            None: {},
            "full": {"recompute_method": "uniform", "recompute_num_layers": 1},
            "selective": {"recompute_modules": ["core_attn", "mlp"]},
        }[self.recompute]
        return {
            **self.groups(),
            **recompute,
            "recompute_granularity": self.recompute,
            "transformer_impl": self.transformer_impl,
            "sequence_parallel": self.sequence_parallel,
            "num_layers_in_first_pipeline_stage": self.layers_in_first_stage,
            "num_layers_in_last_pipeline_stage": self.layers_in_last_stage,
            "pipeline_model_parallel_layout": self.stages,
            # Megatron's command line always asks for it; it forbids that a stage outputs a view.
            "deallocate_pipeline_outputs": True,
        }


def configuration(model: Model, layout: Layout) -> TransformerConfig:
    """Megatron's configuration of the model in the layout."""
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    return transformer_config(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        # Megatron's own layers cannot share a head between ranks; MegalodonConfig has the number.
        heads=max(model.heads, layout.tp),
        ffn=model.ffn,
        swiglu=model.swiglu,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        bf16=model.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        **layout.options(),
    )


def build_chunk(
    model: Model,
    layout: Layout,
    config: TransformerConfig,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> GPTModel:
    """This rank's part of the model, in one (virtual) pipeline stage."""
    megalodon = megalodon_config(
        config,
        tied=model.tied,
        **(dict(model.own) | {"num_heads": model.heads, "hidden_dropout": model.dropout}),
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=MegalodonSpec(megalodon, sequence_order=layout.sequence_order),
        vocab_size=model.vocab_size,
        max_sequence_length=model.sequence_length,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type="none",
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
    )
