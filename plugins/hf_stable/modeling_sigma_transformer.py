"""fairseq's transformer with a choice of residual connection and with σReparam: translation, up to 100L-100L [σ, App. F].

The modules have the names they have in fairseq and in transformers' BART.
"""

import math

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from stable_core.deepnorm import DeepNormScale, deepnorm_scales

from .configuration_sigma_transformer import SigmaTransformerConfig
from .modeling_stable import StablePreTrainedModel, attend, check_indices

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


def build_linear(in_features: int, out_features: int, beta: float = 1.0, gain: float | None = None) -> nn.Linear:
    """A layer of a block, which `draw_` initialises: fairseq's Xavier gain (None: torch's own), then DeepNorm's beta."""
    layer = nn.Linear(in_features, out_features)
    layer.beta, layer.gain = beta, gain
    return layer


class SigmaTransformerAttention(nn.Module):
    def __init__(
        self, config: SigmaTransformerConfig, heads: int, beta: float, layer_idx: int = 0, is_causal: bool = False
    ) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, is_causal
        self.head_dim = config.d_model // heads
        d, gain = config.d_model, 1 / math.sqrt(2)
        # In fairseq's order: the last of those that share a sigma keeps its state.
        self.k_proj = build_linear(d, d, gain=gain)
        self.v_proj = build_linear(d, d, beta, gain)
        self.q_proj = build_linear(d, d, gain=gain)
        self.out_proj = build_linear(d, d, beta, gain=1.0)

    def forward(
        self,
        x: Tensor,
        source: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """x (batch, tokens, d_model) attends to itself, or to the encoder's output `source` (batch, source tokens, d_model)."""
        q = self.split(self.q_proj(x))
        if source is not None and past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            cached = past_key_values.cross_attention_cache.layers[self.layer_idx]
            k, v = cached.keys, cached.values
        else:
            k, v = (
                self.split(projection(x if source is None else source)) for projection in (self.k_proj, self.v_proj)
            )
            if past_key_values is not None and source is None:
                k, v = past_key_values.self_attention_cache.update(k, v, self.layer_idx)
            elif past_key_values is not None:
                k, v = past_key_values.cross_attention_cache.update(k, v, self.layer_idx)
                past_key_values.is_updated[self.layer_idx] = True
        y, weights = attend(self, q, k, v, attention_mask, self.config.attention_dropout, **kwargs)
        return self.out_proj(y.flatten(2)), weights

    def split(self, x: Tensor) -> Tensor:
        """(batch, tokens, d_model) -> (batch, heads, tokens, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class SigmaTransformerLayer(GradientCheckpointingLayer):
    """What the encoder's and the decoder's layers have in common: feed-forward layers, and residual branches."""

    def __init__(self, config: SigmaTransformerConfig, ffn_dim: int, scale: DeepNormScale) -> None:
        super().__init__()
        self.config, self.alpha = config, scale.alpha
        self.activation_fn = ACT2FN[config.activation_function]
        self.dropout, self.activation_dropout = nn.Dropout(config.dropout), nn.Dropout(config.activation_dropout)
        self.fc1 = build_linear(config.d_model, ffn_dim, scale.beta)
        self.fc2 = build_linear(ffn_dim, config.d_model, scale.beta)
        self.final_layer_norm = build_layer_norm(config)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_dropout(self.activation_fn(self.fc1(x))))

    def residual(self, x: Tensor, norm: nn.Module, branch) -> Tensor:
        """x + branch(norm(x)) for "pre-ln", norm(alpha x + branch(x)) otherwise."""
        if self.config.residual == "pre-ln":
            return x + self.dropout(branch(norm(x)))
        return norm(self.dropout(branch(x)).add(x, alpha=self.alpha))


class SigmaTransformerEncoderLayer(SigmaTransformerLayer):
    def __init__(self, config: SigmaTransformerConfig, scale: DeepNormScale) -> None:
        super().__init__(config, config.encoder_ffn_dim, scale)
        self.self_attn = SigmaTransformerAttention(config, config.encoder_attention_heads, scale.beta)
        self.self_attn_layer_norm = build_layer_norm(config)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        x = self.residual(
            x, self.self_attn_layer_norm, lambda x: self.self_attn(x, attention_mask=attention_mask, **kwargs)[0]
        )
        return self.residual(x, self.final_layer_norm, self.feed_forward)


class SigmaTransformerDecoderLayer(SigmaTransformerLayer):
    def __init__(self, config: SigmaTransformerConfig, scale: DeepNormScale, layer_idx: int) -> None:
        super().__init__(config, config.decoder_ffn_dim, scale)
        heads = config.decoder_attention_heads
        self.self_attn = SigmaTransformerAttention(config, heads, scale.beta, layer_idx, is_causal=True)
        self.self_attn_layer_norm = build_layer_norm(config)
        self.encoder_attn = SigmaTransformerAttention(config, heads, scale.beta, layer_idx)
        self.encoder_attn_layer_norm = build_layer_norm(config)

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        x = self.residual(
            x, self.self_attn_layer_norm, lambda x: self.self_attn(x, attention_mask=attention_mask, **kwargs)[0]
        )
        x = self.residual(
            x,
            self.encoder_attn_layer_norm,
            lambda x: self.encoder_attn(x, source, attention_mask=encoder_attention_mask, **kwargs)[0],
        )
        return self.residual(x, self.final_layer_norm, self.feed_forward)


def build_layer_norm(config: SigmaTransformerConfig) -> nn.Module:
    return nn.Identity() if config.residual == "none" else nn.LayerNorm(config.d_model, config.norm_eps)


def build_scale(config: SigmaTransformerConfig, side: str) -> DeepNormScale:
    if config.residual != "deepnorm":
        return DeepNormScale(1.0, 1.0)
    return getattr(deepnorm_scales(config.encoder_layers, config.decoder_layers), side)


class SigmaTransformerPreTrainedModel(StablePreTrainedModel):
    config: SigmaTransformerConfig
    base_model_prefix = "model"
    _no_split_modules = ["SigmaTransformerEncoderLayer", "SigmaTransformerDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]

    def draw_(self, module: nn.Module, weight: Tensor) -> None:
        if not hasattr(module, "beta"):  # the output projection
            nn.init.normal_(weight, std=self.config.initializer_range)
            return
        if self.config.init_std is not None:
            nn.init.trunc_normal_(weight, std=self.config.init_std)
        elif module.gain is not None:
            nn.init.xavier_uniform_(weight, module.gain)
        else:
            nn.init.kaiming_uniform_(weight, math.sqrt(5))
        weight.mul_(module.beta)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # fairseq leaves every bias but the attention's output's as torch draws it.
        bias = getattr(module, "bias", None)
        if hasattr(module, "beta") and module.gain != 1.0 and not getattr(bias, "_is_hf_initialized", False):
            nn.init.uniform_(bias, -(module.in_features**-0.5), module.in_features**-0.5)

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, past: int | Tensor = 0) -> Tensor:
        """Embeddings (batch, tokens, d_model), scaled by sqrt(d_model), of an encoder or decoder.

        Raises:
            ValueError: not one of input_ids and inputs_embeds; a token past the vocabulary (on a CPU); a sequence, with what
                the cache holds, longer than max_position_embeddings.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds, to the encoder and to the decoder")
        if inputs_embeds is None:
            name, field = self.tokens
            check_indices(name, input_ids, field, self.embed_tokens.num_embeddings)
            inputs_embeds = self.embed_tokens(input_ids)
        length, most = inputs_embeds.shape[1], self.config.max_position_embeddings
        if length > most or (isinstance(past, int) and past + length > most):
            raise ValueError(f"a sequence of {past + length} tokens: max_position_embeddings = {most} is the most")
        return inputs_embeds * math.sqrt(self.config.d_model)

    def add_positions(self, x: Tensor, attention_mask: Tensor | None, past: int | Tensor = 0) -> Tensor:
        """x (batch, tokens, d_model), to which dropout is applied as well."""
        positions = sinusoidal_positions(make_position_ids(x, attention_mask, past), x.shape[-1])
        return nn.functional.dropout(x + positions.to(x.dtype), self.config.dropout, self.training)

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True) -> nn.Embedding:
        if self.config.source_vocab_size != self.config.vocab_size and (new_num_tokens or pad_to_multiple_of):
            raise ValueError(
                f"new_num_tokens = {new_num_tokens!r}: the source has {self.config.source_vocab_size} tokens and the target "
                f"{self.config.vocab_size}; allowed are models of one vocabulary"
            )
        embeddings = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        decoder = self.base_model.decoder
        if decoder.embed_tokens is not embeddings:
            decoder.embed_tokens = self._get_resized_embeddings(
                decoder.embed_tokens, embeddings.num_embeddings, mean_resizing=mean_resizing
            )
        self.config.src_vocab_size = None
        return embeddings


