"""List other programs' names for macft's keys, and their keys that macft does not have, with the reasons."""

from __future__ import annotations

from typing import Any, NamedTuple

# Other names of keys -> macft's.
ALIASES = {
    # transformers, by age
    "evaluation_strategy": "eval_strategy",
    "activation_checkpointing": "gradient_checkpointing",
    "early_stopping_patience": "early_stopping_steps",
    # LLaMA-Factory, by age
    "dpo_beta": "pref_beta",
    "dpo_loss": "pref_loss",
    "dpo_ftx": "pref_ftx",
    "kto_beta": "pref_beta",
    "kto_ftx": "pref_ftx",
    "checkpoint_dir": "adapter_name_or_path",
    # TRL and PEFT
    "model": "model_name_or_path",
    "tokenizer": "tokenizer_name_or_path",
    "tokenizer_name": "tokenizer_name_or_path",
    "chat_template_path": "template",
    "dataset_name": "dataset",
    "train_dataset": "dataset",
    "dataset_streaming": "streaming",
    "dataset_num_proc": "preprocessing_num_workers",
    "max_length": "cutoff_len",
    "max_seq_length": "cutoff_len",
    "block_size": "cutoff_len",
    "beta": "pref_beta",
    "label_smoothing": "dpo_label_smoothing",
    "desirable_weight": "kto_chosen_weight",
    "undesirable_weight": "kto_rejected_weight",
    "lora_r": "lora_rank",
    # ms-swift
    "tuner_type": "finetuning_type",
    "train_type": "finetuning_type",
    "rlhf_type": "stage",
    "adapters": "adapter_name_or_path",
    "ref_adapters": "ref_model_adapters",
    "split_dataset_ratio": "val_size",
    "system": "default_system",
}

# Why a key has no effect here -> the keys.
_NO_EFFECT = {
    "code from a model repository is never run": "trust_remote_code",
    "the device is found automatically": "use_mps_device no_cuda use_cpu device_map "
    "quantization_device_map offload_folder",
    "tokenized data is cached automatically, and this run trains": "tokenized_path data_shared_file_system",
    "tokenizing needs no such setting": "preprocessing_batch_size dataset_batch_size dataset_kwargs",
    "batches are made in the training process": "dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
    "accelerator_config dispatch_batches split_batches",
    "one process trains": "ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_static_graph ddp_backend local_rank master_addr master_port log_on_each_node save_on_each_node "
    "average_tokens_across_devices ray_init_kwargs ray_run_name ray_storage_path resources_per_worker "
    "placement_strategy parallelism_config fsdp_config fsdp_transformer_layer_cls_to_wrap deepspeed_plugin",
    "one process trains; this splits memory and time and does not change results": "deepspeed fsdp",
    "one process trains: a step holds the examples of one worker, not of all": "ray_num_workers num_workers",
    "the fast tokenizer is the only one": "use_fast_tokenizer",
    "the engine's own fast attention is used": "flash_attn attn_implementation",
    "it changes speed or memory, not results": "low_cpu_mem_usage use_unsloth use_unsloth_gc enable_liger_kernel "
    "use_liger_kernel liger_kernel_config use_v1_kernels use_reentrant_gc gradient_checkpointing_kwargs "
    "activation_checkpointing_kwargs activation_offloading torch_compile torch_compile_backend torch_compile_mode "
    "torch_empty_cache_steps use_cache use_kv_cache auto_find_batch_size use_logits_to_keep padding_free "
    "pad_to_multiple_of bnb_4bit_quant_storage eval_accumulation_steps enable_jit_checkpoint jit_mode_eval use_ipex "
    "eval_do_concat_batches eval_use_gather_object save_on_cpu",
    "scales of a quantized base are not quantized again": "double_quantization use_bnb_nested_quant",
    "bf16 and fp16 say in what is computed; norms and losses are float32": "dtype torch_dtype compute_dtype tf32 "
    "half_precision_backend fp16_backend fp16_opt_level bf16_full_eval fp16_full_eval upcast_layernorm "
    "upcast_lmhead_output",
    "safetensors is the only format": "save_safetensors",
    "columns without a use are not read": "remove_unused_columns label_names length_column_name dataset_test_split",
    "the reference is computed once, before the first step": "precompute_ref_log_probs precompute_ref_batch_size",
    "there is one limit, cutoff_len: user text is shortened before answers are": "max_prompt_length "
    "max_completion_length max_target_length max_source_length truncation_mode model_max_length",
    "only answers are trained on; train_on_prompt: true trains on every token": "assistant_only_loss "
    "completion_only_loss",
    "padding is told by length, not by a token": "pad_token ignore_bias_buffers",
    "packed rows are filled as well as they go": "packing_strategy eval_packing",
    "the order of the examples is shuffled unless disable_shuffling is set": "shuffle_dataset",
    "the last step of an epoch is smaller, and no example is left out": "dataloader_drop_last",
    "a resumed run goes on where it was in the data": "ignore_data_skip restore_callback_states_from_checkpoint",
    "evaluation follows eval_strategy": "do_eval eval_on_start",
    "macft chat and macft compare answer with the trained model": "do_predict predict_with_generate do_sample "
    "temperature top_p top_k num_beams max_new_tokens repetition_penalty length_penalty skip_special_tokens "
    "eval_num_beams generation_max_length generation_num_beams generation_config generate_during_eval infer_backend "
    "infer_dtype vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen "
    "sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend",
    "macft export writes models": "export_dir export_size export_device export_quantization_bit "
    "export_quantization_dataset export_quantization_nsamples export_quantization_maxlen export_legacy_format "
    "export_hub_model_id",
    "nothing is uploaded": "push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision "
    "push_to_hub_model_id push_to_hub_organization",
    "keys of a hub are taken from the environment (HF_TOKEN, HF_HOME), not from a file": "cache_dir hf_hub_token "
    "ms_hub_token om_hub_token hub_token push_to_hub_token use_auth_token",
    "trackers are set up by their own environment variables; run_name names the run": "project project_name "
    "trackio_space_id trackio_bucket_id trackio_static_space_id swanlab_project swanlab_workspace swanlab_run_name "
    "swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret logging_dir",
    "a row is logged every logging_steps, with tokens and throughput": "logging_strategy logging_first_step "
    "logging_nan_inf_filter include_num_input_tokens_seen include_tokens_per_second "
    "include_effective_tokens_per_second log_level log_level_replica disable_tqdm debug skip_memory_metrics "
    "print_param_status",
    "the evaluation logs the loss and, of preference stages, the rewards": "compute_accuracy eval_on_each_dataset "
    "include_for_metrics include_inputs_for_metrics batch_eval_metrics prediction_loss_only",
    "the same seed gives the same run": "full_determinism",
    "it belongs to a method that is not switched on": "freeze_trainable_layers freeze_trainable_modules "
    "freeze_extra_modules num_layer_trainable name_module_trainable pissa_iter pissa_convert loraplus_lr_embedding "
    "oft_rank oft_block_size oft_target module_dropout galore_target galore_rank galore_update_interval galore_scale "
    "galore_proj_type galore_layerwise apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj "
    "apollo_proj_type apollo_layerwise apollo_scale_front apollo_scale_type badam_mode badam_start_block "
    "badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose asft_alpha eaft_alpha "
    "ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards "
    "reward_model reward_model_adapters reward_model_quantization_bit reward_model_type init_special_tokens "
    "ref_model_mixup_alpha ref_model_sync_steps discopop_tau f_alpha_divergence_coef hyper_parallel_args "
    "hyper_parallel_cp_size fp8_backend fp8_enable_fsdp_float8_all_gather kt_cpu_activation kt_weight_path "
    "kt_non_expert_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
    "kt_lora_expert_intermediate_size kt_config kt_optimize_rule cpu_infer chunk_size enable_torch_profiler "
    "profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps profiler_repeat "
    "profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules",
    "only texts are trained on": "media_dir image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches "
    "video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate "
    "freeze_vision_tower freeze_multi_modal_projector train_mm_proj_only image_resolution video_resolution "
    "visual_inputs",
}

