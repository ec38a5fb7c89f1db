"""Tensors into the few numbers of a record."""

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .calls import AttentionCall, padding

DIGITS = 6  # significant ones, in the file


@torch.no_grad()
def by_head(call: AttentionCall) -> tuple[str, Tensor]:
    """The kind of an attention ("encoder", "decoder", that is causal, or "cross"), and its numbers, (5, heads).

    The numbers: mean entropy, least entropy, largest logit, mean of the entropy's lower bound, and of its upper bound, the
    log of the number of keys. They are over batch and queries, less rows without a key, and in self-attention less the
    queries of padding: of positions that no query may see. The least entropy is over rows with a choice, of two keys or more.
    """
    rows, hidden = call.statistics(), call.hidden()
    queries = call.tokens[0]
    kind = "cross" if call.site.is_cross() else "decoder" if call.is_causal else "encoder"
    counted = rows.keys > 0
    if hidden is not None and (unseen := padding(call, hidden)) is not None:
        counted = counted & ~unseen.expand(-1, -1, queries)
        if _is_causal(hidden[0, 0], queries):
            kind = "decoder"
    total = counted.sum((0, 2))

    def mean(x: Tensor) -> Tensor:
        return x.masked_fill(~counted, 0.0).sum((0, 2)) / total

    return kind, torch.stack([
        mean(rows.entropy),
        rows.entropy.masked_fill(~counted | (rows.keys < 2), math.inf).amin((0, 2)),
        rows.max_logit.masked_fill(~counted, -math.inf).amax((0, 2)),
        mean(rows.bound),
        mean(rows.keys.double().clamp(min=1).log()),
    ])  # fmt: skip


def _is_causal(hidden: Tensor, queries: int) -> bool:
    """Whether a mask (queries or 1, keys) hides every later key, and not all keys."""
    if queries == 1 or hidden.shape[0] == 1:
        return False
    later = torch.ones_like(hidden).triu(1)
    return bool((hidden | ~later).all() and not hidden.all())


@torch.no_grad()
def gradient_norms(modules: dict[str, nn.Module], scale: float = 1.0) -> dict[str, Tensor]:
    """The l2 and l-inf norms of the gradients of all parameters of each module, divided by scale, (2,); NaN without any.

    In fp32, one parameter at a time: squares overflow in half precision, and a copy of all gradients may not fit.
    """
    norms: dict[nn.Parameter, Tensor] = {}
    totals = {}
    for name, module in modules.items():
        gradients = {p: p.grad for p in module.parameters() if p.grad is not None}
        for p, grad in gradients.items():
            if p not in norms:
                grad = grad.full_tensor() if _has_empty_shard(grad) else grad
                kinds = [torch.linalg.vector_norm(grad, kind, dtype=torch.float32) for kind in (2, math.inf)]
                norms[p] = torch.stack([x.full_tensor() if isinstance(x, DTensor) else x for x in kinds]) / scale
        own = [norms[p] for p in gradients]
        l2, linf = torch.stack(own).unbind(1) if own else (torch.full((1,), math.nan),) * 2
        totals[name] = torch.stack([torch.linalg.vector_norm(l2), linf.max()])
    return totals


def _has_empty_shard(x: Tensor) -> TypeGuard[DTensor]:
    """Whether some rank holds nothing of x: its l-inf norm raises there, and the other ranks would wait for it."""
    if not isinstance(x, DTensor):
        return False
    rows, ranks = x.shape[0], x.device_mesh.size()
    return -(-rows // -(-rows // ranks)) < ranks  # in parts as torch.chunk makes them


def plain(value: Any) -> Any:
    """What JSON can hold: tensors, in lists and dicts too, as rounded numbers, and null for those that are not finite."""
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, list):
        return [plain(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
