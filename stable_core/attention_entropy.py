"""Attention entropy without storing the attention matrix.

Source: Zhai et al. [σ, Section 3.1]: Ent(A_i) = -sum_j A_ij log A_ij, where A = softmax(a) and a = s * Q K^T, in nats.
Since log A_ij = a_ij - lse_i, with lse_i the logsumexp of row i,

    Ent(A_i) = lse_i - s * q_i . (A K)_i,

and A K is one call of a fused attention kernel with V = K. Memory grows with T, not with T^2.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .kernels import why_not
from .theory import entropy_lower_bound
from .watching import is_transformed

# A value of an additive mask at or below this hides the key: models write -inf, finfo.min or -10000.
MASKED = -1e4
# Number of logits formed at a time. On a CPU they take 4 MiB, which fits the cache and is as fast as the fused kernel;
# elsewhere 256 MiB.
CHUNK_ON_CPU, CHUNK = 1 << 20, 1 << 26
# The equation above subtracts numbers as large as the logits: above this size its fp32 rounding is near 1e-3 nats.
LARGEST_LOGIT = 500.0

Index = tuple[slice, slice, slice]
# rule(logits, batch, head, query, key) -> logits: what is done to logits of any part of the attention before softmax (a mask, a
# soft cap, ALiBi), -inf where a key is hidden. The last four are index tensors that broadcast to (batch, heads, queries, keys).
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Given = ParamSpec("Given")
Found = TypeVar("Found")

_fused_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # (output, logsumexp)


class AttentionStatistics(NamedTuple):
    """Statistics of each row of the attention matrix, each of shape (batch, heads, queries).

    A row whose keys are all masked has keys 0, entropy 0, max_logit -inf and bound 0.
    """

    entropy: Tensor  # nats
    max_logit: Tensor  # the largest logit of a key that is not masked
    bound: Tensor  # the least entropy that logits of this row's size allow, nats [σ, Theorem 3.1]
    keys: Tensor  # number of keys neither masked nor with a logit 10,000 or more below the largest


def _in_full_precision(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """A decorator: the function runs without gradients, and without autocast, which would lower its precision."""

    @functools.wraps(function)
    def wrapped(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        tensor = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


@_in_full_precision
def attention_entropy(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    kernels: str = "auto",
) -> Tensor:
    """Ent(A_i) of every query in nats, shape (batch, heads, queries), fp32, without gradient.

    On a CPU it is one fused attention call, and on a GPU a Triton kernel. Where neither can be, and on a CPU with a finite
    additive mask (ALiBi, relative positions) or with logits so large that the equation above would lose digits, logits are
    formed for a chunk of queries at a time.

    Args:
        q: (batch, heads, queries, head_dim), any floating dtype; the arithmetic is in fp32.
        k: (batch, key_heads, keys, head_dim); key_heads divides heads (grouped-query attention).
        scale: factor s of q.k; the default of `F.scaled_dot_product_attention` is 1/sqrt(head_dim).
        attn_mask: as for `F.scaled_dot_product_attention`, broadcastable to (batch, heads, queries, keys): boolean, True
            where a query sees a key, or floating, added to the logits. A query that sees no key has entropy 0.
        is_causal: query i sees keys 0..i, in addition to attn_mask.
        kernels: "auto" runs the Triton kernel on GPUs of CUDA from compute capability 8.0, where it is faster; "torch" never
            does; "triton" raises ValueError where it cannot run.

    Raises:
        ValueError: shapes that do not fit, or a value of `kernels` that is not allowed.
    """
    _check(q, k, attn_mask)
    if _takes_kernel(q, k, kernels):
        return _in_kernel(q, k, scale, attn_mask, is_causal)[0]
    mask = _added(attn_mask, q.device)
    q, k = q.float(), k.float()
    largest = abs(scale) * q.norm(dim=-1).max() * k.norm(dim=-1).max()
    if q.device.type == "cpu" and largest <= LARGEST_LOGIT and (mask is None or _only_hides(mask)):
        if mask is not None:  # the kernel wants four dimensions and -inf
            mask = torch.zeros_like(mask).masked_fill(mask <= MASKED, -math.inf)
            mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        mean_key, lse = _fused_cpu(q, k, k, 0.0, is_causal, attn_mask=mask, scale=scale)
        return (lse - scale * torch.linalg.vecdot(q, mean_key)).clamp_(min=0)
    return _in_chunks(_logits(q, k, scale, mask, is_causal), q.shape[:3], q.device).entropy


@_in_full_precision
def attention_statistics(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    rule: Rule | None = None,
    kernels: str = "auto",
) -> AttentionStatistics:
    """Entropy, largest logit, the entropy's lower bound and the number of keys of every query.

    Arguments and errors as for `attention_entropy`; `rule` changes the logits after them. With a rule, and where the Triton
    kernel does not run, logits are formed in chunks, as no fused kernel of torch returns the largest.
    """
    _check(q, k, attn_mask)
    if _takes_kernel(q, k, kernels, rule):
        entropy, largest, spread, keys = _in_kernel(q, k, scale, attn_mask, is_causal)
        bound = entropy_lower_bound(spread.sqrt(), keys).masked_fill(keys == 0, 0.0)
        return AttentionStatistics(entropy, largest, bound, keys)
    mask = _added(attn_mask, q.device)
    return _in_chunks(_logits(q.float(), k.float(), scale, mask, is_causal, rule), q.shape[:3], q.device)


@_in_full_precision
def largest_logits(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    rule: Rule | None = None,
    above: float = -math.inf,
) -> Tensor:
    """max_j a_ij of every query, (batch, heads, queries), exact; -inf for a query that sees no key.

    Heads in which no logit can exceed `above`, because s |q| |k| does not, are skipped: all their entries are -inf. Logits of
    the other heads are formed in chunks. (The logsumexp of torch's fused CPU kernel would be a closer bound, at most log(keys)
    above the maximum, but takes 0.4 to 0.9 of the time of the exact maximum; |q| and |k| take 0.01 to 0.05 of it:
    benchmarks/results/qk_clip-cpu-2026-11-26.txt.)

    Of a `rule` it is only used which keys it hides: the values are those before it. Other arguments and errors as for
    `attention_entropy`.
    """
    _check(q, k, attn_mask)
    mask = _added(attn_mask, q.device)
    lengths = [torch.linalg.vector_norm(x.float(), dim=-1).amax((0, 2)) for x in (q, k)]
    group = q.shape[1] // k.shape[1]
    bound = abs(scale) * lengths[0] * lengths[1].repeat_interleave(group)
    if mask is not None:
        bound = bound + mask.amax().clamp(min=0)
    largest = torch.full(q.shape[:3], -math.inf, device=q.device)
    heads = (~(bound <= above)).nonzero().flatten()  # written so that heads with NaN are not skipped
    if rule is not None and len(heads):  # which counts the heads
        heads = torch.arange(q.shape[1], device=q.device)
    if len(heads):
        some = q[:, heads].float(), k[:, heads // group].float()
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, heads]
        found = torch.empty(q.shape[0], len(heads), q.shape[2], device=q.device)
        for index, logits in _logits(*some, scale, mask, is_causal, rule and _only_hiding(rule)):
            found[index] = logits.amax(-1)
        largest[:, heads] = found
    return largest


@_in_full_precision
def logit_statistics(logits: Tensor) -> AttentionStatistics:
    """The statistics of attention from its logits (batch, heads, queries, keys), where those of masked keys are -inf."""
    chunks = ((index, logits[index].float()) for index in _chunks(logits.shape, logits.device))
    return _in_chunks(chunks, logits.shape[:3], logits.device)


def _in_chunks(chunks: Iterator[tuple[Index, Tensor]], shape: torch.Size, device: torch.device) -> AttentionStatistics:
    # Results go into one tensor allocated first: small ones allocated between freed chunks would fragment the heap.
    whole = AttentionStatistics(*torch.empty(4, *shape, device=device))
    for index, logits in chunks:
        for to, part in zip(whole, _row_statistics(logits), strict=True):
            to[index] = part
    return whole


def _row_statistics(logits: Tensor) -> AttentionStatistics:
    """The statistics of softmax(logits) over the last dimension."""
    largest = logits.amax(-1)
    below = logits - largest.clamp(min=torch.finfo(logits.dtype).min)[..., None]  # -inf - -inf would be NaN
    weights, hidden = below.exp(), below <= MASKED
    below.masked_fill_(hidden, 0.0)
    visible = logits.shape[-1] - hidden.sum(-1)
    total, blind = weights.sum(-1), visible == 0
    mean = torch.linalg.vecdot(weights, below) / total
    entropy = (total.log() - mean).masked_fill(blind, 0.0)
    # A constant added to all logits does not change softmax, so the bound uses the norm of the row less its mean.
    spread = torch.linalg.vecdot(below, below) - below.sum(-1).square() / visible
    bound = entropy_lower_bound(spread.clamp(min=0).sqrt(), visible).masked_fill(blind, 0.0)
    return AttentionStatistics(entropy, largest, bound, visible)


def _check(q: Tensor, k: Tensor, attn_mask: Tensor | None) -> None:
    """Raises ValueError for shapes that do not fit."""
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}: allowed are (batch, heads, queries, head_dim) and "
            "(batch, key_heads, keys, head_dim), where key_heads divides heads"
        )
    if attn_mask is None:
        return
    whole = (*q.shape[:3], k.shape[2])
    if attn_mask.ndim > 4 or any(n not in (1, m) for n, m in zip(attn_mask.shape[::-1], whole[::-1], strict=False)):
        raise ValueError(f"attn_mask {tuple(attn_mask.shape)}: it must be broadcastable to {whole}")


def _added(mask: Tensor | None, device: torch.device) -> Tensor | None:
    """The mask as fp32 to be added to the logits, in four dimensions."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=device).masked_fill_(~mask, -math.inf)
    return _in_four_dimensions(mask.float())


