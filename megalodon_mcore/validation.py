"""Refuses, before anything is built, what a Megatron configuration asks for and Megalodon lacks."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

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
    for value, argument in (
        (config.tensor_model_parallel_size, "--tensor-model-parallel-size"),
        (config.context_parallel_size, "--context-parallel-size"),
        (config.expert_model_parallel_size, "--expert-model-parallel-size"),
    ):
        if value > 1:
            raise ValueError(
                f"{argument} is {value}, which Megalodon cannot do yet; take 1 and spread the "
                "work with data and pipeline parallelism."
            )
    for unsupported, argument in (
        (config.sequence_parallel, "--sequence-parallel"),
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