class SigmaTransformerEncoder(SigmaTransformerPreTrainedModel):
    """Source tokens (batch, source tokens) to hidden states (batch, source tokens, d_model)."""

    tokens = "input_ids", "src_vocab_size"
    _can_record_outputs = {"hidden_states": SigmaTransformerEncoderLayer, "attentions": SigmaTransformerAttention}

    def __init__(self, config: SigmaTransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.source_vocab_size, config.d_model, config.pad_token_id)
        scale = build_scale(config, "encoder")
        self.layers = nn.ModuleList(SigmaTransformerEncoderLayer(config, scale) for _ in range(config.encoder_layers))
        self.layer_norm = build_layer_norm(config) if config.residual == "pre-ln" else nn.Identity()
        self.gradient_checkpointing = False
        self.reparametrise(self.layers)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """attention_mask (batch, source tokens): 0 for padding, on whichever side; left out, padding is attended to.

        Raises:
            ValueError: as `embed`.
        """
        x = self.embed(input_ids, inputs_embeds)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        x = self.add_positions(x, attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None)
        for layer in self.layers:
            x = layer(x, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(x))


class SigmaTransformerDecoder(SigmaTransformerPreTrainedModel):
    """Target tokens (batch, tokens) and the encoder's hidden states to hidden states (batch, tokens, d_model)."""

    tokens = "decoder_input_ids", "vocab_size"
    _can_record_outputs = {
        "hidden_states": SigmaTransformerDecoderLayer,
        "attentions": OutputRecorder(SigmaTransformerAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(SigmaTransformerAttention, index=1, layer_name="encoder_attn"),
    }

    def __init__(self, config: SigmaTransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        scale = build_scale(config, "decoder")
        self.layers = nn.ModuleList(
            SigmaTransformerDecoderLayer(config, scale, i) for i in range(config.decoder_layers)
        )
        self.layer_norm = build_layer_norm(config) if config.residual == "pre-ln" else nn.Identity()
        self.gradient_checkpointing = False
        self.reparametrise(self.layers)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """attention_mask (batch, cached and given tokens), encoder_attention_mask (batch, source tokens): 0 for padding.

        Raises:
            ValueError: as `embed`.
        """
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        x = self.embed(input_ids, inputs_embeds, past)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values.self_attention_cache if past_key_values is not None else None,
        )
        source_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        x = self.add_positions(x, attention_mask, past)
        for layer in self.layers:
            x = layer(
                x,
                encoder_hidden_states,  # by position, or gradient checkpointing would not see it
                attention_mask=causal_mask,
                encoder_attention_mask=source_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.layer_norm(x), past_key_values=past_key_values if use_cache else None
        )


class SigmaTransformerModel(SigmaTransformerPreTrainedModel):
    """Source tokens (batch, source tokens) and target tokens (batch, tokens) to hidden states (batch, tokens, d_model)."""

    def __init__(self, config: SigmaTransformerConfig) -> None:
        super().__init__(config)
        if config.share_all_embeddings:
            self._tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}
        self.encoder = SigmaTransformerEncoder(config)
        self.decoder = SigmaTransformerDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embed_tokens = value
        if self.config.share_all_embeddings:
            self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> Seq2SeqModelOutput:
        """transformers' usual arguments; raises ValueError as the encoder and decoder do."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, **kwargs)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            fields = ("last_hidden_state", "hidden_states", "attentions")
            encoder_outputs = BaseModelOutput(**dict(zip(fields, encoder_outputs, strict=False)))
        outputs = self.decoder(
            decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class SigmaTransformerForConditionalGeneration(SigmaTransformerPreTrainedModel, GenerationMixin):
    """The translation model: SigmaTransformerModel with its output projection."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: SigmaTransformerConfig) -> None:
        super().__init__(config)
        if config.share_all_embeddings:
            self._tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}
        self.model = SigmaTransformerModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """labels (batch, tokens) moved one place to the right, behind decoder_start_token_id; -100 becomes padding."""
        start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """labels (batch, tokens): the target sentences, each with its end; -100 is left out of the loss."""
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:  # which transformers would shift once more, as a language model's
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, shift_labels=labels.contiguous(), **kwargs
            )
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )
