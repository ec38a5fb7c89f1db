"""Reduces the statistics of an attention, and gradients, to the numbers of a record."""

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .calls import Call, is_self_attention

DIGITS = 6  # significant digits of a number in the file


@torch.no_grad()
def by_head(call: Call) -> tuple[str, Tensor]:
    """The kind of an attention ("encoder", "decoder", which is causal, or "cross"), and its numbers, (5, heads).

    The numbers are the mean entropy, least entropy, largest logit, mean lower bound of the entropy, and mean upper bound, which
    is the log of the number of keys; all but the logit in nats. They are taken over batch and queries, without queries that see
    no key, and in self-attention without padding, that is queries at positions that no query may see. The least entropy is
    over queries that see two or more keys, as it is always 0 with one.
    """
    rows, (unseen, causal) = call.statistics(), call.visible()
    kind = "cross" if call.site.is_cross() else "decoder" if causal else "encoder"
    counted = rows.keys > 0
    if unseen is not None and is_self_attention(call):
        counted = counted & ~unseen.expand(-1, -1, counted.shape[2])
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


@torch.no_grad()
def gradient_norms(modules: dict[str, nn.Module], scale: float = 1.0) -> dict[str, Tensor]:
    """By name, (l2, l-inf) norms of the gradients of all parameters of each module that has any, divided by `scale`.

    Norms are computed in fp32, as squares overflow in half precision, and one parameter at a time, to save memory.
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
        if gradients:
            l2, linf = torch.stack([norms[p] for p in gradients]).unbind(1)
            totals[name] = torch.stack([torch.linalg.vector_norm(l2), linf.max()])
    return totals


def _has_empty_shard(x: Tensor) -> TypeGuard[DTensor]:
    """Whether some rank's shard of x is empty: the l-inf norm would raise there, while the other ranks wait."""
    if not isinstance(x, DTensor):
        return False
    rows, ranks = x.shape[0], x.device_mesh.size()
    return -(-rows // -(-rows // ranks)) < ranks  # shards are as torch.chunk makes them


def plain(value: Any) -> Any:
    """`value` for JSON: tensors as lists, floats rounded, those that are not finite as null; also inside lists and dicts."""
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, list):
        return _rounded(value) if {*map(type, value)} == {float} else [plain(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _rounded(values: list[float]) -> list[float | None]:
    """What `plain` makes of each, in one go: most of what a record holds are lists of floats, a number a head."""
    text = f"%.{DIGITS}g " * len(values) % tuple(values)
    return [x if math.isfinite(x) else None for x in map(float, text.split())]
