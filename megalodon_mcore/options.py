"""The arguments of Megatron's parser (0.19.2 and main of August 2026) that are refused, and why.

Names are those of the parsed arguments: `num_layers` of --num-layers. All others are honoured by
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
        gtp_remat_opt_in_modules gtp_remat_reduce_scatter_with_fp32_accumulation gtp_remat_nccl_ub
        gtp_expert_remat_nccl_ub batch_invariant_backend
    """,
    "experts, which there are with --num-experts alone, do without it": """
        expert_model_parallel_size expert_tensor_parallel_size
        expert_tensor_parallel_num_weight_shards overlap_moe_expert_parallel_comm
        overlap_dispatch_backward_with_experts_wgrad ep_overlap_early_attn_memory_release
        high_priority_a2a_comm_stream moe_shared_expert_intermediate_size moe_shared_expert_gate
        moe_shared_expert_overlap use_grouped_gemm_for_shared_expert
        moe_shared_expert_glu_interleave_size moe_ffn_hidden_size moe_router_topk
        moe_enable_routing_replay moe_router_padding_for_quantization moe_router_padding_for_fp8
        moe_router_num_groups moe_router_group_topk moe_router_pre_softmax
        moe_router_topk_scaling_factor moe_router_score_function moe_router_dtype
        moe_router_enable_expert_bias moe_router_bias_update_rate moe_router_quantile_balancing_ema
        moe_router_force_load_balancing moe_router_force_biased use_grouped_gemm_for_dense_mlp
        moe_grouped_gemm moe_single_grouped_weight moe_single_grouped_bias moe_z_loss_coeff
        moe_input_jitter_eps moe_token_dispatcher_type moe_enable_deepep
        moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep
        moe_hybridep_pad_uneven_dispatch_inputs moe_per_layer_logging moe_expert_capacity_factor
        moe_pad_expert_input_to_capacity moe_pad_experts_for_cuda_graph_inference
        moe_token_drop_policy moe_layer_recompute moe_permute_fusion moe_router_fusion
        moe_apply_probs_on_input moe_latent_size moe_flex_dispatcher_num_sms moe_deepep_num_sms
        moe_hybridep_num_sms moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
        moe_hybridep_num_sms_preprocessing moe_ncclep_static_shape moe_ncclep_zero_copy
        moe_mlp_glu_interleave_size moe_expert_rank_capacity_factor moe_paged_stash
        moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda
        moe_paged_stash_buffer_size_factor_cpu save_tokens_per_expert_interval num_experts
        moe_layer_freq moe_use_upcycling moe_router_load_balancing_type moe_aux_loss_coeff
        moe_upcycling_granularity moe_routing_trace_path moe_routing_trace_max_training_iters
        moe_routing_trace_capture_logits moe_routing_trace_capture_hidden_states
        moe_routing_trace_dump_weights moe_use_grouped_tensor moe_dispatch_fwd_dtype
        moe_combine_bwd_dtype
    """,
    "layers are blocks and, beside them, what --hybrid-layer-pattern and --mtp-num-layers add": """
        mtp_standalone mtp_num_layers mtp_loss_scaling_factor mtp_use_repeated_layer
        mtp_detach_heads mtp_hybrid_override_pattern multi_latent_attention
        experimental_attention_variant dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk
        dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_indexer_loss_coeff
        dsa_indexer_use_sparse_loss dsa_kernel_backend dsa_indexer_rope_interleaved
        dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon
        dsa_indexer_k_norm_fp32 linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim
        linear_num_key_heads linear_num_value_heads is_hybrid_model mamba_state_dim mamba_head_dim
        mamba_num_groups mamba_num_heads use_mamba_mem_eff_path mamba_training_ssm_states_dtype
        q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rotary_scaling_factor
        mscale mscale_all_dim cache_mla_latents mla_down_proj_fusion linear_attention_freq
        heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json
        mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype hybrid_layer_pattern
        hybrid_override_pattern mtp_hsm gdp_num_householder gdp_cutedsl_kernel
        gdp_num_chunk_states_to_recompute
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
        apply_residual_connection_post_layernorm
        layernorm_zero_centered_gamma normalization init_method_std embedding_init_method_std
        use_mup mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult
        mup_base_head_dim mup_attn_scale_power fused_residual_rmsnorm
        use_transformer_engine_op_fuser init_method_xavier_uniform enable_mhc_connections
        mhc_num_residual_streams mhc_sinkhorn_iterations mhc_init_gating_factor
        mhc_recompute_layer_num
    """,
    "FFN computes SiLU, gated with --swiglu": """
        glu_linear_offset activation_func_clamp_value use_fused_weighted_squared_relu
        use_te_activation_func openai_gelu squared_relu quick_geglu
    """,
    "RoPE turns pairs of whole heads and starts anew in every chunk": """
        rotary_interleaved mrope_section yarn_original_max_position_embeddings yarn_beta_fast
        yarn_beta_slow yarn_correction_range_round_to_int relative_attention_num_buckets
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

OTHER_PROGRAMS = """
    inference_cuda_graph_scope nccl_all_reduce_for_prefill inference_fuse_tp_communication
    inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
    inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
    decoder_num_layers onnx_safe bert_binary_head perform_rl_step rl_prompts_per_eval
    grpo_prompts_per_step grpo_group_size rl_generation_lag rl_submission_granularity
    rl_consumption_granularity grpo_iterations grpo_clamp_eps_lower grpo_clamp_eps_upper
    grpo_kl_beta grpo_entropy_term_weight grpo_filter_groups_with_same_reward langrl_env_config
    rl_default_temperature rl_default_top_p rl_default_top_k rl_offload_optimizer_during_inference
    rl_kv_cache_management_mode rl_persist_cuda_graphs rl_partial_rollouts
    rl_inference_logprobs_is_correction rl_importance_sampling_truncation_coef
    rl_use_sequence_packing rl_sequence_packing_max_sequences_per_bin rl_sequence_packing_algo
    rl_training_cuda_graphs rl_inference_tensor_model_parallel_size
    rl_inference_pipeline_model_parallel_size rl_inference_expert_model_parallel_size
    rl_inference_expert_tensor_model_parallel_size rl_inference_model_unified_memory_level
    rl_offload_inference_model_weights_when_idle refit_method rl_verify_model_weights_swap
    rl_skip_bos_token rl_profile rl_profile_dir rl_inference_parsers inference_rng_tracker
    decoder_seq_length sample_rate mask_prob short_seq_prob ict_head_size biencoder_projection_dim
    biencoder_shared_query_context_model ict_load bert_load titles_data_path query_in_block_prob
    use_one_sent_docs evidence_data_path retriever_report_topk_accuracies retriever_score_scaling
    block_data_path embedding_path indexer_batch_size indexer_log_interval num_classes img_h img_w
    num_channels patch_dim classes_fraction data_per_class_fraction data_sharding head_lr_mult
    vision_pretraining vision_pretraining_type vision_backbone_type swin_backbone_type mask_type
    mask_factor iter_per_epoch dino_local_img_size dino_local_crops_number dino_head_hidden_size
    dino_bottleneck_size dino_freeze_last_layer dino_norm_last_layer dino_warmup_teacher_temp
    dino_teacher_temp dino_warmup_teacher_temp_epochs logits_save_top_k logits_save_top_p
    logits_save_top_p_min_k logits_save_dir logits_save_dtype logits_load_dir
    logits_load_decode_threads logits_load_prefetch_factor logits_load_msc_prefetch_depth
    logits_load_kd_loss_alpha logits_load_ignore_errors inference_batch_times_seqlen_threshold
    max_tokens_to_oom output_bert_embeddings bert_embedder_type cuda_graph_scope_deprecated
    use_legacy_static_engine inference_max_requests inference_max_seq_length
    inference_dynamic_batching inference_dynamic_batching_buffer_size_gb
    inference_dynamic_batching_paused_buffer_size_gb inference_dynamic_batching_mamba_memory_ratio
    inference_dynamic_batching_block_size inference_dynamic_batching_max_requests
    inference_dynamic_batching_max_tokens inference_dynamic_batching_num_cuda_graphs
    inference_dynamic_batching_track_paused_request_events
    inference_dynamic_batching_track_generated_token_events decode_only_cuda_graphs
    inference_cuda_graph_all_prefills inference_cuda_graph_max_tokens
    inference_dynamic_batching_unified_memory_level enable_chunked_prefill num_speculative_tokens
    inference_dynamic_batching_enable_prefix_caching
    inference_dynamic_batching_prefix_caching_eviction_policy
    inference_dynamic_batching_prefix_caching_coordinator_policy
    inference_dynamic_batching_prefix_caching_routing_alpha
    inference_dynamic_batching_prefix_caching_mamba_gb
    inference_dynamic_batching_cuda_graph_mixed_prefill_count
    inference_dynamic_batching_cuda_graph_sizing_distribution
    inference_dynamic_batching_sampling_backend offset_sampling_seed_by_dp_rank
    inference_dynamic_batching_async_sched_mode inference_dynamic_batching_logprobs_mode
    inference_logging_step_interval inference_text_gen_server_logging inference_wandb_logging
    inference_coordinator_port inference_use_synchronous_zmq_collectives
    inference_disable_ep_consensus inference_shards rl_max_inflight_requests
    rl_durable_rollout_bank rl_rollout_bank_max_bytes rl_rollout_bank_dir