# Why a key that changes the result is refused -> the keys.
_REFUSED = {
    "vocabulary and embeddings stay as they are": "resize_vocab add_tokens add_special_tokens "
    "new_special_tokens_config",
    "special tokens inside a text stay special": "split_special_tokens",
    "rotary embeddings stay as config.json says": "rope_scaling",
    "attention is the model's own": "shift_attn mixture_of_depths",
    "the loss has no such term": "moe_aux_loss_coef router_aux_loss_coef label_smoothing_factor pref_bco_weight "
    "use_dft_loss use_asft_loss use_eaft_loss use_weighting f_divergence_type neftune_noise_alpha",
    "write pref_ftx, the weight of the chosen answer's own loss": "rpo_alpha cpo_alpha loss_weights",
    "write pref_loss orpo or simpo, which need no reference": "reference_free",
    "the reference is fixed and is loaded as the policy is": "sync_ref_model ref_model_quantization_bit",
    "preference training has no dropout": "disable_dropout",
    "an adapter starts as LoRA's authors say: A random, B zero": "pissa_init init_lora_weights",
    "adapter and layers have one learning rate": "loraplus_lr_ratio lora_lr_ratio",
    "an adapter is only on linear layers inside the blocks": "additional_target lora_modules_to_save modules_to_save "
    "lora_target_parameters",
    "macft trains with AdamW": "optim use_galore use_apollo use_badam use_muon use_adam_mini adafactor optim_args "
    "optim_target_modules",
    "macft trains an adapter or every parameter": "use_llama_pro freeze_language_model",
    "adapter and optimizer state stay float32; write bf16: true": "pure_bf16",
    "macft computes in float32, bfloat16 or float16": "fp8",
    "macft trains by MLX or PyTorch": "use_mca use_megatron_bridge use_hyper_parallel use_kt",
    "quantize with quantization_bit, or name a model in MLX's quantized layout": "quantization_method "
    "quantization_type bnb_4bit_quant_type",
    "download that revision and write its folder": "model_revision",
    "write the whole path in adapter_name_or_path": "adapter_folder",
    "the template of the model writes tools": "tool_format",
    "the template decides what a later turn sees of earlier thoughts": "preserve_thinking",
    "the template's own end tokens are trained on": "eos_token",
    "padding is never trained on": "ignore_pad_token_for_loss",
    "macft train trains": "do_train",
    "name the part in dataset_info.json (subset, split)": "dataset_config dataset_train_split",
    "the text of a row stands in `text`, or in the column that dataset_info.json names": "dataset_text_field",
    "the first evaluation comes with the first eval_steps or epoch": "eval_delay",
    "write entries of config.json in model_overrides": "model_init_kwargs",
    "macft trains causal language models": "lora_task_type",
    "a configuration of LLaMA-Factory v1, whose keys are nested: write lora_rank, per_device_train_batch_size, ... "
    "as the examples in train_lora of LLaMA-Factory do": "peft_config dist_config kernel_config model_class "
    "micro_batch_size sample_backend batching_strategy",
}

NO_EFFECT = {key: reason for reason, keys in _NO_EFFECT.items() for key in keys.split()}
REFUSED = {key: reason for reason, keys in _REFUSED.items() for key in keys.split()}

# Keys whose `false` or 0 asks for something that macft does not do.
_FALSE_ASKS = frozenset(
    {
        "use_fast_tokenizer",
        "save_safetensors",
        "remove_unused_columns",
        "do_train",
        "ignore_pad_token_for_loss",
        "disable_dropout",
        "assistant_only_loss",
        "completion_only_loss",
        "shuffle_dataset",
        "skip_special_tokens",
        "freeze_vision_tower",
        "freeze_multi_modal_projector",
    }
)
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla", "adamw")
# Values that ask for what macft does anyway.
_ASKED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_FALSE_ASKS, (True,)),
    "flash_attn": ("auto",),
    "attn_implementation": ("auto",),
    "optim": _ADAMW,
    "model_revision": ("main",),
    "quantization_method": ("bnb", "bitsandbytes"),
    "quantization_type": ("nf4",),
    "bnb_4bit_quant_type": ("nf4",),
    "f_divergence_type": ("reverse_kl",),
    "lora_task_type": ("CAUSAL_LM",),
    "init_lora_weights": (True,),
    "dataset_train_split": ("train",),
    "dataset_text_field": ("text",),
    "logging_strategy": ("steps",),
    "truncation_mode": ("keep_start",),
    "low_cpu_mem_usage": (True,),
    "dataset_kwargs": ({},),
}
_EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw", "paged_adamw_8bit", "paged_adamw_32bit")

# Values of macft's keys that other programs have -> why macft does not.
REFUSED_VALUES = {
    ("stage", "rm"): "reward models are not trained",
    ("stage", "ppo"): "macft learns from pairs (dpo) or rated answers (kto), not from a reward model",
    ("stage", "orpo"): "write stage: dpo with pref_loss: orpo",
    ("stage", "simpo"): "write stage: dpo with pref_loss: simpo",
    ("finetuning_type", "freeze"): "macft trains an adapter or every parameter",
    ("finetuning_type", "oft"): "macft's adapter is LoRA",
    ("lr_scheduler_type", "reduce_lr_on_plateau"): "the learning rate of a step does not depend on an evaluation",
    ("report_to", "all"): "name the trackers",
}


class UnsupportedKey(NamedTuple):
    """A key that macft does not have: whether it is refused or has no effect, and why."""

    is_refused: bool
    reason: str


def judge(key: str, value: Any) -> UnsupportedKey | None:
    """What becomes of a key that macft does not have, None if it does so anyway; KeyError if nobody has the key."""
    if key not in NO_EFFECT and key not in REFUSED:
        raise KeyError(key)
    is_off = value is None or (not value and key not in _FALSE_ASKS)
    if is_off or value in _ASKED.get(key, ()):
        return None
    if key == "optim" and value in _EIGHT_BIT:
        return UnsupportedKey(False, "the state of AdamW stays in float32 in memory")
    return UnsupportedKey(True, REFUSED[key]) if key in REFUSED else UnsupportedKey(False, NO_EFFECT[key])
