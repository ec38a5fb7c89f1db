"""fairseq's transformer with a choice of residual connection and with σReparam: translation, up to 100L-100L [σ, App. F].

The modules have the names they have in fairseq and in transformers' BART.
"""

import math

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from stable_core.residuals import build_residuals

from .configuration_sigma_transformer import SigmaTransformerConfig
from .keywords import CACHE, check_cache, known_keywords
from .modeling_sigma_transformer_layers import (
    SigmaTransformerAttention,
    SigmaTransformerDecoderLayer,
    SigmaTransformerEncoderLayer,
    make_position_ids,
    sinusoidal_positions,
)
from .modeling_stable import StablePreTrainedModel, check_indices, norm_of


class SigmaTransformerPreTrainedModel(StablePreTrainedModel):
    config: SigmaTransformerConfig
    base_model_prefix = "model"
    _no_split_modules = ["SigmaTransformerEncoderLayer", "SigmaTransformerDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]

    def draw_(self, module: nn.Module, weight: Tensor) -> None:
        if hasattr(module, "gain"):
            super().draw_(module, weight)
        else:  # the output projection
            nn.init.normal_(weight, std=self.config.initializer_range)

    def draw_stock_(self, module: nn.Module, weight: Tensor) -> None:
        if self.config.init_std is not None:
            nn.init.normal_(weight, std=self.config.init_std)
        elif module.gain is not None:
            nn.init.xavier_uniform_(weight, module.gain)
        else:
            nn.init.kaiming_uniform_(weight, math.sqrt(5))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # fairseq leaves every bias but the attention's output's as torch draws it.
        stock, bias = self.config.init == "stock", getattr(module, "bias", None)
        if stock and getattr(module, "gain", 1.0) != 1.0 and not getattr(bias, "_is_hf_initialized", False):
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
        residual = build_residuals(config, config.encoder_layers, config.decoder_layers)[0]
        self.layers = nn.ModuleList(
            SigmaTransformerEncoderLayer(config, residual) for _ in range(config.encoder_layers)
        )
        self.layer_norm = norm_of(config) if residual.norm_first else nn.Identity()
        self.gradient_checkpointing = False
        self.mark_branches(self.layers, residual)
        self.reparametrise(self.layers)
        self.post_init()

    @known_keywords
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
            TypeError: a keyword that is not known.
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
        residual = build_residuals(config, config.encoder_layers, config.decoder_layers)[1]
        self.layers = nn.ModuleList(
            SigmaTransformerDecoderLayer(config, residual, i) for i in range(config.decoder_layers)
        )
        self.layer_norm = norm_of(config) if residual.norm_first else nn.Identity()
        self.gradient_checkpointing = False
        self.mark_branches(self.layers, residual)
        self.reparametrise(self.layers)
        self.post_init()

    @known_keywords
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

        `cache` is another name of past_key_values.

        Raises:
            TypeError: a keyword that is not known.
            ValueError: as `embed` and `check_cache`.
        """
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        elif past_key_values is not None and not isinstance(past_key_values, EncoderDecoderCache):
            past_key_values = EncoderDecoderCache(past_key_values, DynamicCache(config=self.config))
        own = past_key_values.self_attention_cache if past_key_values is not None else None
        past = own.get_seq_length() if own is not None else 0
        x = self.embed(input_ids, inputs_embeds, past)
        check_cache(self, own, past, x.shape[1])
        causal_mask = create_causal_mask(self.config, x, attention_mask, own)
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
                kv_cache=past_key_values,
                **kwargs,
            )
        cache = {CACHE: past_key_values if use_cache else None}
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.layer_norm(x), **cache)


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

    @known_keywords
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
            **{CACHE: outputs.get(CACHE)},
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
    has_loss = True

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

    @known_keywords
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
            **{CACHE: outputs.get(CACHE)},
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )
