"""The arguments of Megatron's parser (0.19.2 and main of August 2026) that are refused, and why.

Names are those of the parsed arguments: `num_layers` of --num-layers; one that ends in * stands for
all that begin so. All others are honoured by
Megatron's own code, by Megalodon's, or have no effect on any result; none is ignored. A new
version's arguments have to be placed here or in tests/honoured_options.py: a test asks for each.
"""

from __future__ import annotations

import dataclasses
import functools
from argparse import ArgumentParser, Namespace
from typing import Any

REFUSED = {
    "layers cut and schedule their work in their own way": """
        tensor_parallel_num_weight_shards hierarchical_context_parallel_sizes
        max_seqlen_per_dp_cp_rank hybrid_context_parallel delay_wgrad_compute batch_invariant_mode
        symmetric_ar_type mlp_chunks_for_prefill mlp_chunks_for_training
        fine_grained_activation_offloading offload_modules min_offloaded_tensor_size
        delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
        activation_offload_fraction fine_grained_offloading_max_inflight_offloads cp_comm_type
        gtp_remat_* gtp_expert_remat_nccl_ub batch_invariant_backend
    """,
    "experts, which there are with --num-experts alone, do without it": """
        expert_model_parallel_size expert_tensor_parallel_size
        expert_tensor_parallel_num_weight_shards overlap_moe_expert_parallel_comm
        overlap_dispatch_backward_with_experts_wgrad ep_overlap_early_attn_memory_release
        high_priority_a2a_comm_stream moe_* use_grouped_gemm_for_shared_expert
        use_grouped_gemm_for_dense_mlp save_tokens_per_expert_interval num_experts
    """,
    "layers are blocks and, beside them, what --hybrid-layer-pattern and --mtp-num-layers add": """
        mtp_standalone mtp_num_layers mtp_loss_scaling_factor mtp_use_repeated_layer
        mtp_detach_heads mtp_hybrid_override_pattern multi_latent_attention
        experimental_attention_variant dsa_* linear_* is_hybrid_model mamba_* use_mamba_mem_eff_path
        q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rotary_scaling_factor
        mscale mscale_all_dim cache_mla_latents mla_down_proj_fusion
        heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json
        hybrid_layer_pattern hybrid_override_pattern mtp_hsm gdp_*
    """,
    "attention is exact inside chunks, with widths (z_dim, value_dim) and kernels of its own": """
        attention_backend flash_attention_version softmax_type num_query_groups kv_channels
        add_qkv_bias qk_layernorm qk_l2_norm qk_clip qk_clip_alpha qk_clip_threshold
        attention_output_gate apply_query_key_layer_scaling use_kitchen_attention
        kitchen_attention_backend flash_decode group_query_attention window_size
        window_attn_skip_freq apply_wd_to_qk_layernorm muon_split_qkv use_flash_attn
        log_max_attention_logit
    """,
    "blocks have norms, a residual and an initialization (--megalodon-init-mode) of their own": """
        apply_residual_connection_post_layernorm layernorm_zero_centered_gamma normalization
        init_method_std embedding_init_method_std use_mup mup_* fused_residual_rmsnorm
        use_transformer_engine_op_fuser init_method_xavier_uniform enable_mhc_connections mhc_*
    """,
    "FFN computes SiLU, gated with --swiglu": """
        glu_linear_offset activation_func_clamp_value use_fused_weighted_squared_relu
        use_te_activation_func openai_gelu squared_relu quick_geglu
    """,
    "RoPE turns pairs of whole heads and starts anew in every chunk": """
        rotary_interleaved mrope_section yarn_* relative_attention_num_buckets
        relative_attention_max_distance rotary_percent rotary_seq_len_interpolation_factor
        use_rope_scaling rope_scaling_factor no_rope_freq rope_type
    """,
    "linear layers take FP8 by --fp8-recipe delayed, tensorwise, blockwise or mxfp8 alone": """
        fp8_quantizer_factory fp8_output_proj fp4 fp4_recipe fp4_quantizer_factory fp4_param_gather
        fp8_param_gather te_precision_config_file
    """,
    "layers are captured in no CUDA graph": """
        enable_cuda_graph cuda_graph_warmup_steps external_cuda_graph cuda_graph_impl
        cuda_graph_modules
    """,
}
"""Arguments that ask for another model, by what Megalodon has instead: `Megalodon's ...`."""

