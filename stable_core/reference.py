"""Every equation of the papers as a short, slow and plain function.

Nothing else in the library uses this file. The fast code computes the same, and the tests compare it with these functions.

[σ] is Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (ICML 2023); [ST] is
"Stable-Transformer: Towards a Stable Transformer Training" (ICLR 2025 submission).
Letters: W (out, in) is a weight; q, k and v are (batch, heads, tokens, d1), with d1 the size of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------- weights [σ]


def spectral_norm(W: Tensor) -> Tensor:
    """sigma(W), the largest singular value."""
    return torch.linalg.svdvals(W)[0]


def effective_weight(W: Tensor, gamma: Tensor | float) -> Tensor:
    """σReparam: W_hat = gamma / sigma(W) * W [σ, Section 3.2, eq. 2]. With gamma = 1 it is spectral normalisation."""
    return gamma / spectral_norm(W) * W


def weight_norm(W: Tensor, g: Tensor) -> Tensor:
    """g_i * W_i / |W_i|_2 for each row i, with g (out,) learned: the weight norm that [σ, Table 1] compares with."""
    return torch.stack([g_i * row / row.norm() for g_i, row in zip(g, W, strict=True)])


def power_iteration(W: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """`steps` times, at least once, u = W v / |W v| and then v = W^T u / |W^T u| [σ, Algorithm 1].

    Returns u (out,) and v (in,), which approach the singular vectors of the largest singular value sigma = u^T W v.
    """
    with torch.no_grad():
        for _ in range(steps):
            u = W.mv(v)
            u = u / u.norm(dim=0)
            v = W.T.mv(u)
            v = v / v.norm(dim=0)
    return u, v


class Algorithm1:
    """σReparam of one weight as [σ, Appendix C, Algorithm 1] prints it; the backward pass is autograd's.

    Training calls `step` once for each update of the weights, and multiplies by `W_hat()` in the forward pass:

        layer = Algorithm1(W, gamma, u, v)
        for batch in batches:
            loss_of(batch, layer.W_hat()).backward()
            optimizer.step()  # it changes W and gamma
            layer.step()

    Args:
        W: (d, c).
        gamma: (1,).
        u: (d,), of length 1.
        v: (c,), of length 1. Left out, each step starts from v = W^T u / |W^T u| of the present W, as in the library, which
            stores u only.
    """

    def __init__(self, W: Tensor, gamma: Tensor, u: Tensor, v: Tensor | None = None) -> None:
        self.W, self.gamma, self.u = W, gamma, u
        self.keeps_v = v is not None
        self.v = self._image() if v is None else v

    def _image(self) -> Tensor:
        with torch.no_grad():
            v = self.W.T.mv(self.u)
            return v / v.norm(dim=0)

    def step(self) -> None:
        """The lines under `if training` of Algorithm 1: one power iteration, which sets u and v."""
        self.u, self.v = power_iteration(self.W, self.v if self.keeps_v else self._image(), 1)

    def sigma(self) -> Tensor:
        """u^T W v, in which u and v are constants to autograd."""
        return torch.einsum("d,dc,c->", self.u, self.W, self.v)

    def W_hat(self) -> Tensor:
        """gamma / sigma * W."""
        return self.gamma / self.sigma() * self.W


# ---------------------------------------------------------------------------------------------- initialisation [ST]


def stable_init_std(n_in: int, n_out: int) -> float:
    """StableInit draws from N(0, std^2), std = 1 / (sqrt(n_in) + sqrt(n_out)): E sigma(W) <= 1 [ST, Section 3.1, eq. 1]."""
    return 1 / (math.sqrt(n_in) + math.sqrt(n_out))


def xavier_std(n_in: int, n_out: int) -> float:
    """Xavier's normal initialisation: std = sqrt(2 / (n_in + n_out)), under which E sigma(W) <= 2 [ST, Lemma 1]."""
    return math.sqrt(2 / (n_in + n_out))


# ------------------------------------------------------------------------------------------------ norms and residuals


