"""Refuses, before anything is built, what a Megatron configuration asks for and Megalodon lacks."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

from megalodon_mcore.accounting import ModelShape
from megalodon_mcore.config import ResolvedMegalodonConfig
from megalodon_mcore.planning.layout import ParallelLayout
from megalodon_mcore.planning.layout import check_layout as check_cuts

RECOMPUTE_MODULES = ("core_attn", "mlp")


def check_supported(config: TransformerConfig, position_embedding_type: str) -> None:
    """Checks the options that Megatron would accept and a Megalodon block would ignore.

    Raises:
        ValueError: the first option that does not fit; one sentence names it and what would work.
    """
    if position_embedding_type not in ("none", "rope"):
        raise ValueError(
            f"--position-embedding-type is {position_embedding_type}, which would add positions to "
            "the embedding; Megalodon rotates inside its chunks, so take none."
        )
    if config.expert_model_parallel_size > 1:
        raise ValueError(
            f"--expert-model-parallel-size is {config.expert_model_parallel_size}, but Megalodon "
            "has no experts; take 1."
        )
    for unsupported, argument in (
        (config.num_moe_experts, "--num-experts"),
        (config.multi_latent_attention, "--multi-latent-attention"),
        (config.mtp_num_layers, "--mtp-num-layers"),
        (config.fp8, "--fp8-format"),
        (config.fp4, "--fp4-format"),
        (config.cuda_graph_impl != "none", "--cuda-graph-impl"),
        (config.use_mup, "--use-mup"),
        (config.qk_layernorm, "--qk-layernorm"),
        (config.fine_grained_activation_offloading, "--fine-grained-activation-offloading"),
        (config.inference_fuse_tp_communication, "--inference-fuse-tp-communication"),
    ):
        if unsupported:
            raise ValueError(f"{argument} is set, which Megalodon cannot honour; leave it out.")
    if config.hierarchical_context_parallel_sizes:
        raise ValueError(
            "--hierarchical-context-parallel-sizes is set, but Megalodon's exchange has one level; "
            "leave it out."
        )
    if config.num_query_groups not in (None, config.num_attention_heads):
        raise ValueError(
            f"--num-query-groups is {config.num_query_groups}, but every Megalodon head has keys "
            "of its own; leave out --group-query-attention."
        )
    if config.recompute_granularity == "selective":
        unknown = [name for name in config.recompute_modules if name not in RECOMPUTE_MODULES]
        if unknown:
            raise ValueError(
                f"--recompute-modules has {' '.join(unknown)}; Megalodon recomputes "
                f"{' and '.join(RECOMPUTE_MODULES)}."
            )


def check_layout(
    config: TransformerConfig,
    megalodon: ResolvedMegalodonConfig,
    sequence_order: str,
    seq_length: int | None,
) -> None:
    """Checks that the model and its sequences can be cut as the parallel sizes ask.

    Raises:
        ValueError: the first size that does not fit; one sentence names it and what would work.
    """
    tp, cp = config.tensor_model_parallel_size, config.context_parallel_size
    shape = ModelShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.ffn_hidden_size,
        swiglu=config.gated_linear_unit,
        tied_embeddings=False,
        # Megatron pads the vocabulary to a multiple.
        vocab_size=tp,
        megalodon=megalodon,
    )
    uneven = (
        config.num_layers_in_first_pipeline_stage,
        config.num_layers_in_last_pipeline_stage,
        config.account_for_embedding_in_pipeline_split,
        config.account_for_loss_in_pipeline_split,
        config.pipeline_model_parallel_layout,
    )
    layout = ParallelLayout(
        seq_length=2 * cp * tp if seq_length is None else seq_length,
        tp=tp,
        # Stages that differ are Megatron's to check.
        pp=1 if any(uneven) else config.pipeline_model_parallel_size,
        cp=cp,
        sequence_parallel=config.sequence_parallel,
        order=sequence_order,
    )
    check_cuts(shape, layout)
