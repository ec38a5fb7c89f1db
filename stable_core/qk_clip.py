"""QK-clip: scales down the query and key weights of attention heads whose logits grew too large.

Source: MuonClip (Kimi K2 technical report, Moonshot AI, 2025). After an update in which the largest logit S of a head exceeded
the threshold t,

    W_q <- (t / S)^alpha W_q,    W_k <- (t / S)^(1 - alpha) W_k    of that head, and their biases likewise,

which multiplies the logits by t / S, as they are linear in W_q and in W_k. Gradients, the optimizer's state, and heads with
S <= t are left as they are.

In grouped-query attention several query heads share a key head. With f = t / S, or 1 where S <= t, the factors are

    key head: kappa = min f^(1 - alpha) over its query heads,    query head: min(1, f / kappa).

No head's logits then exceed t, and no weight grows. A head with f > kappa gets smaller logits than it needs to; with alpha = 1
this does not happen, as kappa = 1 and only queries are scaled.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .advancing import advance
from .layers import Place, chain_of, find_projections, find_qk_norms, is_transposed, matrix_shape, own_biases, rows_of
from .sharding import beside

LEAVE_OUT = "leave the layer out with filter_fn"


def clip_factors(largest: Tensor, key_heads: int, threshold: float, alpha: float) -> tuple[Tensor, Tensor]:
    """The factors of the query heads (heads,) and of the key heads (key_heads,), each at most 1; equations above.

    Args:
        largest: S, the largest logit of each head, (heads,). A head whose S is NaN or inf is not clipped.
        key_heads: number of key heads, a divisor of heads.
        threshold: t.
        alpha: share of the queries in the factor, from 0 to 1.
    """
    wanted = torch.where((largest > threshold) & largest.isfinite(), threshold / largest, 1.0)
    keys = (wanted ** (1 - alpha)).view(key_heads, -1).amin(1)
    queries = (wanted.view(key_heads, -1) / keys[:, None]).clamp(max=1).flatten()
    return queries, keys


def clip_heads(attention: nn.Module, largest: Tensor, threshold: float, alpha: float) -> None:
    """Multiplies the query and key weights and biases of an attention by `clip_factors`.

    The attention must have passed `check_attention` and `check_heads`. Where W_q or W_k is frozen, the other one gets the whole
    factor.

    Args:
        attention: the module that holds the projections.
        largest, threshold, alpha: as for `clip_factors`.
    """
    rows = rows_of_queries_and_keys(attention)
    alpha = {(True, False): 1.0, (False, True): 0.0}.get(_learn(query_and_key_places(attention)), alpha)
    key_heads = rows["k"].numel() * len(largest) // rows["q"].numel()
    scale_heads(attention, *clip_factors(largest, key_heads, threshold, alpha))


@torch.no_grad()
def scale_heads(attention: nn.Module, queries: Tensor, keys: Tensor) -> None:
    """Multiplies the queries of each head, (heads,), and the keys of each key head, (key_heads,), by way of their weights.

    Effective weights are multiplied, and biases. Under σReparam, rows of the original W are, u is computed anew, and gamma is
    multiplied by sigma(W) after / sigma(W) before. So gamma / sigma is the same as before, and with it the other rows of W_hat
    and the weights that share the sigma. Under torch's weight norm, rows of g are multiplied. Frozen weights stay.
    """
    factors = {"q": queries, "k": keys, "q_shared": queries * keys.repeat_interleave(len(queries) // len(keys))}
    for held, place in query_and_key_places(attention).items():
        factor = torch.ones(matrix_shape(*place)[0], device=queries.device)
        for role, own in (rows_of(attention, held, matrix_shape(*place)) or {}).items():
            if role in factors:
                factor[own.reshape(len(factors[role]), -1)] = factors[role][:, None]
        if _parameter(*place).requires_grad and (factor != 1).any():
            _scale_rows(place, factor)
            _scale_bias(place, held, factor)
    for role, bias in own_biases(attention):
        _multiply(bias, factors[role].repeat_interleave(bias.shape[-1] // len(factors[role])), dim=-1)


def check_attention(name: str, attention: nn.Module) -> None:
    """Checks that QK-clip can be applied to this attention. It needs no forward pass; `name` is for the error.

    Raises:
        ValueError: the projections, or the order of their rows, are not known; QK-norm, which undoes the scaling; queries and
            keys made by the same weight; a parametrization that fixes the norm of the weight, or that is not known.
    """
    places = query_and_key_places(attention)
    if not places:
        raise ValueError(
            f"{name}: its query and key projections have no known names (stable_core/layers.py); {LEAVE_OUT}"
        )
    if norms := find_qk_norms(attention):
        raise ValueError(
            f"{name}: QK-norm ({', '.join(norms)}): its logits do not grow with W_q and W_k, so that QK-clip would change "
            f"nothing; lower the gain of the norm, or {LEAVE_OUT}"
        )
    if any(rows_of(attention, held, matrix_shape(*place)) is None for held, place in places.items()):
        raise ValueError(f"{name}: it is not known which rows of its packed weight are queries and keys; {LEAVE_OUT}")
    for layer, tensor in places.values():
        chain = chain_of(layer, tensor)
        if chain is None or _weight_norm(chain):
            continue
        if len(chain) > 1 or not hasattr(chain[0], "leader"):
            raise ValueError(f"{name}: {type(chain[0]).__name__} makes its weight anew from another; {LEAVE_OUT}")
        if chain[0].leader().config.kind == "spectral":
            raise ValueError(
                f"{name}: kind = 'spectral' fixes the norm of its weight; use kind = 'sigma', or {LEAVE_OUT}"
            )
    if len({id(_parameter(*place)) for place in places.values()}) < len(places):
        raise ValueError(f"{name}: its queries and keys have one weight, which cannot be clipped apart; {LEAVE_OUT}")


def check_heads(name: str, attention: nn.Module, heads: int, head_dim: int | None) -> None:
    """Checks that the heads of a forward pass are those of the query and key weights; `name` is for the error.

    Args:
        heads: number of heads of the logits.
        head_dim: features of a query head; None where that is not known.

    Raises:
        ValueError: heads or head_dim do not divide the rows of the weights so, as under L2 attention or tensor parallelism.
    """
    rows = rows_of_queries_and_keys(attention)
    queries, keys = (rows[role].numel() for role in "qk")
    fits = queries % heads == 0 and keys % (queries // heads) == 0 and heads % (keys * heads // queries) == 0
    if "q_shared" in rows:
        queries += rows["q_shared"].numel()
    if not fits or (head_dim is not None and heads > 1 and head_dim * heads != queries):
        features = "" if head_dim is None else f" of {head_dim} features"
        raise ValueError(
            f"{name}: attention with {heads} heads{features}, and {queries} rows of W_q and {keys} of W_k: it is not q.k of "
            f"whole weights, as under L2 attention and tensor parallelism; {LEAVE_OUT}"
        )


def weights_to_clip(attention: nn.Module) -> list[Tensor]:
    """The parameters that hold the query and key weights, without frozen ones, which QK-clip does not change."""
    return [W for place in query_and_key_places(attention).values() if (W := _parameter(*place)).requires_grad]


def query_and_key_places(attention: nn.Module) -> dict[str, Place]:
    """Where the weights are that hold queries, keys or both, by what they hold."""
    return {held: place for held, place in find_projections(attention).items() if held != "v"}


def rows_of_queries_and_keys(attention: nn.Module) -> dict[str, Tensor]:
    """`rows_of` for all of the weights that hold queries or keys together."""
    found: dict[str, Tensor] = {}
    for held, place in query_and_key_places(attention).items():
        found |= rows_of(attention, held, matrix_shape(*place)) or {}
    return found


def _learn(places: dict[str, Place]) -> tuple[bool, bool]:
    """(whether W_q learns, whether W_k learns)."""
    found = [_parameter(*place).requires_grad for place in places.values()]
    return found[0], found[-1]


def _parameter(layer: nn.Module, tensor: str) -> Tensor:
    """The parameter that an optimizer updates: the weight, or the original (g under weight norm) that it is made from."""
    chain = chain_of(layer, tensor)
    if chain is None:
        return getattr(layer, tensor)
    return chain.original0 if _weight_norm(chain) else chain.original


def _weight_norm(chain: Any) -> bool:
    """Whether the weight is under torch's weight norm, W = g v / |v| with one g for each row."""
    return len(chain) == 1 and type(chain[0]).__name__ == "_WeightNorm"