def stable_norm(x: Tensor, gamma: Tensor | float, alpha: float, eps: float = 1e-5) -> Tensor:
    """StableNorm: gamma * d^alpha * x / sqrt(|x|^2 + eps) over the last dimension, of size d [ST, Section 3.2, eq. 2].

    With alpha = 1/2 it is RMSNorm (torch's `nn.RMSNorm` adds its eps to |x|^2 / d, so its eps is this one divided by d).
    """
    d = x.shape[-1]
    return gamma * d**alpha * x / torch.sqrt(x.square().sum(-1, keepdim=True) + eps)


def deepnorm(x: Tensor, branch: Tensor, alpha: float) -> Tensor:
    """LayerNorm(alpha * x + branch), where branch = f(x) [Wang et al., DeepNet, 2022, Figure 2; σ, Appendix F]."""
    return nn.functional.layer_norm(alpha * x + branch, x.shape[-1:])


def deepnorm_scales(N: int, M: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """(alpha, beta) of the encoder, of N layers, and of the decoder, of M layers [DeepNet, Figure 2].

    alpha is that of `deepnorm`. beta multiplies the initial weights of the value and output projections and of the
    feed-forward layers. A side without layers has (1, 1).
    """
    nothing = (1.0, 1.0)
    if M == 0:
        return ((2 * N) ** (1 / 4), (8 * N) ** (-1 / 4)), nothing
    if N == 0:
        return nothing, ((2 * M) ** (1 / 4), (8 * M) ** (-1 / 4))
    encoder = 0.81 * (N**4 * M) ** (1 / 16), 0.87 * (N**4 * M) ** (-1 / 16)
    decoder = (3 * M) ** (1 / 4), (12 * M) ** (-1 / 4)
    return encoder, decoder


# ----------------------------------------------------------------------------------- attention: what the softmax sees


def dot_logits(q: Tensor, k: Tensor) -> Tensor:
    """q_i . k_j / sqrt(d1), (batch, heads, queries, keys)."""
    return torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])


def l2_logits(q: Tensor, k: Tensor) -> Tensor:
    """L2 attention: -|q_i - k_j|^2 / sqrt(d1) [Kim et al., 2021; ST, Appendix N]. For tied weights, give q as k."""
    return -(q[..., :, None, :] - k[..., None, :, :]).square().sum(-1) / math.sqrt(q.shape[-1])


def qk_norm_logits(q: Tensor, k: Tensor, gamma_q: Tensor | float, gamma_k: Tensor | float, eps: float = 1e-5) -> Tensor:
    """QK-norm: RMSNorm(q_i) . RMSNorm(k_j) / sqrt(d1), at most sqrt(d1) while gamma = 1 [ST, Section 3.3.1, Theorem 3]."""
    return dot_logits(stable_norm(q, gamma_q, 0.5, eps), stable_norm(k, gamma_k, 0.5, eps))


def stable_logits(
    q: Tensor,
    k: Tensor,
    gamma_q: Tensor | float,
    gamma_k: Tensor | float,
    sequence_length: int,
    alpha: float,
    eps: float = 1e-5,
) -> Tensor:
    """StableAtten: tau * SN(q_i) . SN(k_j) / d1^(2 alpha), tau = 1.618 log2(N) [ST, Section 3.3.2, eq. 3].

    SN is StableNorm with this alpha; N = `sequence_length` is that of the configuration, not of q and k.
    """
    tau = 1.618 * math.log2(sequence_length)
    q, k = stable_norm(q, gamma_q, alpha, eps), stable_norm(k, gamma_k, alpha, eps)
    return tau * torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** (2 * alpha)


