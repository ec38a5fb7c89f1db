"""Statistics of the rows of attention by one Triton kernel, which never stores the attention matrix; imports triton.

For a query with logits x_j = s q . k_j + mask_j over the n keys that it sees, and m = max_j x_j, they are its entropy in nats
[σ, Section 3.1], m, the spread of its logits and n:

    Ent = log l - t / l,    l = sum_j exp(x_j - m),    t = sum_j exp(x_j - m) (x_j - m),    spread = sum_j (x_j - mean x)^2

Keys are read in blocks, as in FlashAttention: where the maximum so far grows from m to m', with a = exp(m - m'),

    t <- a (t + l (m - m')),    l <- a l,

and the spreads of the keys so far and of a block are joined by Chan's formula, of their means and numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import on_device

INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUERIES = KEYS = 64  # of a tile, whose queries and keys must fit into shared memory, twice for the keys
LONGEST = 512  # bytes of a query for which they do


@triton.jit
def _statistics(
    q, k, mask, entropy, largest, spread, seen, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, mask_b, mask_h, mask_q, mask_k,
    heads, shared, n_queries, n_keys, scale, MASK: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    D_UP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_queries, QUERIES)  # one axis of programs, as CUDA's others end at 65,535
    block, head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // heads, head % heads
    rows, d = block * QUERIES + tl.arange(0, QUERIES), tl.arange(0, D_UP)
    q += b * q_b + h * q_h
    k += b * k_b + h // shared * k_h
    mask += b * mask_b + h * mask_h
    here = (rows[:, None] < n_queries) & (d[None, :] < D)
    some_q = tl.load(q + rows[:, None].to(tl.int64) * q_t + d[None, :] * q_d, mask=here, other=0.0)
    if UP:  # the interpreter would read the bits of a bf16 as an integer
        some_q = some_q.to(tl.float32)
    m = tl.full((QUERIES,), -1e38, tl.float32)
    l = tl.zeros((QUERIES,), tl.float32)
    t = tl.zeros((QUERIES,), tl.float32)
    n = tl.zeros((QUERIES,), tl.float32)
    mean = tl.zeros((QUERIES,), tl.float32)  # less m
    squares = tl.zeros((QUERIES,), tl.float32)
    end = n_keys
    if CAUSAL:
        end = tl.minimum(n_keys, (block + 1) * QUERIES)
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
        if MASK != "none":
            at = mask + rows[:, None].to(tl.int64) * mask_q + columns[None, :].to(tl.int64) * mask_k
            told = tl.load(at, mask=(rows[:, None] < n_queries) & (columns[None, :] < n_keys), other=0)
            if MASK == "hides":
                visible = visible & (told != 0)
            else:
                visible = visible & ~(told <= MASKED)
                x += told
        new = tl.maximum(m, tl.max(tl.where(visible, x, -1e38), 1))
        below = x - new[:, None]
        visible = visible & ~(below <= MASKED)
        below = tl.where(visible, below, 0.0)
        p = tl.where(visible, tl.exp(below), 0.0)
        gone = m - new <= MASKED  # as hidden now as what is so far below in this block
        n = tl.where(gone, 0.0, n)
        squares = tl.where(gone, 0.0, squares)
        drop = tl.where(gone, 0.0, m - new)
        shrink = tl.exp(m - new)
        t = shrink * (t + l * drop) + tl.sum(p * below, 1)
        l = shrink * l + tl.sum(p, 1)
        m = new
        more = tl.sum(visible.to(tl.float32), 1)
        mean_there = tl.sum(below, 1) / tl.maximum(more, 1.0)
        off = tl.where(visible, below - mean_there[:, None], 0.0)
        apart = mean_there - (mean + drop)
        share = more / tl.maximum(n + more, 1.0)
        squares += tl.sum(off * off, 1) + apart * apart * n * share
        mean += drop + apart * share
        n += more
    blind = n == 0
    l = tl.where(blind, 1.0, l)
    result = tl.log(l) - t / l
    to = head * n_queries + rows
    kept = rows < n_queries
    tl.store(entropy + to, tl.where(result < 0, 0.0, result), mask=kept)
    # tl.max skips NaN, which must not be hidden: l is NaN then, and is written in place of m
    tl.store(largest + to, tl.where(blind, -float("inf"), tl.where((l != l) & (m < float("inf")), l, m)), mask=kept)
    tl.store(spread + to, squares, mask=kept)
    tl.store(seen + to, n, mask=kept)


def takes(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel takes q and k (..., head_dim), by their dtypes and sizes."""
    return q.dtype == k.dtype and q.dtype in DTYPES and _up(q) * q.element_size() <= LONGEST


def _up(q: Tensor) -> int:
    return max(16, triton.next_power_of_2(q.shape[-1]))


@torch.no_grad()
def row_statistics(
    q: Tensor, k: Tensor, *, scale: float, masked: float, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Entropy in nats, largest logit, spread and number of keys of each query: (4, batch, heads, queries), fp32, no gradient.

    A query that sees no key has entropy 0 and the largest logit -inf.

    Args:
        q: (batch, heads, queries, head_dim), of any strides.
        k: (batch, key_heads, keys, head_dim); key_heads divides heads. `takes(q, k)` must hold.
        scale: s.
        masked: what a mask adds to hide a key, or less. A logit as far below the largest is hidden, too; where two blocks of
            keys differ by that much, this holds of the whole block.
        mask: (batch, heads, queries, keys), each of them or 1: boolean, True where a query sees a key, or what is added.
        is_causal: query i sees keys 0..i only.
    """
    batch, heads, n_queries, size = q.shape
    found = torch.empty(4, batch, heads, n_queries, dtype=torch.float32, device=q.device)
    kind = "none" if mask is None else "hides" if mask.dtype == torch.bool else "adds"
    if mask is None:
        mask = found  # any tensor, which is not read
    else:
        mask = (mask.view(torch.uint8) if kind == "hides" else mask.float()).expand(batch, heads, n_queries, k.shape[2])
    if not found.numel():  # CUDA has no launch of no programs
        return found
    with on_device(q.device):
        _statistics[(triton.cdiv(n_queries, QUERIES) * batch * heads,)](
            q, k, mask, *found, *q.stride(), *k.stride(), *mask.stride(), heads, heads // k.shape[1], n_queries, k.shape[2],
            scale, MASK=kind, MASKED=masked, CAUSAL=is_causal, D=size, D_UP=_up(q), QUERIES=QUERIES, KEYS=KEYS,
            UP=INTERPRETED and q.dtype == torch.bfloat16, num_stages=2,
        )  # fmt: skip
    return found