def _in_four_dimensions(mask: Tensor) -> Tensor:
    return mask.reshape((1,) * (4 - mask.ndim) + mask.shape)


def _takes_kernel(q: Tensor, k: Tensor, kernels: str, rule: Rule | None = None) -> bool:
    """Whether the Triton kernel finds the statistics. Raises ValueError where it must and cannot."""
    if kernels not in ("auto", "torch", "triton"):
        raise ValueError(f"kernels = {kernels!r}: allowed are 'auto', 'torch', 'triton'")
    if kernels == "torch" or not (q.is_cuda or kernels == "triton"):
        return False
    why = why_not(q.device, torch.float32)
    if not why and rule is not None:
        why = "with a rule logits are formed"
    if not why and not (_is_plain(q) and _is_plain(k) and _kernel().takes(q, k)):
        why = f"q {tuple(q.shape)} in {q.dtype}, k in {k.dtype}"
    if why and kernels == "triton":
        raise ValueError(f"kernels = 'triton': {why}; set it to 'auto'")
    return not why


def _is_plain(x: Tensor) -> bool:
    """Whether x has memory that a kernel can read: no subclass, and under no compiler, tracer or transformation."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return type(x) in (Tensor, nn.Parameter) and not (tracing or is_transformed())


@functools.cache
def _kernel() -> ModuleType:
    # By import_module, as in kernels.py, so that a saved model does not ask for Triton.
    return import_module(".kernels_attention", __package__)


def _in_kernel(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Entropy, largest logit, spread of the logits and number of keys of each row."""
    if mask is not None:
        mask = _in_four_dimensions(mask)
    return _kernel().row_statistics(q, k, scale=scale, masked=MASKED, mask=mask, is_causal=is_causal)