def _scale_rows(place: Place, factor: Tensor) -> None:
    """Multiplies the rows of an effective weight by factor (out,)."""
    layer, tensor = place
    chain, dim = chain_of(layer, tensor), 1 if is_transposed(layer) else 0
    if chain is None or _weight_norm(chain):
        _multiply(_parameter(layer, tensor), factor, dim)
        return
    sigma = chain[0].leader()
    advance([chain.original])  # as the optimizer's hook does after its step, which may not have run yet
    before = sigma.sigma()
    _multiply(chain.original, factor, dim)
    sigma.converge()
    _multiply(sigma.gamma, sigma.sigma() / before)


def _multiply(x: Tensor, factor: Tensor, dim: int = 0) -> None:
    """x *= factor (n,) along a dimension of size n. Where x is sharded, every process has the whole factor."""
    shape = [1] * x.ndim
    shape[dim] = -1
    x.mul_(beside(x, factor.to(x.device).view(shape)))


def _scale_bias(place: Place, held: str, factor: Tensor) -> None:
    layer, _ = place
    if not isinstance(layer, nn.MultiheadAttention):
        bias = getattr(layer, "bias", None)
    elif (bias := layer.in_proj_bias) is not None and held != "qkv":  # one bias for the three weights
        factor = torch.cat([factor if role == held else torch.ones_like(factor) for role in "qkv"])
    if bias is not None:
        _multiply(bias, factor)
