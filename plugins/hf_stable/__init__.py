"""Hugging Face plugin: StableGPT, StableViT and the translation model for transformers' Auto classes; σReparam for any model.

`import hf_stable` registers the models; folders that they are saved to need this library no longer.
"""

from stable_core.extras import extra

with extra("hf"):
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    from .configuration_sigma_transformer import SigmaTransformerConfig
    from .configuration_stable_gpt import StableGPTConfig
    from .configuration_stable_vit import SigmaViTConfig, StableViTConfig
    from .exporting import export
    from .modeling_sigma_transformer import SigmaTransformerForConditionalGeneration, SigmaTransformerModel
    from .modeling_stable_gpt import StableGPTForCausalLM, StableGPTModel
    from .modeling_stable_vit import (
        SigmaViTForImageClassification,
        SigmaViTModel,
        StableViTForImageClassification,
        StableViTModel,
    )
    from .monitor import MonitorCallback
    from .qk_clip import QKClipCallback
    from .reparametrised import fold, sigma_reparam
    from .resume import resume_across_rescues
    from .tokenization_sigma_transformer import SigmaTransformerTokenizer
    from .undecayed import UndecayedGamma
    from .z_loss import add_z_loss

__all__ = [
    "MonitorCallback",
    "QKClipCallback",
    "SigmaTransformerConfig",
    "SigmaTransformerForConditionalGeneration",
    "SigmaTransformerModel",
    "SigmaTransformerTokenizer",
    "SigmaViTConfig",
    "SigmaViTForImageClassification",
    "SigmaViTModel",
    "StableGPTConfig",
    "StableGPTForCausalLM",
    "StableGPTModel",
    "StableViTConfig",
    "StableViTForImageClassification",
    "StableViTModel",
    "UndecayedGamma",
    "add_z_loss",
    "export",
    "fold",
    "sigma_reparam",
]

for config in (StableGPTConfig, StableViTConfig, SigmaViTConfig, SigmaTransformerConfig):
    AutoConfig.register(config.model_type, config)
for auto, models in (
    (AutoModel, (StableGPTModel, StableViTModel, SigmaViTModel, SigmaTransformerModel)),
    (AutoModelForCausalLM, (StableGPTForCausalLM,)),
    (AutoModelForSeq2SeqLM, (SigmaTransformerForConditionalGeneration,)),
    (AutoModelForImageClassification, (StableViTForImageClassification, SigmaViTForImageClassification)),
):
    for model in models:
        auto.register(model.config_class, model)

AutoTokenizer.register(SigmaTransformerConfig, SigmaTransformerTokenizer)
resume_across_rescues()
