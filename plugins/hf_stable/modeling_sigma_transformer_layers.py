"""Positions, attention and residual blocks of the translation model, encoder and decoder."""

import math

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from stable_core.residuals import Residual

from .configuration_sigma_transformer import SigmaTransformerConfig
from .keywords import known_keywords
from .modeling_stable import attend, norm_of, query_key_of

PADDING_INDEX = 1  # fairseq's, from which its positions count, whatever pad_token_id is


def sinusoidal_positions(position_ids: Tensor, dim: int) -> Tensor:
    """fairseq's, which are tensor2tensor's: positions (batch, tokens) -> (batch, tokens, dim) in fp32.

    Computed where they are needed: a buffer would have to survive meta devices and casts, and end somewhere.
    """
    half = dim // 2
    step = -math.log(10000) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=position_ids.device) * step)
    angles = (position_ids + PADDING_INDEX + 1).float().unsqueeze(-1) * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, dim % 2))


def make_position_ids(embeds: Tensor, attention_mask: Tensor | None, past: int | Tensor = 0) -> Tensor:
    """0, 1, ... for the tokens of embeds (batch, tokens, dim), not counting those that the mask hides.

    The mask is (batch, past + tokens); or (batch, 1, tokens, keys) as generation with a static cache makes it, which shows each
    token those before it and itself.
    """
    if attention_mask is None:
        return (torch.arange(embeds.shape[1], device=embeds.device) + past).unsqueeze(0)
    if attention_mask.ndim == 2:
        seen = attention_mask.long().cumsum(-1)[:, -embeds.shape[1] :]
    else:
        seen = (attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0)[:, 0].sum(-1)
    return (seen - 1).clamp(min=0)


def build_linear(in_features: int, out_features: int, gain: float | None = None) -> nn.Linear:
    """A layer of a block, which `draw_stock_` initialises with fairseq's Xavier gain, or as torch does (None)."""
    layer = nn.Linear(in_features, out_features)
    layer.gain = gain
    return layer


class SigmaTransformerAttention(nn.Module):
    """Attention of a block to itself or to the encoder's output; what softmax sees is `config.attention`'s."""

    def __init__(self, config: SigmaTransformerConfig, heads: int, layer_idx: int = 0, is_causal: bool = False) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, is_causal
        self.head_dim = config.d_model // heads
        d, gain = config.d_model, 1 / math.sqrt(2)
        # In fairseq's order: the last of those that share a sigma keeps its state.
        self.k_proj = build_linear(d, d, gain=gain)
        self.v_proj = build_linear(d, d, gain=gain)
        self.q_proj = build_linear(d, d, gain=gain)
        self.out_proj = build_linear(d, d, gain=1.0)
        made = query_key_of(config, heads, config.max_position_embeddings)
        self.q_norm, self.k_norm, self.features, self.tied = made

    @known_keywords
    def forward(
        self,
        x: Tensor,
        source: Tensor | None = None,
        attention_mask: Tensor | None = None,
        kv_cache: EncoderDecoderCache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """x (batch, tokens, d_model) attends to itself, or to the encoder's output `source` (batch, source tokens, d_model)."""
        q = self.q_norm(self.split(self.q_proj(x)))
        if source is not None and kv_cache is not None and kv_cache.is_updated.get(self.layer_idx):
            cached = kv_cache.cross_attention_cache.layers[self.layer_idx]
            k, v = cached.keys, cached.values
        else:
            keys = self.q_proj if self.tied else self.k_proj
            k, v = (self.split(projection(x if source is None else source)) for projection in (keys, self.v_proj))
            k = self.k_norm(k)
            if kv_cache is not None and source is None:
                k, v = kv_cache.self_attention_cache.update(k, v, self.layer_idx)
            elif kv_cache is not None:
                k, v = kv_cache.cross_attention_cache.update(k, v, self.layer_idx)
                kv_cache.is_updated[self.layer_idx] = True
        y, weights = attend(self, q, k, v, attention_mask, self.config.attention_dropout, **kwargs)
        return self.out_proj(y.flatten(2)), weights

    def split(self, x: Tensor) -> Tensor:
        """(batch, tokens, d_model) -> (batch, heads, tokens, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class SigmaTransformerLayer(GradientCheckpointingLayer):
    """What the encoder's and the decoder's layers have in common: feed-forward layers, and residual branches."""

    def __init__(self, config: SigmaTransformerConfig, ffn_dim: int, residual: Residual) -> None:
        super().__init__()
        self.residual = residual
        self.activation_fn = ACT2FN[config.activation_function]
        self.dropout, self.activation_dropout = nn.Dropout(config.dropout), nn.Dropout(config.activation_dropout)
        self.fc1, self.fc2 = build_linear(config.d_model, ffn_dim), build_linear(ffn_dim, config.d_model)
        self.final_layer_norm = norm_of(config)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_dropout(self.activation_fn(self.fc1(x))))

    def connect(self, x: Tensor, norm: nn.Module, branch) -> Tensor:
        return self.residual.connect(x, norm, lambda x: self.dropout(branch(x)))


class SigmaTransformerEncoderLayer(SigmaTransformerLayer):
    def __init__(self, config: SigmaTransformerConfig, residual: Residual) -> None:
        super().__init__(config, config.encoder_ffn_dim, residual)
        self.self_attn = SigmaTransformerAttention(config, config.encoder_attention_heads)
        self.self_attn_layer_norm = norm_of(config)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        x = self.connect(
            x, self.self_attn_layer_norm, lambda x: self.self_attn(x, attention_mask=attention_mask, **kwargs)[0]
        )
        return self.connect(x, self.final_layer_norm, self.feed_forward)


class SigmaTransformerDecoderLayer(SigmaTransformerLayer):
    def __init__(self, config: SigmaTransformerConfig, residual: Residual, layer_idx: int) -> None:
        super().__init__(config, config.decoder_ffn_dim, residual)
        heads = config.decoder_attention_heads
        self.self_attn = SigmaTransformerAttention(config, heads, layer_idx, is_causal=True)
        self.self_attn_layer_norm = norm_of(config)
        self.encoder_attn = SigmaTransformerAttention(config, heads, layer_idx)
        self.encoder_attn_layer_norm = norm_of(config)

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        x = self.connect(
            x, self.self_attn_layer_norm, lambda x: self.self_attn(x, attention_mask=attention_mask, **kwargs)[0]
        )
        x = self.connect(
            x,
            self.encoder_attn_layer_norm,
            lambda x: self.encoder_attn(x, source, attention_mask=encoder_attention_mask, **kwargs)[0],
        )
        return self.connect(x, self.final_layer_norm, self.feed_forward)