def _only_hides(mask: Tensor) -> bool:
    """Whether a mask adds 0 to the logits of all keys that it does not hide, as the equation above needs."""
    return bool(((mask == 0) | (mask <= MASKED)).all())


def _chunks(shape: Sequence[int], device: torch.device) -> Iterator[Index]:
    """Slices of (batch, heads, queries) whose logits fit into a chunk: several whole heads where possible."""
    batch, heads, queries, keys = shape
    chunk = CHUNK_ON_CPU if device.type == "cpu" else CHUNK
    rows = max(1, min(queries, chunk // max(1, keys)))
    some_heads = max(1, min(heads, chunk // max(1, rows * keys)))
    some = max(1, min(batch, chunk // max(1, some_heads * rows * keys)))
    for b in range(0, batch, some):
        for h in range(0, heads, some_heads):
            for r in range(0, queries, rows):
                yield (
                    slice(b, min(b + some, batch)),
                    slice(h, min(h + some_heads, heads)),
                    slice(r, min(r + rows, queries)),
                )


@torch.no_grad()
def what_a_rule_hides(rule: Rule, batch: int, queries: int, keys: int, device: torch.device) -> tuple[Tensor, bool]:
    """What a rule hides in its first head: (batch, keys), True for keys that no query sees; and whether no query sees a later
    key than itself."""
    unseen, causal = torch.ones(batch, keys, dtype=torch.bool, device=device), True
    for index in _chunks((batch, 1, queries, keys), device):
        where = _positions(index, keys, device)
        zeros = torch.zeros(*(some.stop - some.start for some in index), keys, device=device)
        visible = rule(zeros, *where)[:, 0] > MASKED
        unseen[index[0]] &= ~visible.any(1)
        causal = causal and not (visible & (where[3] > where[2])).any()
    return unseen, causal


def _only_hiding(rule: Rule) -> Rule:
    """A rule that hides the keys that `rule` hides, and leaves the other logits as they are."""
    return lambda logits, *where: logits.masked_fill(rule(logits, *where) <= MASKED, -math.inf)


def _positions(index: Index, keys: int, device: torch.device) -> list[Tensor]:
    """Numbers of batch, head, query and key of a chunk, each of four dimensions but the last."""
    numbers = [torch.arange(some.start, some.stop, device=device) for some in index]
    return [x.view(-1, *[1] * (3 - i)) for i, x in enumerate([*numbers, torch.arange(keys, device=device)])]


def _logits(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None, is_causal: bool, rule: Rule | None = None
) -> Iterator[tuple[Index, Tensor]]:
    """s * q k^T + mask for a part of the queries at a time, fp32, -inf where masked."""
    keys = k.shape[2]
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    for index in _chunks((*q.shape[:3], keys), q.device):
        logits = torch.matmul(q[index] * scale, k[index[:2]].mT)
        if mask is not None:
            part = mask[tuple(some if n > 1 else slice(None) for some, n in zip(index, mask.shape[:3], strict=True))]
            logits = (logits + part).masked_fill_(part <= MASKED, -math.inf)
        if is_causal:
            rows = torch.arange(index[2].start, index[2].stop, device=q.device)
            logits.masked_fill_(torch.arange(keys, device=q.device) > rows[:, None], -math.inf)
        if rule is not None:
            logits = rule(logits, *_positions(index, keys, q.device))
        yield index, logits
