"""Refuses, before anything is built, what a Megatron configuration asks for and Megalodon lacks."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.options import check_configuration
from megalodon_mcore.parallel.sequence_layout import DOCUMENT_ZIGZAG

RECOMPUTE_MODULES = ("core_attn", "mlp")
RECOMPUTE_OF_EXPERTS = ("moe", "shared_experts")
TRANSFORMER_IMPLEMENTATIONS = ("local", "transformer_engine")

FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 32, "mxfp8": 32}
"""Of what every dimension of a product is a multiple, by Megatron's --fp8-recipe.

Transformer Engine 2.20: cuBLAS wants 16 bytes of alignment of both operands in all three products;
MXFP8 has blocks of 32 along each dimension, and Blackwell computes blockwise scaling as MXFP8.
(Blockwise scaling takes smaller blocks at the edges. Only to gather a rank's hidden states in FP8
it wants multiples of 128; else it says so and gathers in bf16.)
"""


def check_supported(
    config: TransformerConfig, position_embedding_type: str, pattern: str | None = None
) -> None:
    """Checks the options that Megatron would accept and a Megalodon block would ignore.

    pattern: the symbols of the layers of a HybridModel, of which others than M honour more.

    Raises:
        ValueError: the first option that does not fit; one sentence names it and what would work.
    """
    if position_embedding_type not in ("none", "rope"):
        raise ValueError(
            f"--position-embedding-type is {position_embedding_type}, which would add positions to "
            "the embedding; Megalodon rotates inside its chunks, so take none."
        )
    with_experts, with_attention = bool(config.num_moe_experts), "*" in (pattern or "")
    if config.expert_model_parallel_size > 1 and not with_experts:
        raise ValueError(
            f"--expert-model-parallel-size is {config.expert_model_parallel_size}, but there are "
            "no experts; take 1, or --num-experts."
        )
    if with_experts:
        _check_experts(config)
    if config.activation_func is not F.silu and (
        config.gated_linear_unit or config.activation_func is not F.gelu
    ):
        # Ungated GELU is Megatron's default: nobody asked for it.
        name = getattr(config.activation_func, "__name__", config.activation_func)
        raise ValueError(
            f"The activation function is {name}, but Megalodon's FFN computes SiLU; leave out "
            "--squared-relu and --quick-geglu, and take --swiglu for a gated one."
        )
    # What the table of arguments has under another name.
    for unsupported, argument in (
        (config.fp8_param, "--fp8-param-gather"),
        (config.fp8_dot_product_attention, "--fp8-dot-product-attention"),
        (config.fp8_multi_head_attention, "--fp8-multi-head-attention"),
    ):
        if unsupported:
            raise ValueError(f"{argument} is set, which Megalodon cannot honour; leave it out.")
    if config.transformer_impl not in TRANSFORMER_IMPLEMENTATIONS:
        raise ValueError(
            f"--transformer-impl is {config.transformer_impl}; Megalodon takes "
            f"{' or '.join(TRANSFORMER_IMPLEMENTATIONS)}."
        )
    if config.fp8 and config.transformer_impl != "transformer_engine":
        raise ValueError(
            f"--fp8-format is {config.fp8}, but only Transformer Engine's linear layers compute in "
            "FP8; take --transformer-impl transformer_engine."
        )
    if config.fp8 and _name(config.fp8_recipe) not in FP8_MULTIPLES:
        raise ValueError(
            f"--fp8-recipe is {_name(config.fp8_recipe)}; Megalodon takes "
            f"{', '.join(FP8_MULTIPLES)}."
        )
    if config.num_query_groups not in (None, config.num_attention_heads) and not with_attention:
        raise ValueError(
            f"--num-query-groups is {config.num_query_groups}, but every Megalodon head has keys "
            "of its own; leave out --group-query-attention."
        )
    if config.recompute_granularity == "selective":
        known = RECOMPUTE_MODULES + (RECOMPUTE_OF_EXPERTS if with_experts else ())
        unknown = [name for name in config.recompute_modules if name not in known]
        if unknown:
            raise ValueError(
                f"--recompute-modules has {' '.join(unknown)}; Megalodon recomputes "
                f"{' and '.join(known)}."
            )
    check_configuration(config, pattern)


def check_rotation(
    config: TransformerConfig, position_embedding_type: str, rotary_percent: float
) -> None:
    """Checks how layers of attention turn their heads by positions, or that nothing asks for it.

    Raises:
        ValueError: one sentence names the value that does not fit and what would work.
    """
    if position_embedding_type == "none":
        for given, option in (
            (rotary_percent != 1, f"--rotary-percent is {rotary_percent}"),
            (config.rotary_interleaved, "--rotary-interleaved is set"),
        ):
            if given:
                raise ValueError(
                    f"{option}, but --position-embedding-type none turns nothing; take rope, or "
                    "leave it out."
                )
        return
    if not 0 < rotary_percent <= 1:
        raise ValueError(
            f"--rotary-percent is {rotary_percent}; it takes more than 0 and 1 at most."
        )
    width = config.kv_channels
    turned = int(width * rotary_percent)
    if turned < 2 or turned % 2:
        raise ValueError(
            f"--kv-channels is {width}, of which RoPE with --rotary-percent {rotary_percent} would "
            f"turn {turned}; it turns pairs, so take values that make this even."
        )


def check_prediction(
    config: TransformerConfig, sequence_order: str, packed: bool, tied: bool
) -> None:
    """Checks what Megatron's layers that predict further tokens would get wrong.

    It shifts tokens over context-parallel ranks as if they were cut in zigzag, and has no place in
    a checkpoint for a tied output on a stage without the model's start.

    Raises:
        ValueError: one sentence names the value and what would work.
    """
    depths, stages = config.mtp_num_layers, config.pipeline_model_parallel_size
    if depths < 1:
        raise ValueError(f"--mtp-num-layers is {depths}; it takes 1 or more.")
    if tied and stages > 1:
        raise ValueError(
            f"--mtp-num-layers is {depths} and --pipeline-model-parallel-size {stages}, with tied "
            "embeddings, which Megatron cannot save so; add --untie-embeddings-and-output-weights."
        )
    if config.context_parallel_size == 1:
        return
    if sequence_order == "contiguous" or (packed and sequence_order != DOCUMENT_ZIGZAG):
        remedy = "" if packed else ", or --megalodon-sequence-order zigzag"
        raise ValueError(
            f"--mtp-num-layers is {depths}, whose targets Megatron looks for as if ranks had "
            f"{'documents' if packed else 'rows'} in zigzag, but they are cut {sequence_order}; "
            f"take --context-parallel-size 1{remedy}."
        )


def _check_experts(config: TransformerConfig) -> None:
    """Checks what Megatron's experts would ignore or refuse at the first step."""
    if config.moe_grouped_gemm and config.transformer_impl != "transformer_engine":
        raise ValueError(
            "--moe-grouped-gemm is set, but only Transformer Engine has a grouped product; take "
            "--transformer-impl transformer_engine, or leave it out."
        )
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        raise ValueError(
            f"--tensor-model-parallel-size is {config.tensor_model_parallel_size} and there are "
            "experts, which Megatron then trains with --sequence-parallel alone; add it."
        )