OTHER_PROGRAMS = {
    "training a language model does not take": """
        inference_* nccl_all_reduce_for_prefill decoder_num_layers onnx_safe bert_* perform_rl_step
        rl_* grpo_* langrl_env_config refit_method decoder_seq_length sample_rate mask_prob
        short_seq_prob ict_* biencoder_* titles_data_path query_in_block_prob use_one_sent_docs
        evidence_data_path retriever_* block_data_path embedding_path indexer_* num_classes img_*
        num_channels patch_dim classes_fraction data_per_class_fraction data_sharding head_lr_mult
        vision_* swin_backbone_type mask_type mask_factor iter_per_epoch dino_* logits_*
        max_tokens_to_oom output_bert_embeddings cuda_graph_scope_deprecated
        use_legacy_static_engine decode_only_cuda_graphs enable_chunked_prefill
        num_speculative_tokens offset_sampling_seed_by_dp_rank
    """,
}
"""Of inference servers, reinforcement learning, distillation, vision, BERT and T5."""

HONOURED_BESIDE = {
    "M": "hybrid_layer_pattern is_hybrid_model spec",
    "*": """
        group_query_attention num_query_groups kv_channels add_qkv_bias rotary_percent
        rotary_interleaved muon_split_qkv
    """,
    "E": """
        num_experts expert_model_parallel_size expert_tensor_parallel_size moe_router_topk
        moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate
        moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff
        moe_token_dispatcher_type moe_grouped_gemm moe_router_pre_softmax
        moe_router_score_function moe_router_topk_scaling_factor moe_router_enable_expert_bias
        moe_router_bias_update_rate moe_router_dtype moe_router_num_groups moe_router_group_topk
        moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy
        moe_input_jitter_eps moe_per_layer_logging moe_layer_recompute
        moe_router_force_load_balancing moe_router_topk_limited_devices moe_token_dropping
        moe_grad_scale_func
    """,
    "X": "moe_layer_freq",
    "/": "mtp_num_layers mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads",
}
"""Arguments that a model with such layers honours and one of Megalodon's blocks alone does not.

By the layer's symbol; M's are for patterns, and those of / for models that predict further tokens.
"""

NOT_IN_PRETRAIN = {
    "is lost inside Megatron 0.19; take --step-batch-size-schedule": """
        rampup_batch_size
    """,
    "acts in a function of Megatron that training does not call": """
        freeze_all_layers
    """,
    "is for Megatron's own pretrain_gpt.py": """
        yaml_cfg inprocess_*
    """,
}
"""Arguments that only another program honours or Megatron 0.19 loses, by what is in the way."""

BOUNDS_IN_MASKS = {
    "puts the bounds of documents into a mask that no Megalodon layer sees, where "
    "--dataloader-inter-document-masking keeps documents apart": """
        reset_position_ids reset_attention_mask
    """,
}
"""Arguments that ask in another way for documents to be kept apart; where they are, so be it."""


def refusals() -> dict[str, str]:
    """The words after an argument's name and value in its refusal, by the argument's name.

    That of Megatron's programs; NOT_IN_PRETRAIN adds to them where `pretrain` parses.
    """
    found = {
        name: f", but Megalodon's {reason}"
        for reason, names in REFUSED.items()
        for name in names.split()
    }
    return found | _reasons(OTHER_PROGRAMS) | _reasons(BOUNDS_IN_MASKS)


def refusals_of_pretrain() -> dict[str, str]:
    """As refusals, of `megalodon-mcore pretrain`."""
    return refusals() | _reasons(NOT_IN_PRETRAIN)


def refusals_beside_megalodon() -> dict[str, str]:
    """As refusals_of_pretrain, for a --spec of Megatron's own layers, which honour the rest."""
    return _reasons(OTHER_PROGRAMS) | _reasons(NOT_IN_PRETRAIN)


def _reasons(table: dict[str, str]) -> dict[str, str]:
    return {name: f", which {reason}" for reason, names in table.items() for name in names.split()}


def reason_in(refused: dict[str, str], name: str) -> str | None:
    """The words for a name in one of these tables; None where it is not refused."""
    families = (f"{name[:end]}*" for end in range(len(name) + 1))
    return next((refused[z] for z in (name, *families) if z in refused), None)