def attention(logits: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """softmax(logits) v, (batch, heads, queries, d1); causal: query i sees the keys j <= i."""
    if is_causal:
        logits = logits.masked_fill(~_causal(logits), -torch.inf)
    return logits.softmax(-1) @ v


def _causal(logits: Tensor) -> Tensor:
    return torch.ones(logits.shape[-2:], dtype=torch.bool).tril()


class ListedStableAttention(nn.Module):
    """The program that [ST, Appendix G] lists for StableAtten, on given weights.

    It differs from eq. 2 in that its norm adds eps (1e-8) to |x|, outside of the root.
    """

    def __init__(
        self,
        qkv: nn.Module,
        proj: nn.Module,
        gamma_q: Tensor,
        gamma_k: Tensor,
        num_heads: int,
        sequence_length: int,
        alpha: float,
    ) -> None:
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


# ------------------------------------------------------------------------------------------------ attention entropy [σ]


def attention_logits(
    q: Tensor, k: Tensor, *, scale: float, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """scale * q k^T + mask, the whole matrix, in float64; -inf where a key is masked.

    k may have fewer heads, each shared by a group of query heads. A boolean mask is True where a query sees a key.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = scale * torch.einsum("bhid,bhjd->bhij", q.double(), k.double())
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask.double()
    if is_causal:
        logits = logits.masked_fill(~_causal(logits), -torch.inf)
    return logits


def attention_probabilities(q: Tensor, k: Tensor, **settings: Any) -> Tensor:
    """A = softmax(attention_logits) [σ, Section 3.1], in float64. A row with all keys masked is zero."""
    return attention_logits(q, k, **settings).softmax(-1).nan_to_num(0.0)


def entropy(probabilities: Tensor) -> Tensor:
    """Ent(A_i) = -sum_j A_ij log A_ij over the last dimension, in nats [σ, Section 3.1]."""
    return torch.special.entr(probabilities).sum(-1)


def entropy_bound(logits: Tensor) -> float:
    """The least entropy of a softmax whose T logits have the norm that these have [σ, Theorem 3.1, eq. 1], in nats.

        log(1 + (T-1) b) + sigma sqrt(T (T-1)) b / (1 + (T-1) b),    b = exp(-sigma sqrt(T / (T-1)))

    sigma is the norm of the logits less their mean, by which softmax does not change. Logits of -inf are masked keys.
    """
    u = [x for x in logits.double().tolist() if x > -math.inf]
    T = len(u)
    if T < 2:
        return 0.0
    sigma = math.sqrt(sum((x - sum(u) / T) ** 2 for x in u))
    beta = math.exp(-sigma * math.sqrt(T / (T - 1)))
    return math.log(1 + (T - 1) * beta) + sigma * math.sqrt(T * (T - 1)) * beta / (1 + (T - 1) * beta)


# ------------------------------------------------------------------------------------- what acts on logits that are large


def qk_clip(
    W_q: Tensor, W_k: Tensor, largest: Tensor, threshold: float = 100.0, alpha: float = 0.5
) -> tuple[Tensor, Tensor]:
    """QK-clip [Kimi K2, 2025, Section 2.1]: after an update, smaller weights for each head whose logits became too large.

        W_q <- (t / S)^alpha W_q,    W_k <- (t / S)^(1 - alpha) W_k    where S > t

    A key head shared by several query heads is scaled by the least of their factors, each query head by what it still needs.

    Args:
        W_q: (heads, ...), such as (heads, d1, in); a bias (heads, d1), or the queries themselves, are treated the same way.
        W_k: (key heads, ...).
        largest: S (heads,), the largest logit of each query head in this update.
        threshold: t.
        alpha: share of the queries in the factor, from 0 to 1.
    """
    shrink = [min(1.0, threshold / S) if S > 0 else 1.0 for S in largest.tolist()]
    shared = len(W_q) // len(W_k)
    keys = [min(shrink[i * shared : (i + 1) * shared]) ** (1 - alpha) for i in range(len(W_k))]
    queries = [min(1.0, eta / keys[i // shared]) for i, eta in enumerate(shrink)]
    return (
        torch.stack([W * eta for W, eta in zip(W_q, queries, strict=True)]),
        torch.stack([W * eta for W, eta in zip(W_k, keys, strict=True)]),
    )


def z_loss(logits: Tensor, coefficient: float = 1e-4) -> Tensor:
    """z-loss: coefficient * log(Z)^2, the mean over tokens [Chowdhery et al., PaLM, 2022, Section 5].

    Z = sum_j exp(logits_j) is the divisor of the output's softmax; logits (tokens, vocabulary). It is added to the loss.
    """
    return coefficient * logits.exp().sum(-1).log().square().mean()
