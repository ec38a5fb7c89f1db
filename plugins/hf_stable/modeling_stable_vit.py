"""StableViT [ST, Table 1] and the ViT with σReparam [σ, Section 4.1]. The modules have the names they have in timm."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from stable_core.init_std import vit_init_std
from stable_core.residuals import Residual, build_residuals

from .configuration_stable_vit import SigmaViTConfig, StableViTConfig
from .keywords import known_keywords
from .modeling_stable import StablePreTrainedModel, attend, norm_of, query_key_of


class StableViTPatchEmbed(nn.Module):
    def __init__(self, config: StableViTConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=size, stride=size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class StableViTAttention(nn.Module):
    """Self-attention with a packed projection; what softmax sees is `config.attention`'s [ST, eq. 3]."""

    is_causal = False

    def __init__(self, config: StableViTConfig, tokens: int) -> None:
        super().__init__()
        self.config, dim = config, config.hidden_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        made = query_key_of(config, config.num_attention_heads, tokens)
        self.q_norm, self.k_norm, self.features, self.tied = made
        self.proj = nn.Linear(dim, dim)

    @known_keywords
    def forward(self, x: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.config.num_attention_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(q if self.tied else k)
        y, weights = attend(self, q, k, v, None, self.config.attention_probs_dropout_prob, **kwargs)
        return self.proj(y.flatten(2)), weights


class StableViTMLP(nn.Module):
    def __init__(self, config: StableViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class StableViTBlock(GradientCheckpointingLayer):
    def __init__(self, config: StableViTConfig, residual: Residual, tokens: int) -> None:
        super().__init__()
        self.residual = residual
        self.norm1 = norm_of(config)
        self.attn = StableViTAttention(config, tokens)
        self.norm2 = norm_of(config)
        self.mlp = StableViTMLP(config)
        self.drop = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        x = self.residual.connect(x, self.norm1, lambda x: self.drop(self.attn(x, **kwargs)[0]))
        return self.residual.connect(x, self.norm2, lambda x: self.drop(self.mlp(x)))


class StableViTPreTrainedModel(StablePreTrainedModel):
    config: StableViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["StableViTBlock"]
    _input_embed_layer = "patch_embed"
    _can_record_outputs = {"hidden_states": StableViTBlock, "attentions": StableViTAttention}

    def draw_stock_(self, module: nn.Module, weight: Tensor) -> None:
        super().draw_stock_(module, weight)
        if isinstance(module, nn.Conv2d):
            patches = self.config.patch_initializer_range
            if patches is None and self.config.initializer_range is None and parametrize.is_parametrized(module):
                weights, patches = self.papers_stds()
                patches = None if patches == weights else patches
            if patches is not None:  # drawn again, and not scaled: a seed gives the weights that it always gave
                nn.init.normal_(weight, std=patches)

    def papers_std(self) -> float:
        return self.papers_stds()[0]

    def papers_stds(self) -> tuple[float, float]:
        return vit_init_std(self.config.hidden_size, self.config.num_channels * self.config.patch_size**2)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StableViTModel):
            nn.init.normal_(module.cls_token, std=1e-6)  # timm's
            nn.init.normal_(module.pos_embed, std=0.02)


class StableViTModel(StableViTPreTrainedModel):
    """Images (batch, channels, height, width) to hidden states (batch, 1 + patches, hidden_size), the class token first."""

    def __init__(self, config: StableViTConfig) -> None:
        super().__init__(config)
        tokens = 1 + (config.image_size // config.patch_size) ** 2
        self.patch_embed = StableViTPatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, config.hidden_size))
        self.drop = nn.Dropout(config.hidden_dropout_prob)
        residual = build_residuals(config, config.num_hidden_layers, 0)[0]
        self.blocks = nn.ModuleList(StableViTBlock(config, residual, tokens) for _ in range(config.num_hidden_layers))
        self.norm = norm_of(config) if residual.norm_first else nn.Identity()
        self.mark_branches(self.blocks, residual)
        self.reparametrise(self)
        self.post_init()

    @known_keywords
    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """pooler_output is the class token's last hidden state.

        Raises:
            TypeError: a keyword that is not known.
            ValueError: images of other channels or size than the configuration's.
        """
        config, shape = self.config, tuple(pixel_values.shape)
        if shape[1:] != (config.num_channels, config.image_size, config.image_size):
            expected = f"(batch, {config.num_channels}, {config.image_size}, {config.image_size})"
            raise ValueError(f"pixel_values of shape {shape}: num_channels and image_size allow {expected}")
        x = self.patch_embed(pixel_values.to(self.pos_embed.dtype))
        x = self.drop(torch.cat([self.cls_token.expand(shape[0], -1, -1), x], dim=1) + self.pos_embed)
        for block in self.blocks:
            x = block(x, **kwargs)
        x = self.norm(x)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x[:, 0])


class StableViTForImageClassification(StableViTPreTrainedModel):
    """StableViT with a linear head on the class token, `config.num_labels` classes."""

    model_cls = StableViTModel
    has_loss = True

    def __init__(self, config: StableViTConfig) -> None:
        super().__init__(config)
        self.vit = self.model_cls(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        if config.num_labels:
            self.reparametrise(self.classifier, qkv="separate")
        self.post_init()

    @known_keywords
    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> ImageClassifierOutput:
        """labels (batch,): classes, or numbers for a regression with one label."""
        outputs = self.vit(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SigmaViTModel(StableViTModel):
    """StableViTModel with SigmaViTConfig."""

    config: SigmaViTConfig


class SigmaViTForImageClassification(StableViTForImageClassification):
    """StableViTForImageClassification with SigmaViTConfig."""

    config: SigmaViTConfig
    model_cls = SigmaViTModel