ALSO_ACCEPTED = {"normalization": ("RMSNorm",)}
"""Values besides a parser's default that ask for nothing else than what Megalodon does."""

DERIVED = frozenset(
    """
    kv_channels add_qkv_bias num_query_groups tensor_parallel_num_weight_shards
    expert_tensor_parallel_size expert_tensor_parallel_num_weight_shards
    inference_cuda_graph_scope mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype
    """.split()
)
"""Arguments that Megatron fills in itself once it has validated all: no user's word."""

DERIVED_IN_CONFIG = DERIVED | {
    *("cp_comm_type", "cuda_graph_modules", "embedding_init_method_std", "inference_sampling_seed")
}
"""Fields that Megatron's configuration fills in itself."""


def check_arguments(
    args: Namespace, parser: ArgumentParser, refused: dict[str, str], known: frozenset = frozenset()
) -> None:
    """Refuses the first argument that was given a value and would not be honoured.

    Args:
        args: what the parser gave.
        parser: knows every argument's default and how it is written.
        refused: `refusals()` or `refusals_of_pretrain()`.
        known: names that are passed over.

    Raises:
        ValueError: one sentence names the argument, its value and what would work.
    """
    # Not action.default: of two options for one name the first one's counts.
    defaults = vars(parser.parse_args([]))
    for action in parser._actions:
        name = action.dest
        why = reason_in(refused, name)
        if why is None or name in known or _is_done(name, args):
            continue
        value = getattr(args, name, defaults[name])
        if value == defaults[name] or value in ALSO_ACCEPTED.get(name, ()):
            continue
        raise ValueError(refusal(action.option_strings[-1], value, why))


def _is_done(name: str, args: Namespace) -> bool:
    """Whether another argument does already what a refused one asks for."""
    packed = getattr(args, "dataloader_inter_document_masking", False)
    return packed and any(name in names.split() for names in BOUNDS_IN_MASKS.values())


def honoured_beside(
    pattern: str | None, num_experts: int | None, depths: int | None
) -> frozenset[str]:
    """What is honoured, though Megalodon's blocks do not, in a model of a pattern's layers.

    num_experts: in E layers or, where the pattern has none, in blocks.
    depths: --mtp-num-layers, which a pattern may say instead.
    """
    symbols = set() if pattern is None else {"M", *pattern}
    if num_experts:
        symbols |= {"E"} if "E" in symbols else {"E", "X"}
    if depths:
        symbols.add("/")
    return frozenset(name for symbol in symbols for name in HONOURED_BESIDE.get(symbol, "").split())


def check_configuration(config: Any, pattern: str | None = None) -> None:
    """Refuses the first field of a TransformerConfig that asks for what would not be honoured.

    pattern: the symbols of a HybridModel's layers.

    Raises:
        ValueError: as check_arguments.
    """
    refused = refusals()
    passed_over = DERIVED_IN_CONFIG | honoured_beside(
        pattern, config.num_moe_experts, config.mtp_num_layers
    )
    for field in dataclasses.fields(config):
        name = field.name
        why = reason_in(refused, name)
        if why is None or name in passed_over:
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        value = getattr(config, name)
        if value != default and value not in ALSO_ACCEPTED.get(name, ()):
            raise ValueError(refusal(_option(name), value, why))


def check_megatron_arguments(args: Namespace, pattern: str | None = None) -> None:
    """Checks the arguments that one of Megatron's own programs has parsed and validated.

    pattern: the symbols of a HybridModel's layers.

    Raises:
        ValueError: as check_arguments.
    """
    passed_over = DERIVED | honoured_beside(pattern, args.num_experts, args.mtp_num_layers)
    check_arguments(args, _megatron_parser(), refusals(), passed_over)


@functools.cache
def _megatron_parser() -> ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(ArgumentParser(allow_abbrev=False))


def _option(name: str) -> str:
    """How an argument of this name is written."""
    found = [z.option_strings[-1] for z in _megatron_parser()._actions if z.dest == name]
    return found[0] if found else "--" + name.replace("_", "-")


def refusal(option: str, value: object, why: str) -> str:
    """The sentence of an option that is not taken."""
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    given = "is set" if isinstance(value, bool) else f"is {getattr(value, 'name', value)}"
    return f"{option} {given}{why}; leave it out."
