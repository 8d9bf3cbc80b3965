"""The arguments of Megatron's parser that are not refused, by what honours them."""

BY_MEGATRON = frozenset(
    """
    pipeline_model_parallel_comm_backend pipeline_model_parallel_size fp16 bf16 tp_comm_overlap
    tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
    tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs cross_entropy_loss_fusion
    cross_entropy_fusion_impl tp_comm_bootstrap_backend use_ring_exchange_p2p
    defer_embedding_wgrad_compute wgrad_deferral_limit overlap_p2p_comm_warmup_flush
    microbatch_group_size_per_vp_stage cpu_offloading_num_layers
    cpu_offloading_retain_pinned_cpu_buffers account_for_embedding_in_pipeline_split
    account_for_loss_in_pipeline_split init_model_with_meta_device
    disable_bf16_reduced_precision_matmul fp8_margin fp8_interval fp8_amax_history_len
    fp8_amax_compute_algo fp8_wgrad clone_scatter_output_in_embedding config_logger_dir
    make_vocab_size_divisible_by weight_decay clip_grad adam_beta1 adam_beta2 adam_eps sgd_momentum
    muon_momentum muon_nesterov muon_scale_mode muon_fp32_matmul_prec muon_coefficient_type
    muon_num_ns_steps muon_tp_mode muon_extra_scale_factor muon_scalar_optimizer lion_beta1
    lion_beta2 no_weight_decay_cond_type profile profile_step_start profile_step_end
    use_pytorch_profiler pytorch_profiler_collect_shapes pytorch_profiler_collect_callstack
    pytorch_profiler_collect_chakra profile_ranks record_memory_history memory_snapshot_path
    record_shapes nvtx_ranges micro_batch_size global_batch_size step_batch_size_schedule
    decrease_batch_size_if_needed empty_unused_memory_level
    check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval train_sync_interval
    train_iters train_samples exit_interval exit_duration_in_mins exit_signal_handler exit_signal
    exit_signal_handler_for_dataloader exit_signal_handler_for_training manual_gc
    manual_gc_interval manual_gc_eval iterations_to_skip batch_size check_for_nan_in_loss_and_grad
    check_for_large_grads result_rejected_tracker_filename tp_comm_overlap_cfg
    checkpoint_activations optimizer optimizer_cpu_offload optimizer_cuda_graph
    optimizer_offload_fraction use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d
    dump_param_to_param_group_map pin_cpu_grads pin_cpu_params dataloader_type
    gradient_accumulation_fusion seed te_rng_tracker data_parallel_random_init lr_decay_style
    lr_wsd_decay_style lr_decay_iters lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples
    lr_warmup_fraction lr_warmup_iters lr_warmup_samples lr_warmup_init
    override_opt_param_scheduler use_checkpoint_opt_param_scheduler start_weight_decay
    end_weight_decay weight_decay_incr_style lr warmup min_lr decoupled_lr decoupled_min_lr save
    save_interval save_params_interval save_activations_interval save_wgrads_interval
    save_dgrads_interval save_retain_interval load load_main_params_from_ckpt
    non_persistent_save_interval non_persistent_ckpt_type non_persistent_global_ckpt_dir
    non_persistent_local_ckpt_dir non_persistent_local_ckpt_algo finetune pretrained_checkpoint
    ckpt_step use_checkpoint_args use_mp_args_from_checkpoint_args
    use_tokenizer_model_from_checkpoint_args exit_on_missing_checkpoint ckpt_format
    auto_detect_ckpt_format ckpt_convert_format ckpt_convert_save
    ckpt_convert_update_legacy_dist_opt_format ckpt_fully_parallel_save async_save async_strategy
    use_persistent_ckpt_worker async_ckpt_cpu_priority async_ckpt_io_priority
    async_ckpt_use_cpu_shm ckpt_fully_parallel_load ckpt_fully_parallel_load_exchange_algo
    ckpt_fully_parallel_save_process_group ckpt_fully_parallel_load_process_group
    ckpt_assume_constant_structure ckpt_load_validate_sharding_integrity strict_fsdp_dtensor_load
    dist_ckpt_strictness dist_ckpt_save_pre_mcore_014 dist_ckpt_optim_fully_reshardable
    distrib_optim_fully_reshardable_mem_efficient replication replication_jump replication_factor
    verify_integrity stream_ckpt_dequant no_save_optim no_save_rng no_load_optim no_load_rng
    override_ckpt_iteration use_dist_ckpt_deprecated dist_ckpt_format_deprecated dist_ckpt_workers
    ckpt_fully_parallel_save_deprecated grad_reduce_in_bf16 loss_scale initial_loss_scale
    min_loss_scale loss_scale_window hysteresis accumulate_allreduce_grads_in_fp32
    fp16_lm_cross_entropy reuse_grad_buf_for_mxfp8_param_ag distributed_backend
    distributed_timeout_minutes align_grad_reduce local_rank lazy_mpu_init use_megatron_fsdp
    use_torch_fsdp2 nccl_communicator_config_path use_tp_pp_dp_mapping use_gloo_process_groups
    use_sharp sharp_enabled_group high_priority_stream_groups
    distributed_timeout_seconds_after_init flight_recorder_dump_path
    flight_recorder_trace_buffer_size flight_recorder_dump_on_timeout
    flight_recorder_include_stack_trace flight_recorder_include_only_active
    flight_recorder_extra_dump_on_exec disable_jit_fuser decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers pipeline_model_parallel_layout model_parallel_size
    num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank overlap_p2p_comm
    overlap_grad_reduce ddp_num_buckets ddp_bucket_size ddp_pad_buckets_for_high_nccl_busbw
    ddp_reduce_scatter_with_fp32_accumulation ddp_param_name_patterns_for_fp32_local_accumulation
    ddp_average_in_collective overlap_param_gather overlap_param_gather_with_optimizer_step
    align_param_gather use_distributed_optimizer use_layer_wise_param_layout nccl_ub
    disable_symmetric_registration fsdp_manual_registration create_all_gather_group
    data_parallel_sharding_strategy outer_dp_sharding_strategy gradient_reduce_div_fusion
    fsdp_double_buffer suggested_communication_unit_size keep_fp8_transpose_cache
    enable_full_sharding_in_hsdp num_distributed_optimizer_instances
    torch_fsdp2_reshard_after_forward fake_process_group eval_iters eval_interval
    start_eval_at_iter eval_global_batch_size eval_micro_batch_size skip_train test_mode
    full_validation multiple_validation_sets validation_set_names data_path
    phase_transition_iterations split train_data_path valid_data_path test_data_path data_args_path
    per_split_data_args_path per_dataset_sequences_path dataloader_fast_cache_load
    dataloader_defer_npy_index_mmap data_cache_path mmap_bin_files mock_data seq_length
    encoder_seq_length num_workers eod_mask_loss create_attention_mask_in_dataloader
    num_dataset_builder_threads object_storage_cache_path mid_level_dataset_surplus
    fim_data fim_rate fim_spm_rate fim_split_sample fim_fragment_rate fim_no_prefix
    fim_prefix_token fim_middle_token fim_suffix_token fim_pad_token fim_eod_token
    sft_tokenizer_prompt_format allow_ambiguous_pad_tokens vocab_size padded_vocab_size
    pad_vocab_size vocab_file merge_file vocab_extra_ids tokenizer_type tokenizer_model
    metadata_path special_tokens tiktoken_pattern
    tiktoken_num_special_tokens tokenizer_sentencepiece_legacy
    tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_hf_no_use_fast
    tokenizer_hf_no_include_special_tokens trust_remote_code null_tokenizer_eod_id
    null_tokenizer_pad_id chat_template adlr_autoresume adlr_autoresume_interval log_interval
    log_params_norm log_throughput log_progress timing_log_level timing_log_option tensorboard_dir
    tensorboard_log_interval tensorboard_queue_size log_timers_to_tensorboard
    log_loss_scale_to_tensorboard log_validation_ppl_to_tensorboard log_memory_to_tensorboard
    log_memory_interval log_device_memory_used log_num_zeros_in_grad barrier_with_L1_time
    log_world_size_to_tensorboard wandb_project wandb_exp_name wandb_save_dir wandb_entity
    logging_level log_energy log_straggler straggler_ctrlr_port straggler_minmax_count
    disable_straggler_on_startup run_workload_inspector_server enable_experimental
    use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype
    megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype megatron_fsdp_grad_comm_dtype
    megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_max_pool_double_buffer
    fsdp_db_use_persist_buf_on_alloc_fail enable_one_logger one_logger_project one_logger_run_name
    one_logger_async app_tag_run_name app_tag_run_version enable_ft_package calc_ft_timeouts
    ft_num_warmup_iters error_injection_rate error_injection_type rerun_mode check_for_spiky_loss
    enable_msc disable_msc_deprecated fault_injector_ranks fault_injector_num_ranks
    fault_injector_fault_types fault_injector_fault_probabilities fault_injector_fault_delay
    fault_injector_delay_start_iteration fault_injector_mtti_seconds fault_injector_offset_seconds
    fault_injector_seed muon_use_syrk ckpt_fully_parallel_load_per_rank_objects
    ckpt_pg_tensors_cache_path ckpt_pg_tensors_cache_create save_tokenizer_assets
    ckpt_drop_redundant_extra_state logit_dtype megatron_fsdp_version use_gigatoken otel_enabled
    otel_service_name otel_span_groups
    """.split()
)
"""By its loop, data, optimizers, schedules, checkpoints, logs and process groups."""

BY_MEGALODON = frozenset(
    """
    tensor_model_parallel_size sequence_parallel context_parallel_size perform_initialization
    use_cpu_initialization deterministic_mode num_layers hidden_size num_attention_heads
    ffn_hidden_size hidden_dropout attention_dropout layernorm_epsilon add_bias_linear
    calculate_per_token_loss recompute_granularity recompute_method recompute_num_layers
    distribute_saved_activations recompute_modules fp8 fp8_recipe first_last_layers_bf16
    num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 transformer_impl encoder_num_layers
    position_embedding_type use_rotary_position_embeddings rotary_base add_position_embedding
    swiglu untie_embeddings_and_output_weights recompute_activations no_persist_layer_norm
    attention_softmax_in_fp32 fp32_residual_connection spec dataloader_inter_document_masking sft
    """.split()
)
"""By the layers, or by both."""

WITHOUT_EFFECT = frozenset(
    """
    max_position_embeddings masked_softmax_fusion bias_gelu_fusion bias_swiglu_fusion
    bias_dropout_fusion apply_rope_fusion deprecated_use_mcore_models
    """.split()
)
"""Between equal kernels of layers that Megalodon has none of, or never read."""