"""
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
        moe_router_force_load_balancing
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
        yaml_cfg
        inprocess_restart inprocess_max_iterations inprocess_monitor_thread_interval
        inprocess_monitor_process_interval inprocess_progress_watchdog_interval
        inprocess_heartbeat_interval inprocess_soft_timeout inprocess_hard_timeout
        inprocess_heartbeat_timeout inprocess_barrier_timeout inprocess_completion_timeout
        inprocess_last_call_wait inprocess_termination_grace_time inprocess_granularity
        inprocess_active_world_size inprocess_empty_cuda_cache
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
    return found | _of_other_programs() | _reasons(BOUNDS_IN_MASKS)


def refusals_of_pretrain() -> dict[str, str]:
    """As refusals, of `megalodon-mcore pretrain`."""
    return refusals() | _reasons(NOT_IN_PRETRAIN)


def refusals_beside_megalodon() -> dict[str, str]:
    """As refusals_of_pretrain, for a --spec of Megatron's own layers, which honour the rest."""
    return _of_other_programs() | _reasons(NOT_IN_PRETRAIN)


def _of_other_programs() -> dict[str, str]:
    reason = ", which training a language model does not take"
    return dict.fromkeys(OTHER_PROGRAMS.split(), reason)


def _reasons(table: dict[str, str]) -> dict[str, str]:
    return {name: f", which {reason}" for reason, names in table.items() for name in names.split()}


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

DERIVED_IN_CONFIG = DERIVED | {"cp_comm_type", "cuda_graph_modules", "embedding_init_method_std"}
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
        if name not in refused or name in known or _is_done(name, args):
            continue
        value = getattr(args, name, defaults[name])
        if value == defaults[name] or value in ALSO_ACCEPTED.get(name, ()):
            continue
        raise ValueError(refusal(action.option_strings[-1], value, refused[name]))


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
        if name not in refused or name in passed_over:
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        value = getattr(config, name)
        if value != default and value not in ALSO_ACCEPTED.get(name, ()):
            raise ValueError(refusal(_option(name), value, refused[name]))


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
