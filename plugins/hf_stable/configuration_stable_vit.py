"""StableViT's configuration, and that of the ViT with σReparam."""

from huggingface_hub.dataclasses import strict

from .configuration_stable import StableConfig, check_positive

SHAPES = {  # blocks, heads, width, MLP, patch
    "small": (12, 6, 384, 1536, 16),
    "base": (12, 12, 768, 3072, 16),
    "large": (24, 16, 1024, 4096, 16),
    "huge": (32, 16, 1280, 5120, 14),
    "giant": (40, 16, 1408, 6144, 14),
    "200": (200, 12, 768, 3072, 14),
}


@strict
class StableViTConfig(StableConfig):
    r"""
    transformers' fields of a ViT and StableViT's [ST, Table 1]. Presets: `StableViTConfig.preset("large")`.

    Attributes:
        image_size: side of the images; with patch_size it gives N of StableAtten's tau.
        patch_size, num_channels: of the patch embedding.
        qkv_bias: biases of queries, keys and values.
        norm, attention, init, alpha: and all else of `stable_core.options.Options`; init = "stock" is timm's.
        initializer_range: standard deviation under init = "stock". Left out it is 0.02, and in reparametrised layers the
            paper's at its sizes and what has its spectral norm at others (`stable_core.init_std`).
        patch_initializer_range: that of the patch embedding; left out, initializer_range, and what the paper has for it where
            that is left out too.
    """

    model_type = "stable_vit"
    auto_classes = {
        "AutoConfig": "configuration_stable_vit.StableViTConfig",
        "AutoModel": "modeling_stable_vit.StableViTModel",
        "AutoModelForImageClassification": "modeling_stable_vit.StableViTForImageClassification",
    }

    norm: str = "stable"
    alpha: float | int = 0.25
    attention: str = "stable"
    init: str = "stable"
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    qkv_bias: bool = True
    patch_initializer_range: float | None = None

    def check_settings(self) -> None:
        super().check_settings()
        check_positive(self, "image_size", "patch_size", "num_channels", "hidden_size", "intermediate_size")
        check_positive(self, "num_hidden_layers", "num_attention_heads", "patch_initializer_range")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads}: allowed are divisors of hidden_size = {self.hidden_size}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(f"patch_size = {self.patch_size}: allowed are sizes up to image_size = {self.image_size}")

    @classmethod
    def preset(cls, size: str, **fields) -> "StableViTConfig":
        """ "small" and "base"; "large", "huge", "giant" and "200" as in [ST, Table 1]; `fields` override it."""
        if size not in SHAPES:
            raise ValueError(f"size = {size!r}: allowed are {', '.join(map(repr, SHAPES))}")
        names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "patch_size")
        return cls(**{**dict(zip(names, SHAPES[size], strict=True)), **fields})


@strict
class SigmaViTConfig(StableViTConfig):
    r"""The same with the σReparam paper's defaults: dot-product attention, no LayerNorm, gamma = sigma at the start."""

    model_type = "sigma_vit"
    auto_classes = {
        "AutoConfig": "configuration_stable_vit.SigmaViTConfig",
        "AutoModel": "modeling_stable_vit.SigmaViTModel",
        "AutoModelForImageClassification": "modeling_stable_vit.SigmaViTForImageClassification",
    }

    norm: str = "none"
    attention: str = "dot"
    init: str = "stock"
    norm_eps: float = 1e-6
    reparam: str = "sigma"
    gamma_init: str = "spectral"
