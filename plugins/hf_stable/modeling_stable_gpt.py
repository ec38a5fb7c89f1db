"""StableGPT: GPT-2 with StableNorm, StableAtten and StableInit, or with the baselines they are held against [ST, Table 2].

The modules have the names they have in nanoGPT and in transformers' GPT-2.
"""

import math

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from stable_core.init_std import gpt_init_std
from stable_core.residuals import Residual, build_residuals

from .configuration_stable_gpt import StableGPTConfig
from .keywords import CACHE, check_cache, known_keywords
from .modeling_stable import StablePreTrainedModel, attend, check_indices, norm_of, query_key_of


class StableGPTAttention(nn.Module):
    """Causal self-attention with a packed projection; what softmax sees is `config.attention`'s [ST, eq. 3]."""

    is_causal = True

    def __init__(self, config: StableGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm, self.k_norm, self.features, self.tied = query_key_of(config, config.n_head, config.block_size)

    @known_keywords
    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        kv_cache: Cache | None = None,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.config.n_head, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(q if self.tied else k)
        if kv_cache is not None:
            k, v = kv_cache.update(k, v, self.layer_idx)
        kwargs["position_ids"] = position_ids  # by which flash attention finds packed sequences
        y, weights = attend(self, q, k, v, attention_mask, self.config.dropout, **kwargs)
        return self.c_proj(y.flatten(2)), weights


class StableGPTMLP(nn.Module):
    def __init__(self, config: StableGPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.act = ACT2FN[config.activation_function]
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class StableGPTBlock(GradientCheckpointingLayer):
    def __init__(self, config: StableGPTConfig, residual: Residual, layer_idx: int) -> None:
        super().__init__()
        self.residual = residual
        self.ln_1 = norm_of(config)
        self.attn = StableGPTAttention(config, layer_idx)
        self.ln_2 = norm_of(config)
        self.mlp = StableGPTMLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        x = self.residual.connect(x, self.ln_1, lambda x: self.drop(self.attn(x, **kwargs)[0]))
        return self.residual.connect(x, self.ln_2, lambda x: self.drop(self.mlp(x)))


class StableGPTPreTrainedModel(StablePreTrainedModel):
    config: StableGPTConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["StableGPTBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _input_embed_layer = "wte"
    _can_record_outputs = {"hidden_states": StableGPTBlock, "attentions": StableGPTAttention}

    def draw_stock_(self, module: nn.Module, weight: Tensor) -> None:
        super().draw_stock_(module, weight)
        if getattr(module, "on_residual", False):
            weight.div_(math.sqrt(2 * self.config.n_layer))  # GPT-2's

    def papers_std(self) -> float:
        return gpt_init_std(self.config.n_embd)


class StableGPTModel(StableGPTPreTrainedModel):
    """Tokens (batch, sequence) to hidden states (batch, sequence, n_embd)."""

    def __init__(self, config: StableGPTConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        residual = build_residuals(config, 0, config.n_layer)[1]
        self.h = nn.ModuleList(StableGPTBlock(config, residual, i) for i in range(config.n_layer))
        self.ln_f = norm_of(config) if residual.norm_first else nn.Identity()
        self.gradient_checkpointing = False
        for block in self.h:
            block.attn.c_proj.on_residual = block.mlp.c_proj.on_residual = True
        self.mark_branches(self.h, residual)
        self.reparametrise(self.h)
        self.post_init()

    @known_keywords
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """transformers' usual arguments; `cache` is another name of past_key_values.

        Raises:
            TypeError: a keyword that is not among them.
            ValueError: not one of input_ids and inputs_embeds; a token past the vocabulary (on a CPU); a sequence, with what
                the cache holds, longer than block_size; a position past it (on a CPU); as `check_cache`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            check_indices("input_ids", input_ids, "vocab_size", self.wte.num_embeddings)
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        length, block_size = inputs_embeds.shape[1], self.config.block_size
        check_cache(self, past_key_values, past, length)
        if position_ids is None:
            if isinstance(past, int) and past + length > block_size:
                raise ValueError(f"a sequence of {past + length} tokens: block_size = {block_size} is the longest")
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)
        else:
            check_indices("position_ids", position_ids, "block_size", block_size)
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        x = self.drop(inputs_embeds + self.wpe(position_ids))
        for block in self.h:
            x = block(x, attention_mask=mask, kv_cache=past_key_values, position_ids=position_ids, **kwargs)
        cache = {CACHE: past_key_values if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(x), **cache)


def keep_positions(x: Tensor, positions: int | Tensor) -> Tensor:
    """Of x (batch, sequence, width) the last n, all for 0; or those of an index, of an index per row, of a boolean mask.

    transformers has it as slice_logits_to_keep, from 5.21 on.
    """
    if isinstance(positions, int):
        return x[:, -positions:]
    if positions.ndim == 1:
        return x[:, positions]
    if positions.dtype == torch.bool:
        return x[positions]  # one row after the other: each can keep another number
    return torch.take_along_dim(x, positions[..., None], dim=1)


class StableGPTForCausalLM(StableGPTPreTrainedModel, GenerationMixin):
    """StableGPT with its language modelling head, tied to the token embedding unless `tie_word_embeddings=False`."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    has_loss = True

    def __init__(self, config: StableGPTConfig) -> None:
        super().__init__(config)
        self.transformer = StableGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @known_keywords
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """labels (batch, sequence): the tokens themselves, which are shifted here; -100 is left out of the loss."""
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(keep_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
