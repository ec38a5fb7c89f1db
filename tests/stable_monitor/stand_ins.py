"""Kernels that need a GPU, with their names and parameters and computed on the CPU, in which no softmax can be seen."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


def dense(q, k, scale=None, visible=None, bias=0.0, cap=None, tau=1.0) -> tuple[Tensor, Tensor]:
    """(logits, probabilities) in float64 of q (batch, heads, queries, dim), k (batch, key heads, keys, dim)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = (cap * torch.tanh(logits / cap) if cap else logits) + bias
    if visible is not None:
        logits = torch.where(visible, logits, -math.inf)
    logits = logits / tau
    return logits, (logits - logits.logsumexp(-1, keepdim=True)).exp()


def numbers(*parts: tuple[Tensor, Tensor]) -> dict[str, list[float]]:
    """What a record must say of attention (logits, probabilities), by head; parts are sequences of their own lengths."""
    entropies = [torch.special.entr(probabilities).sum(-1).transpose(0, 1).flatten(1) for _, probabilities in parts]
    largest = torch.stack([logits.amax((0, 2, 3)) for logits, _ in parts])
    return {"entropy": torch.cat(entropies, 1).mean(1).tolist(), "max_logit": largest.amax(0).tolist()}


def band(queries: int, keys: int, causal: bool, sides=(-1, -1)) -> Tensor:
    """What flash-attn lets through, (queries, keys), said row by row: the last query sees up to the last key."""
    rows = torch.zeros(queries, keys, dtype=torch.bool)
    for i in range(queries):
        here = i + keys - queries
        first = 0 if sides[0] < 0 else max(0, here - sides[0])
        last = here if causal else keys - 1 if sides[1] < 0 else here + sides[1]
        rows[i, first : last + 1] = True
    return rows


def distances(queries: int, keys: int) -> Tensor:
    return torch.tensor([[float(abs(i + keys - queries - j)) for j in range(keys)] for i in range(queries)])


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, qv=None,
):  # fmt: skip
    return _flash(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes)


def _flash(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    size = q.shape[2], k.shape[2]
    bias = 0.0 if alibi_slopes is None else -alibi_slopes.view(-1, 1, 1) * distances(*size)
    _, probabilities = dense(q, k, softmax_scale, band(*size, causal, window_size), bias, softcap)
    return (probabilities.to(v) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)).transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    lengths = [starts.diff().tolist() for starts in (cu_seqlens_q, cu_seqlens_k)]
    parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    outputs = [
        _flash(*(x[None] for x in part), softmax_scale, causal, window_size, softcap, alibi_slopes)[0] for part in parts
    ]
    return torch.cat(outputs)


def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False):
    return _flash(*qkv.unbind(2), softmax_scale, causal)


class LowerTriangularMask:
    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        return torch.full(shape, -math.inf, dtype=dtype, device=device).triu(1)


@dataclass
class SequenceInfo:
    seqstart_py: list[int]


class BlockDiagonalCausalMask:
    def __init__(self, starts: list[int]) -> None:
        self.q_seqinfo = self.k_seqinfo = SequenceInfo(starts)

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        whole = torch.full(shape, -math.inf, dtype=dtype, device=device)
        starts = self.q_seqinfo.seqstart_py
        for start, end in pairwise(starts):
            whole[..., start:end, start:end] = LowerTriangularMask().materialize((end - start, end - start), dtype)
        return whole


class ToTheRight(LowerTriangularMask):
    """A kind of mask with values, of which the monitor does not know the name."""

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        return 0.3 * torch.arange(shape[-1], dtype=dtype, device=device).expand(shape)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    whole = query.shape
    if query.ndim == 5:
        query, key, value = (x.flatten(2, 3) for x in (query, key.expand(whole), value.expand(whole)))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if hasattr(attn_bias, "materialize"):
        attn_bias = attn_bias.materialize((*q.shape[:3], k.shape[2]))
    _, probabilities = dense(q, k, scale, bias=0.0 if attn_bias is None else attn_bias)
    return (probabilities.to(v) @ v).transpose(1, 2).reshape(whole)
