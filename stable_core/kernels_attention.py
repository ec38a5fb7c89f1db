"""Entropy and largest logit of attention by one Triton kernel, which never stores the attention matrix; imports triton.

For a query with logits x_j = s q . k_j over the keys that it sees, and m = max_j x_j, the entropy in nats is [σ, Section 3.1]

    Ent = log l - t / l,    l = sum_j exp(x_j - m),    t = sum_j exp(x_j - m) (x_j - m)

Keys are read in blocks, as in FlashAttention: where the maximum so far grows from m to m', with a = exp(m - m'),

    t <- a (t + l (m - m')),    l <- a l.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import on_device

INTERPRETED = triton.knobs.runtime.interpret
QUERIES = 64  # queries per program


@triton.jit
def _statistics(
    q, k, entropy, largest, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, heads, shared, n_queries, n_keys, scale,
    D: tl.constexpr, D_UP: tl.constexpr, CAUSAL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    rows, d = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, D_UP)
    q += b * q_b + h * q_h
    k += b * k_b + h // shared * k_h
    here = (rows[:, None] < n_queries) & (d[None, :] < D)
    some_q = tl.load(q + rows[:, None].to(tl.int64) * q_t + d[None, :] * q_d, mask=here, other=0.0)
    if UP:  # the interpreter would read the bits of a bf16 as an integer
        some_q = some_q.to(tl.float32)
    m = tl.full((QUERIES,), -1e38, tl.float32)
    l = tl.zeros((QUERIES,), tl.float32)
    t = tl.zeros((QUERIES,), tl.float32)
    end = n_keys
    if CAUSAL:
        end = tl.minimum(n_keys, (tl.program_id(0) + 1) * QUERIES)
    for start in range(0, end, KEYS):
        columns = start + tl.arange(0, KEYS)
        inside = (d[:, None] < D) & (columns[None, :] < n_keys)
        some_k = tl.load(k + columns[None, :].to(tl.int64) * k_t + d[:, None] * k_d, mask=inside, other=0.0)
        if UP:
            some_k = some_k.to(tl.float32)
        x = scale * tl.dot(some_q, some_k, input_precision="tf32x3")
        visible = columns[None, :] < n_keys
        if CAUSAL:
            visible = visible & (columns[None, :] <= rows[:, None])
        new = tl.maximum(m, tl.max(tl.where(visible, x, -1e38), 1))
        below = tl.where(visible, x - new[:, None], 0.0)
        p = tl.where(visible, tl.exp(below), 0.0)
        shrink = tl.exp(m - new)
        t = shrink * (t + l * (m - new)) + tl.sum(p * below, 1)
        l = shrink * l + tl.sum(p, 1)
        m = new
    result = tl.log(l) - t / l
    to = head * n_queries + rows
    tl.store(entropy + to, tl.where(result < 0, 0.0, result), mask=rows < n_queries)
    # tl.max skips NaN, which must not be hidden: l is NaN then, and is written in place of m
    tl.store(largest + to, tl.where((l != l) & (m < float("inf")), l, m), mask=rows < n_queries)


@torch.no_grad()
def entropy_and_largest_logit(q: Tensor, k: Tensor, *, scale: float, is_causal: bool = False) -> tuple[Tensor, Tensor]:
    """(entropy in nats, largest logit) of each query, both (batch, heads, queries) in fp32, without gradient.

    Args:
        q: (batch, heads, queries, head_dim), of any strides.
        k: (batch, key_heads, keys, head_dim), in q's dtype; key_heads divides heads.
        scale: s.
        is_causal: query i sees keys 0..i only.

    Raises:
        ValueError: shapes that do not fit; q and k of different dtypes.
    """
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}: allowed are (batch, heads, queries, head_dim) and "
            "(batch, key_heads, keys, head_dim), where key_heads divides heads"
        )
    if q.dtype != k.dtype:
        raise ValueError(f"q in {q.dtype}, k in {k.dtype}: allowed is one type")
    batch, heads, n_queries, size = q.shape
    entropy, largest = torch.empty(2, batch, heads, n_queries, dtype=torch.float32, device=q.device)
    size_up = max(16, triton.next_power_of_2(size))
    with on_device(q.device):
        _statistics[(triton.cdiv(n_queries, QUERIES), batch * heads)](
            q, k, entropy, largest, *q.stride(), *k.stride(), heads, heads // k.shape[1], n_queries, k.shape[2], scale,
            D=size, D_UP=size_up, CAUSAL=is_causal, QUERIES=QUERIES, KEYS=64 if size_up * q.element_size() <= 512 else 32,
            UP=INTERPRETED and q.dtype == torch.bfloat16, num_stages=2,
        )  # fmt: skip
    return entropy, largest
