"""QK-clip: where attention logits grew too large, the queries' and keys' weights of that head shrink.

Source: MuonClip (Kimi K2 technical report, Moonshot AI, 2025). After an update in which the largest logit S of a head exceeded
the threshold t,

    W_q <- (t / S)^alpha W_q,    W_k <- (t / S)^(1 - alpha) W_k    of that head, and their biases likewise,

and its logits, which are linear in each, are t / S of what they were. Gradients, the optimizer's state, and heads whose S is at
most t stay as they are.

Where query heads share a key head (grouped queries), the key shrinks as its worst head asks, and each of its queries by what is
missing: with f = t / S, or 1 where S <= t,

    key: kappa = min f^(1 - alpha) over its queries,    query: min(1, f / kappa).

No head's logits then exceed t, and no weight grows; heads that asked for less than kappa have their logits shrunk by kappa all
the same, which alpha = 1 avoids: there the queries take it all.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .advancing import advance
from .layers import Place, chain_of, find_projections, find_qk_norms, is_transposed, matrix_shape, own_biases, rows_of
from .sharding import beside

LEAVE_OUT = "leave the layer out with filter_fn"


def clip_factors(largest: Tensor, key_heads: int, threshold: float, alpha: float) -> tuple[Tensor, Tensor]:
    """What the queries of each head, (heads,), and each key head, (key_heads,), are multiplied by.

    Args:
        largest: S of each head, (heads,). What is not finite clips nothing: the loss shows it.
        key_heads: divides heads.
        threshold: t.
        alpha: the queries' part, from 0 to 1.
    """
    wanted = torch.where((largest > threshold) & largest.isfinite(), threshold / largest, 1.0)
    keys = (wanted ** (1 - alpha)).view(key_heads, -1).amin(1)
    queries = (wanted.view(key_heads, -1) / keys[:, None]).clamp(max=1).flatten()
    return queries, keys


@torch.no_grad()
def clip_heads(attention: nn.Module, largest: Tensor, threshold: float, alpha: float) -> None:
    """Applies `clip_factors` to the weights and biases of an attention that `check_attention` and `check_heads` passed.

    It acts on effective weights. Under σReparam, rows of the original W shrink, u follows, and gamma is multiplied by
    sigma(W) after / before: gamma / sigma, and with it every other row of W_hat, stays as it was, also of weights that share
    the sigma. Under torch's weight norm, rows of g shrink. Where W_q or W_k does not learn, the other takes it all.
    """
    places = _query_and_key_places(attention)
    rows = _rows(attention, places) or {}
    alpha = {(True, False): 1.0, (False, True): 0.0}.get(_learn(places), alpha)
    key_heads = rows["k"].numel() * len(largest) // rows["q"].numel()
    queries, keys = clip_factors(largest, key_heads, threshold, alpha)
    factors = {"q": queries, "k": keys, "q_shared": queries * keys.repeat_interleave(len(queries) // key_heads)}
    for held, place in places.items():
        factor = torch.ones(matrix_shape(*place)[0], device=largest.device)
        for role, own in (rows_of(attention, held, matrix_shape(*place)) or {}).items():
            if role in factors:
                factor[own.reshape(len(factors[role]), -1)] = factors[role][:, None]
        if _parameter(*place).requires_grad and (factor != 1).any():
            _scale_rows(place, factor)
            _scale_bias(place, held, factor)
    for role, bias in own_biases(attention):
        _multiply(bias, factors[role].repeat_interleave(bias.shape[-1] // len(factors[role])), dim=-1)


def check_attention(name: str, attention: nn.Module) -> None:
    """Whether the weights of this attention can be clipped, before anything is known of its logits.

    Raises:
        ValueError: unknown projections, or an unknown order of their rows; QK-norm, which undoes it; queries and keys of one
            weight; a parametrization that fixes the weight's norm.
    """
    places = _query_and_key_places(attention)
    if not places:
        raise ValueError(
            f"{name}: its query and key projections have no known names (stable_core/layers.py); {LEAVE_OUT}"
        )
    if norms := find_qk_norms(attention):
        raise ValueError(
            f"{name}: QK-norm ({', '.join(norms)}): its logits do not grow with W_q and W_k, so that QK-clip would change "
            f"nothing; lower the gain of the norm, or {LEAVE_OUT}"
        )
    if _rows(attention, places) is None:
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
    """Whether logits of so many heads, of queries of head_dim features where that is known, are q.k of its weights.

    Raises:
        ValueError: they are not.
    """
    rows = _rows(attention, _query_and_key_places(attention)) or {}
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
    """The parameters behind its query and key weights; those that do not learn are left as they are, and are not in it."""
    return [W for place in _query_and_key_places(attention).values() if (W := _parameter(*place)).requires_grad]


def _query_and_key_places(attention: nn.Module) -> dict[str, Place]:
    return {held: place for held, place in find_projections(attention).items() if held != "v"}


def _rows(attention: nn.Module, places: dict[str, Place]) -> dict[str, Tensor] | None:
    """The rows of queries and keys in their weights; None where they are not known."""
    found: dict[str, Tensor] = {}
    for held, place in places.items():
        rows = rows_of(attention, held, matrix_shape(*place))
        if rows is None:
            return None
        found |= rows
    return found


def _learn(places: dict[str, Place]) -> tuple[bool, bool]:
    """Whether W_q and W_k learn."""
    found = [_parameter(*place).requires_grad for place in places.values()]
    return found[0], found[-1]


def _parameter(layer: nn.Module, tensor: str) -> Tensor:
    """What an optimizer steps."""
    chain = chain_of(layer, tensor)
    if chain is None:
        return getattr(layer, tensor)
    return chain.original0 if _weight_norm(chain) else chain.original


def _weight_norm(chain: Any) -> bool:
    """torch's W = g v / |v|, with one g for each row."""
    return len(chain) == 1 and type(chain[0]).__name__ == "_WeightNorm"


def _scale_rows(place: Place, factor: Tensor) -> None:
    """Multiplies the rows of an effective weight by factor (out,)."""
    layer, tensor = place
    chain, dim = chain_of(layer, tensor), 1 if is_transposed(layer) else 0
    if chain is None or _weight_norm(chain):
        _multiply(_parameter(layer, tensor), factor, dim)
        return
    sigma = chain[0].leader()
    advance([chain.original])  # what the optimizer's step would do, if it has not yet
    before = sigma.sigma()
    _multiply(chain.original, factor, dim)
    sigma.converge()
    _multiply(sigma.gamma, sigma.sigma() / before)


def _multiply(x: Tensor, factor: Tensor, dim: int = 0) -> None:
    """x times factor along a dimension, in place; factor is on all processes where x is cut up over them."""
    shape = [1] * x.ndim
    shape[dim] = -1
    x.mul_(beside(x, factor.to(x.device).view(shape)))


def _scale_bias(place: Place, held: str, factor: Tensor) -> None:
    layer, _ = place
    if not isinstance(layer, nn.MultiheadAttention):
        bias = getattr(layer, "bias", None)
    elif (bias := layer.in_proj_bias) is not None and held != "qkv":  # one for all three weights
        factor = torch.cat([factor if role == held else torch.ones_like(factor) for role in "qkv"])
    if bias is not None:
        _multiply(bias, factor)
