"""fairseq's attention with another softmax than that of q . k: StableAtten, QK-norm, L2 attention, and registered ones."""

import torch
import torch.nn.functional as F
from fairseq.modules import MultiheadAttention
from torch import Tensor

from stable_core.attentions import build_attention


def change_attention(attention: MultiheadAttention, options, positions: int) -> None:
    """Gives fairseq's attention, in place, the softmax of options.attention; "dot" leaves it as it is.

    Its weights stay those that fairseq drew. `positions` is the largest number of keys that the model is configured for.

    Raises:
        ValueError: it attends by xformers; its keys are as q, and come from a model of another width; what
            `stable_core.attentions.build_attention` refuses.
    """
    if options.attention == "dot":
        return
    if attention.use_xformers:
        raise ValueError(f"--attention {options.attention}: allowed with an xformers-att-config is dot")
    made = build_attention(attention.head_dim, options, positions)
    if made.tied and attention.kdim != attention.embed_dim:
        raise ValueError(
            f"--attention {options.attention}: keys are projected like queries, and the encoder is {attention.kdim} wide, "
            f"the decoder {attention.embed_dim}: allowed is one width"
        )
    attention.__class__ = QueryKeyAttention
    attention.q_norm, attention.k_norm, attention.features, attention.tied = made


class QueryKeyAttention(MultiheadAttention):
    """fairseq's attention whose queries and keys go through `stable_core.attentions.QueryKey` before softmax sees them.

    It is called as fairseq's own is, with tokens first. The cache of incremental decoding holds keys as k_norm made them.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        *,
        key_padding_mask: Tensor | None = None,
        incremental_state: dict | None = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query (n, batch, embed_dim), key and value (m, batch, kdim) to the output, shaped like query, and the weights.

        Args:
            key_padding_mask: (batch, m), true or 1 where a key is padding.
            incremental_state: fairseq's cache of earlier calls, which this one adds its keys and values to.
            static_kv: the cache, once filled, has all keys, as those of an encoder.
            attn_mask: (n, m), added to the logits.
            need_weights, need_head_weights: return the mean over the heads (batch, n, m), or (heads, batch, n, m). Without,
                None is returned, and attention runs on torch's fused kernel.
        """
        q, saved = self.q_norm(self._heads(self.q_proj(query))), self._get_input_buffer(incremental_state)
        if static_kv and "prev_key" in saved:
            k, v = saved["prev_key"], saved["prev_value"]
        else:
            if self.encoder_decoder_attention and self.beam_size > 1 and key.shape[1] == query.shape[1]:
                # A sentence's beams have the same keys: those of the first are enough.
                key, value = key[:, :: self.beam_size], value[:, :: self.beam_size]
                key_padding_mask = None if key_padding_mask is None else key_padding_mask[:: self.beam_size]
            k = self.k_norm(self._heads((self.q_proj if self.tied else self.k_proj)(key)))
            v = self._heads(self.v_proj(value))
            if "prev_key" in saved:
                k, v = torch.cat([saved["prev_key"], k], dim=2), torch.cat([saved["prev_value"], v], dim=2)
        if incremental_state is not None:
            key_padding_mask = self._append_prev_key_padding_mask(
                key_padding_mask, saved.get("prev_key_padding_mask"), k.shape[0], k.shape[2], static_kv
            )
            cache = {"prev_key": k, "prev_value": v, "prev_key_padding_mask": key_padding_mask}
            self._set_input_buffer(incremental_state, cache)

        beams = q.shape[0] // k.shape[0]
        if beams > 1:  # as so many more queries of the sentence
            q = q.unflatten(0, (-1, beams)).transpose(1, 2).flatten(2, 3)
        if self.features is not None:
            q, k = self.features(q, k)
        y, weights = self._attend(q, k, v, _joined(attn_mask, key_padding_mask, q), need_weights or need_head_weights)
        if beams > 1:
            y, weights = (
                x if x is None else x.unflatten(2, (beams, -1)).transpose(1, 2).flatten(0, 1) for x in (y, weights)
            )
        if weights is not None:
            weights = weights.transpose(0, 1) if need_head_weights else weights.mean(dim=1)
        return self.out_proj(y.permute(2, 0, 1, 3).flatten(2)), weights

    def _heads(self, x: Tensor) -> Tensor:
        """(tokens, batch, embed_dim) -> (batch, heads, tokens, head_dim)"""
        return x.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool):
        """The weighted values (batch, heads, n, head_dim), and the weights (batch, heads, n, m) where they are asked for."""
        drop = self.dropout_module
        dropout = drop.p if self.training or drop.apply_during_inference else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scaling), None
        logits = self.scaling * q @ k.transpose(-2, -1)
        weights = (logits if mask is None else logits + mask).softmax(-1, dtype=torch.float32)
        return F.dropout(weights, dropout).to(v) @ v, weights


def _joined(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as one that is added to the logits (batch, heads, n, m); None without any."""
    mask = None if attn_mask is None else attn_mask.to(q)
    if key_padding_mask is not None and key_padding_mask.ndim:
        padding = torch.zeros_like(key_padding_mask, dtype=q.dtype).masked_fill(key_padding_mask.bool(), -torch.inf)
        padding = padding[:, None, None]
        mask = padding if mask is None else mask + padding
    return mask