def check_layout(
    config: TransformerConfig,
    megalodon: MegalodonConfig,
    sequence_order: str,
    seq_length: int | None,
    pattern: str | None = None,
) -> None:
    """Checks that the model and its sequences can be cut as the parallel sizes ask.

    pattern: of a HybridModel, where it may name the stages.

    Raises:
        ValueError: the first size that does not fit; one sentence names it and what would work.
    """
    _check_tensor_parallel(megalodon, config.tensor_model_parallel_size)
    uneven = (
        config.num_layers_in_first_pipeline_stage,
        config.num_layers_in_last_pipeline_stage,
        config.account_for_embedding_in_pipeline_split,
        config.account_for_loss_in_pipeline_split,
        config.pipeline_model_parallel_layout,
        "|" in (pattern or ""),
    )
    # Stages that differ are Megatron's to check.
    if not any(uneven):
        check_stages(config.num_layers, config.pipeline_model_parallel_size)
    if seq_length is not None:
        _check_sequence(config, sequence_order, seq_length)


def check_stages(num_layers: int, stages: int) -> None:
    """Checks that equal pipeline stages make up the layers.

    Raises:
        ValueError: they do not.
    """
    if num_layers % stages:
        raise ValueError(
            f"--num-layers is {num_layers}, which --pipeline-model-parallel-size {stages} does not "
            "divide; take a size that does, or name a stage's share with "
            "--decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers."
        )


def _check_tensor_parallel(megalodon: MegalodonConfig, tp: int) -> None:
    heads = megalodon.num_heads
    if heads % tp and tp % heads:
        raise ValueError(
            f"--tensor-model-parallel-size is {tp} and there are {heads} heads; take a divisor or "
            f"a multiple of {heads}."
        )
    for name, width in (
        ("--hidden-size", megalodon.hidden_size),
        ("value_dim", megalodon.value_dim),
        ("--ffn-hidden-size", megalodon.ffn_hidden_size),
    ):
        if width % tp:
            raise ValueError(
                f"--tensor-model-parallel-size is {tp}, which does not divide {name} {width}; "
                "take a size that does."
            )


def _check_sequence(config: TransformerConfig, order: str, length: int) -> None:
    tp, cp = config.tensor_model_parallel_size, config.context_parallel_size
    parts = 2 * cp if order != "contiguous" and cp > 1 else cp
    if length % parts:
        raise ValueError(
            f"--seq-length is {length}, which {order} order with --context-parallel-size {cp} cuts "
            f"into {parts} equal parts; take a multiple of {parts}."
        )
    if config.sequence_parallel and length // cp % tp:
        raise ValueError(
            f"--seq-length is {length}, so a context-parallel rank has {length // cp} positions, "
            f"which --tensor-model-parallel-size {tp} does not divide; with --sequence-parallel "
            f"take a multiple of {cp * tp}."
        )


def check_fp8_sizes(
    config: TransformerConfig,
    megalodon: MegalodonConfig,
    seq_length: int | None,
    micro_batch_size: int | None,
) -> None:
    """Checks that every product of a rank has dimensions that the FP8 recipe can take.

    Raises:
        ValueError: the first size that does not fit; one sentence names it and what would work.
    """
    recipe = _name(config.fp8_recipe)
    multiple, tp = FP8_MULTIPLES[recipe], config.tensor_model_parallel_size
    sizes = [
        (f"--hidden-size is {config.hidden_size}", config.hidden_size, tp),
        (f"z_dim is {megalodon.z_dim}", megalodon.z_dim, min(tp, megalodon.num_heads)),
        (f"value_dim is {megalodon.value_dim}", megalodon.value_dim, tp),
        (f"--ffn-hidden-size is {config.ffn_hidden_size}", config.ffn_hidden_size, tp),
    ]
    if megalodon.has("attention_heads"):
        head_dim, groups = megalodon.attention_head_dim, megalodon.attention_groups
        queries = megalodon.attention_heads * head_dim
        sizes += [
            (f"--num-attention-heads x --kv-channels is {queries}", queries, tp),
            (
                f"The width of queries, keys and values is {queries + 2 * groups * head_dim}",
                queries + 2 * groups * head_dim,
                tp,
            ),
        ]
    if megalodon.has("num_experts"):
        size, shared = megalodon.expert_ffn_size, megalodon.shared_expert_size or 0
        of_experts = config.expert_tensor_parallel_size or tp
        sizes += [
            (f"--moe-ffn-hidden-size is {size}", size, of_experts),
            (f"--moe-shared-expert-intermediate-size is {shared}", shared, tp),
        ]
    if seq_length is not None and micro_batch_size is not None:
        sizes.append(
            (
                f"--micro-batch-size {micro_batch_size} of --seq-length {seq_length} is "
                f"{micro_batch_size * seq_length} tokens",
                micro_batch_size * seq_length,
                config.context_parallel_size * (tp if config.sequence_parallel else 1),
            )
        )
    for description, size, parts in sizes:
        if size % (parts * multiple):
            of_a_rank = f" in {parts} parts" if parts > 1 else ""
            raise ValueError(
                f"{description}, which{of_a_rank} is no multiple of {multiple}, as --fp8-recipe "
                f"{recipe} needs; take a multiple of {parts * multiple}."
            )


def _name(recipe: object) -> str:
    """Of an Fp8Recipe, which Megatron also takes as a string."""
    return str(getattr(recipe, "value", recipe))
