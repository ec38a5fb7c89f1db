"""Bounds that the papers prove: on the entropy, on the spectral norm of an Adam update, and on logits."""

import math
from typing import overload

import torch
from torch import Tensor


@overload
def entropy_lower_bound(sigma: float, T: int) -> float: ...
@overload
def entropy_lower_bound(sigma: Tensor, T: Tensor | int) -> Tensor: ...
@overload
def entropy_lower_bound(sigma: float, T: Tensor) -> Tensor: ...
def entropy_lower_bound(sigma: Tensor | float, T: Tensor | int) -> Tensor | float:
    """The least entropy, in nats, of the softmax of T logits whose norm is at most sigma [σ, Theorem 3.1, eq. 1].

        Ent >= log(1 + (T-1) b) + sigma sqrt(T (T-1)) b / (1 + (T-1) b),   b = exp(-sigma sqrt(T / (T-1)))

    In the theorem sigma = |W_K W_Q^T|_2 |X X^T|_2, at least the norm of each row of the logits. The bound is attained by
    one logit sigma sqrt(1 - 1/T) and T-1 logits -sigma / sqrt(T (T-1)).

    Args:
        sigma: a number or a tensor. If sigma or T is a tensor the result is one, of their broadcast shape.
        T: number of keys. With one key, or none, the entropy is 0.

    Raises:
        ValueError: sigma or T, as numbers, are below 0.
    """
    if not isinstance(sigma, Tensor) and not isinstance(T, Tensor):
        if not (sigma >= 0 and T >= 0):
            raise ValueError(f"sigma = {sigma!r}, T = {T!r}: allowed are numbers from 0")
        return float(entropy_lower_bound(torch.tensor(float(sigma), dtype=torch.float64), T))
    sigma = torch.as_tensor(sigma)
    T = torch.as_tensor(T, dtype=sigma.dtype, device=sigma.device)
    others = (T - 1).clamp(min=0)
    b = torch.exp(-sigma * (T / others.clamp(min=1)).sqrt())
    return torch.log1p(others * b) + sigma * (T * others).sqrt() * b / (1 + others * b)


def adam_update_norm_bound(mean: Tensor, variance: Tensor) -> float:
    """The least spectral norm of the ideal Adam update E[g] / sqrt(E[g^2]) of one weight [σ, Proposition 3.2].

        sigma(Delta) >= sqrt(w) sqrt(1 - 1/w^2 sum_ij n_ij^2 / (mu_ij^2 + n_ij^2))

    It grows with the width w, and does not depend on the size of the gradient. For a weight (m, n) the same proof holds with
    w = max(m, n) and the mean over all entries.

    Args:
        mean: mu, the mean of the stochastic gradient, (m, n).
        variance: n^2, its variance, (m, n). Entries where both are zero have no update.

    Raises:
        ValueError: mean and variance are not two matrices of one shape, or a variance is negative.
    """
    if mean.ndim != 2 or mean.shape != variance.shape or (variance < 0).any():
        raise ValueError(
            f"mean {tuple(mean.shape)}, variance {tuple(variance.shape)}: allowed are two matrices of one shape, the "
            "variance not negative"
        )
    second_moment = mean.square() + variance
    noise = torch.where(second_moment > 0, variance / second_moment, 1.0).mean()
    return math.sqrt(max(mean.shape)) * math.sqrt(max(0.0, 1 - noise.item()))


def qk_norm_logit_bound(head_dim: int, gamma_q: Tensor | float = 1.0, gamma_k: Tensor | float = 1.0) -> float:
    """The largest |logit| under QK-norm: sqrt(d1) max_i |gamma_q,i gamma_k,i| [ST, Theorem 3, there with gamma = 1]."""
    return math.sqrt(head_dim) * stable_attention_logit_bound(1.0, gamma_q, gamma_k)


def stable_attention_logit_bound(tau: float, gamma_q: Tensor | float = 1.0, gamma_k: Tensor | float = 1.0) -> float:
    """The largest |logit| under StableAtten: tau max_i |gamma_q,i gamma_k,i|, whatever the head dimension [ST, eq. 3]."""
    return tau * torch.as_tensor(gamma_q * gamma_k).abs().max().item()
