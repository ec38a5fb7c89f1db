"""Attention entropy without the attention matrix.

Source: Zhai et al. [σ, Section 3.1]: Ent(A_i) = -sum_j A_ij log A_ij, where A = softmax(a) and a = s * Q K^T, in nats.
Since log A_ij = a_ij - lse_i, with lse_i the logsumexp of row i,

    Ent(A_i) = lse_i - s * q_i . (A K)_i,

and A K is one call of a fused attention kernel with V = K. Memory grows with T, not with T^2.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .theory import entropy_lower_bound

MASKED = -1e4  # and below: how additive masks write "never" (-inf, finfo.min, fairseq's and BERT's -10000)
CHUNK = 1 << 20  # logits held at a time, 4 MiB: fits a CPU's cache, where it is as fast as the fused kernel
# The identity subtracts numbers as large as the logits: beyond this its fp32 rounding comes near 1e-3 nats.
LARGEST_LOGIT = 500.0

_fused_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # (output, logsumexp)


class AttentionStatistics(NamedTuple):
    """What the rows of an attention matrix look like, each of shape (batch, heads, queries).

    A row whose keys are all masked has keys 0, entropy 0, max_logit -inf and bound 0.
    """

    entropy: Tensor  # nats
    max_logit: Tensor  # the largest logit of a key that is not masked
    bound: Tensor  # the least entropy that logits of this row's size allow, nats [σ, Theorem 3.1]
    keys: Tensor  # number of keys that are not masked


def _in_full_precision(function):
    """Without gradient, and in the precision it says, whatever autocast says."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        first = args[0] if args else next(iter(kwargs.values()))
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


@_in_full_precision
def attention_entropy(
    q: Tensor, k: Tensor, *, scale: float, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Ent(A_i) of every query in nats, shape (batch, heads, queries), fp32, without gradient.

    On a CPU it is one fused attention call; elsewhere, with a finite additive mask (ALiBi, relative positions), or where
    logits are so large that the identity would lose digits, chunks of queries whose logits are formed and forgotten.

    Args:
        q: (batch, heads, queries, head_dim), any floating dtype; the arithmetic is in fp32.
        k: (batch, key_heads, keys, head_dim); key_heads divides heads (grouped-query attention).
        scale: what q.k is multiplied by; `F.scaled_dot_product_attention` takes 1/sqrt(head_dim) by itself.
        attn_mask: as for `F.scaled_dot_product_attention`, broadcastable to (batch, heads, queries, keys): boolean, True
            where a key takes part, or added to the logits. A row without a key has entropy 0.
        is_causal: query i sees keys 0..i, in addition to attn_mask.

    Raises:
        ValueError: shapes that do not fit.
    """
    mask = _check(q, k, attn_mask)
    q, k = q.float(), k.float()
    largest = abs(scale) * q.norm(dim=-1).max() * k.norm(dim=-1).max()
    if q.device.type == "cpu" and largest <= LARGEST_LOGIT and (mask is None or _only_hides(mask)):
        if mask is not None:  # the kernel wants four dimensions and -inf
            mask = torch.zeros_like(mask).masked_fill(mask <= MASKED, -math.inf)
            mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        mean_key, lse = _fused_cpu(q, k, k, 0.0, is_causal, attn_mask=mask, scale=scale)
        return (lse - scale * torch.linalg.vecdot(q, mean_key)).clamp_(min=0)
    return torch.cat([row_statistics(logits).entropy for logits in _logits(q, k, scale, mask, is_causal)], dim=2)


@_in_full_precision
def attention_statistics(
    q: Tensor, k: Tensor, *, scale: float, attn_mask: Tensor | None = None, is_causal: bool = False
) -> AttentionStatistics:
    """Entropy, largest logit, the entropy's lower bound and the number of keys of every query.

    Arguments as for `attention_entropy`. No fused kernel returns the largest logit: it always goes in chunks.
    """
    mask = _check(q, k, attn_mask)
    chunks = [row_statistics(logits) for logits in _logits(q.float(), k.float(), scale, mask, is_causal)]
    return AttentionStatistics(*(torch.cat(parts, dim=2) for parts in zip(*chunks, strict=True)))


@_in_full_precision
def row_statistics(logits: Tensor) -> AttentionStatistics:
    """The statistics of softmax(logits) over the last dimension, each of shape logits.shape[:-1]; -inf where masked."""
    largest = logits.amax(-1)
    below = logits - largest.clamp(min=torch.finfo(logits.dtype).min)[..., None]  # -inf - -inf would be NaN
    weights, hidden = below.exp(), below == -math.inf
    below.masked_fill_(hidden, 0.0)
    visible = logits.shape[-1] - hidden.sum(-1)
    total, blind = weights.sum(-1), visible == 0
    mean = torch.linalg.vecdot(weights, below) / total
    entropy = (total.log() - mean).masked_fill(blind, 0.0)
    # Softmax does not see a common shift, so the row's size is that of its deviations from its mean.
    spread = torch.linalg.vecdot(below, below) - below.sum(-1).square() / visible
    bound = entropy_lower_bound(spread.clamp(min=0).sqrt(), visible)
    return AttentionStatistics(entropy, largest, bound.masked_fill(blind, 0.0), visible)


def _check(q: Tensor, k: Tensor, attn_mask: Tensor | None) -> Tensor | None:
    """The mask as fp32 to be added to the logits, in four dimensions; ValueError for shapes that do not fit."""
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}: allowed are (batch, heads, queries, head_dim) and "
            "(batch, key_heads, keys, head_dim), where key_heads divides heads"
        )
    if attn_mask is None:
        return None
    whole = (*q.shape[:3], k.shape[2])
    if attn_mask.ndim > 4 or any(n not in (1, m) for n, m in zip(attn_mask.shape[::-1], whole[::-1], strict=False)):
        raise ValueError(f"attn_mask {tuple(attn_mask.shape)}: it must be broadcastable to {whole}")
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, device=q.device).masked_fill_(~attn_mask, -math.inf)
    return attn_mask.float().reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)


def _only_hides(mask: Tensor) -> bool:
    """Whether a mask adds nothing to the keys that it leaves visible, as the identity needs."""
    return bool(((mask == 0) | (mask <= MASKED)).all())


def _logits(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, is_causal: bool) -> Iterator[Tensor]:
    """s * q k^T + mask for a few queries at a time, fp32, -inf where masked."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    if k.shape[1] != heads:
        k = k.repeat_interleave(heads // k.shape[1], dim=1)
    rows = max(1, CHUNK // (batch * heads * keys))
    for start in range(0, queries, rows):
        some = slice(start, min(start + rows, queries))
        logits = torch.matmul(q[:, :, some] * scale, k.mT)
        if mask is not None:
            part = mask[:, :, some] if mask.shape[2] > 1 else mask
            logits = (logits + part).masked_fill_(part <= MASKED, -math.inf)
        if is_causal:
            hidden = torch.arange(keys, device=q.device) > torch.arange(some.start, some.stop, device=q.device)[:, None]
            logits.masked_fill_(hidden, -math.inf)
        yield logits
