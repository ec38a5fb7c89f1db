"""The papers' algorithms written out slowly: what the fast code in the library is tested equal to."""

import math

import torch
from torch import Tensor, nn


class Algorithm1:
    """σReparam of one weight, line by line from Algorithm 1 [σ, App. C]; autograd does the backward pass.

    W (d, c); gamma (1,); u (d,); v (c,). `step` is the part under `if training`, which the paper runs once per update.
    Without v it starts at v = W^T u of the W at hand, as the library does, which keeps u alone.
    """

    def __init__(self, W: Tensor, gamma: Tensor, u: Tensor, v: Tensor | None = None) -> None:
        self.W, self.gamma, self.u = W, gamma, u
        self.keeps_v = v is not None
        self.v = v if self.keeps_v else self._image()

    def _image(self) -> Tensor:
        with torch.no_grad():
            v = self.W.T.mv(self.u)
            return v / v.norm(dim=0)

    def step(self) -> None:
        with torch.no_grad():
            u = self.W.mv(self.v if self.keeps_v else self._image())
            self.u = u / u.norm(dim=0)
            v = self.W.T.mv(self.u)
            self.v = v / v.norm(dim=0)

    def sigma(self) -> Tensor:
        return torch.einsum("d,dc,c->", self.u, self.W, self.v)

    def W_hat(self) -> Tensor:
        return self.gamma / self.sigma() * self.W


def numerical_gradient(f, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Central differences of the scalar f() with respect to every entry of x, which f reads; use float64."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        entry = x.data.view(-1)[i : i + 1]
        value = entry.clone()
        entry.copy_(value + eps)
        above = f()
        entry.copy_(value - eps)
        below = f()
        entry.copy_(value)
        gradient.view(-1)[i] = (above - below) / (2 * eps)
    return gradient


def attention_logits(q, k, *, scale, attn_mask=None, is_causal=False) -> Tensor:
    """s q k^T + mask, the whole matrix in float64, -inf where masked. Heads share keys in groups."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = scale * torch.einsum("bhid,bhjd->bhij", q.double(), k.double())
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask.double()
    if is_causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return logits


def attention_probabilities(q, k, **settings) -> Tensor:
    """softmax(attention_logits), where rows without a key are zero."""
    return attention_logits(q, k, **settings).softmax(-1).nan_to_num(0.0)


def qk_clip(q, k, S, threshold, alpha) -> tuple[Tensor, Tensor]:
    """q (batch, heads, m, d) and k (batch, key_heads, n, d) as they are after QK-clip, head by head.

    S: the largest logit of each head. Keys that several heads share shrink as the worst of these asks, and a query by what is
    then missing.
    """
    q, k, each = q.clone(), k.clone(), q.shape[1] // k.shape[1]
    for g in range(k.shape[1]):
        heads = range(g * each, (g + 1) * each)
        worst = max(float(S[h]) for h in heads)
        if worst > threshold:
            k[:, g] *= (threshold / worst) ** (1 - alpha)
            for h in heads:
                by_key = (threshold / worst) ** (1 - alpha)
                if S[h] * by_key > threshold:
                    q[:, h] *= threshold / (float(S[h]) * by_key)
    return q, k


def entropy(probabilities: Tensor) -> Tensor:
    """-sum_j p_j log p_j over the last dimension, in nats."""
    return torch.special.entr(probabilities).sum(-1)


def entropy_bound(logits: Tensor) -> float:
    """Theorem 3.1 [σ, eq. 1] for one row of logits, whose norm is that about its mean, as softmax does not see the mean."""
    u = [x for x in logits.double().tolist() if x > -math.inf]
    T = len(u)
    if T < 2:
        return 0.0
    sigma = math.sqrt(sum((x - sum(u) / T) ** 2 for x in u))
    beta = math.exp(-sigma * math.sqrt(T / (T - 1)))
    return math.log(1 + (T - 1) * beta) + sigma * math.sqrt(T * (T - 1)) * beta / (1 + (T - 1) * beta)


class ListedStableAttention(nn.Module):
    """The listing of the Stable-Transformer paper [ST, App. G], on given weights: its norm adds eps outside the root."""

    def __init__(self, qkv, proj, gamma_q, gamma_k, num_heads: int, sequence_length: int, alpha: float) -> None:
        super().__init__()
        self.qkv, self.proj, self.gamma_q, self.gamma_k, self.alpha = qkv, proj, gamma_q, gamma_k, alpha
        self.num_heads, self.head_dim = num_heads, gamma_q.numel()
        self.scale = self.head_dim ** (-2 * alpha) * 1.618 * math.log(sequence_length, 2)

    def norm(self, x: Tensor, gamma: Tensor) -> Tensor:
        return gamma * math.pow(self.head_dim, self.alpha) * x / (torch.norm(x, dim=-1, keepdim=True) + 1e-8)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.norm(q, self.gamma_q) * self.scale, self.norm(k, self.gamma_k)
        x = (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))
