"""transformers' tests that skip themselves on our models, and why: left out, by how their names begin.

What transformers skips beside these is shown as skipped: a test that is new, or a model that lost what it had.
"""

import torch

NO_SUCH_PART = {
    "no model of models": (
        "test_attn_implementation_composite_models",
        "test_can_set_attention_dynamically_composite_model",
        "test_internal_model_config_and_subconfig_are_same",
        "test_sdpa_can_dispatch_composite_models",
    ),
    "no experts": (
        "test_eager_matches_batched_and_grouped_inference",
        "test_moe_models_record_router_logits",
        "test_output_router_logits_from_config",
    ),
    "no rotary positions": ("test_model_rope_", "test_vision_axial_rope"),
    "no sliding window": ("test_sliding_window_mask",),
    "positions that do not resize": ("test_resize_position_vector_embeddings",),
    "no attention weights beside fused attention": ("test_eager_matches_sdpa_inference_24_",),
    "no modules that stay in fp32": ("test_keep_in_fp32_modules",),
    "no weights by other names in checkpoints": ("test_can_load_from_already_mapped_keys", "test_reverse_loading_mapping"),
    "no plan for tensor parallelism": ("test_tp_plan_matches_params",),
    "no place on transformers' list of models that are tried so": ("test_can_init_all_missing_weights",),
}  # fmt: skip
NOT_INSTALLED = {
    "deepspeed": (
        "test_resize_embeddings_untied_with_deepspeed",
        "test_resize_tokens_embeddings_with_deepspeed",
    ),
    "flash-attn": ("test_flash_attn_",),
    "kernels": ("test_kernels_can_load_without_crashing",),
}
SLOW = ("test_torch_compile_for_training",)  # by transformers' own mark; tests/engines compiles
WANT_AN_ACCELERATOR = (
    "test_can_load_with_device_context_manager",
    "test_can_load_with_global_device_set",
    "test_cpu_offload",
    "test_disk_offload_",
    "test_flex_attention_with_grads",
    "test_model_parallelism",
    "test_sdpa_can_compile_dynamic",
    "test_sdpa_can_dispatch_on_flash",
)
NOT_OF_THE_FAMILY = {
    "StableGPT": ("test_encoder_decoder_loss_no_double_shift",),
    "StableViT": (
        "test_causal_lm_loss_honors_shift_labels",
        "test_enable_input_require_grads_with_gradient_checkpointing",
        "test_encoder_decoder_loss_no_double_shift",
        "test_inputs_embeds",
        "test_resize_embeddings_untied",
        "test_resize_tokens_embeddings",
    ),
    "SigmaTransformer": (
        "test_can_capture_specific_layers_hidden_states",
        "test_causal_lm_loss_honors_shift_labels",
    ),
}
NOT_OF_THE_FAMILY["SigmaViT"] = NOT_OF_THE_FAMILY["StableViT"]


def never(family: str, tests: list[str]) -> set[str]:
    """Those of `tests` that cannot run on models of the family."""
    starts = sum((*NO_SUCH_PART.values(), *NOT_INSTALLED.values(), NOT_OF_THE_FAMILY[family], SLOW), ())
    if not torch.accelerator.is_available():
        starts += WANT_AN_ACCELERATOR
    return {test for test in tests if test.startswith(starts)}
