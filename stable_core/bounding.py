"""Lets go of the size that the queries and keys of a trained attention have grown to, and bounds it from then on.

Where attention entropy has collapsed, W_q and W_k have grown until softmax attends to one key. σReparam with gamma = sigma(W)
keeps the function, and with it the collapse. Here it is put on the weights that hold queries and keys with

    gamma = min(sigma(W), limit) for W_q and W_k, whose biases shrink by the same factor,
    gamma = sigma(W) for values that are packed with them, which keep their function.

What W_q and W_k have learned to look for, their directions, stays; logits shrink by the product of the two factors, and are
bounded by the two gammas from then on [σ, Theorem 3.1].
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .layers import chain_of, is_transposed, matrix_shape, own_biases, rows_of
from .qk_clip import check_attention, query_and_key_places, scale_heads, weights_to_clip
from .sharding import is_sharded
from .sigma_reparam import SigmaReparamConfig, sigma_reparam

LIMIT = 3.0  # by experiment, recipes/rescue: the best in ViT; in GPT-2 all from 2 to 5 are alike


@dataclass(frozen=True)
class Bounded:
    """What happened to an attention: the spectral norms of its effective W_q and W_k, before and now."""

    queries: tuple[float, float]
    keys: tuple[float, float]


def bound_queries_and_keys(
    model: nn.Module, attentions: Mapping[str, nn.Module], limit: float = LIMIT
) -> dict[str, Bounded]:
    """Bounds the queries and keys of some attentions of a model, in place.

    Weights and biases stay the parameters that they are, so that an optimizer goes on with them. The gammas are new ones. A
    weight that has σReparam already keeps it, and its gamma shrinks.

    Args:
        model: it is changed.
        attentions: modules of it, by name.
        limit: the largest spectral norm that W_q and W_k are left with.

    Raises:
        ValueError: limit is not positive; an attention that `qk_clip.check_attention` does not pass, whose queries and keys do
            not learn, are sharded, or have torch's weight norm. The model is then as it was.
    """
    if not limit > 0:
        raise ValueError(f"limit = {limit!r}: allowed are positive numbers")
    plain: set[int] = set()
    for name, attention in attentions.items():
        plain |= check_bounding(name, attention)
    if plain:
        with in_place(model):
            sigma_reparam(model, SigmaReparamConfig(gamma_init="spectral"), lambda module, name: id(module) in plain)
    return {name: _bound(attention, limit) for name, attention in attentions.items()}


def check_bounding(name: str, attention: nn.Module) -> set[int]:
    """Checks that `bound_queries_and_keys` takes an attention, without a change; `name` is for the error.

    Returns:
        The ids of its layers of queries and keys that have no σReparam yet.

    Raises:
        ValueError: as `bound_queries_and_keys`.
    """
    check_attention(name, attention)
    plain, places = set[int](), query_and_key_places(attention).values()
    if len(weights_to_clip(attention)) < len(places):
        raise ValueError(f"{name}: its queries or keys are frozen, which training has not made what they are")
    for layer, tensor in places:
        chain = chain_of(layer, tensor)
        if chain is None:
            plain.add(id(layer))
        elif not hasattr(chain[0], "leader"):
            raise ValueError(f"{name}: its weight has weight norm, which bounds nothing; stable_core.fold(model) first")
    if any(map(is_sharded, weights_to_clip(attention))):
        raise ValueError(f"{name}: its weights are sharded already; bound them before fully_shard")
    return plain


@contextmanager
def in_place(model: nn.Module) -> Iterator[None]:
    """Has torch's `register_parametrization` not set a parameter to itself, after which a DistributedDataParallel that has it
    waits for its gradient in vain. The new gammas, which that does not know, are the caller's to average."""
    parameters: list[Any] = list(model.parameters())
    for parameter in parameters:
        parameter.set_ = lambda source: None
    try:
        yield
    finally:
        for parameter in parameters:
            del parameter.set_


def parameters_of_queries_and_keys(attention: nn.Module) -> list[nn.Parameter]:
    """What `bound_queries_and_keys` changes: weights that hold queries and keys, their biases, and gammas that are there."""
    found: list[Any] = [*weights_to_clip(attention), *(bias for _, bias in own_biases(attention))]
    for layer, tensor in query_and_key_places(attention).values():
        chain = chain_of(layer, tensor)
        found.append(chain[0].leader().gamma if chain is not None and hasattr(chain[0], "leader") else None)
        name = "in_proj_bias" if isinstance(layer, nn.MultiheadAttention) else "bias"
        found.append(getattr(layer, name, None))
    return [p for p in dict.fromkeys(found) if isinstance(p, nn.Parameter)]


@torch.no_grad()
def _bound(attention: nn.Module, limit: float) -> Bounded:
    before = _norms(attention)
    factors = [torch.tensor([min(1.0, limit / before[role])]) for role in "qk"]
    scale_heads(attention, *factors)
    after = _norms(attention)
    return Bounded((before["q"], after["q"]), (before["k"], after["k"]))


def _norms(attention: nn.Module) -> dict[str, float]:
    """Spectral norms of the rows that make queries, and of those that make keys."""
    norms = {}
    for held, (layer, tensor) in query_and_key_places(attention).items():
        W_hat = getattr(layer, tensor)
        matrix = W_hat.T if is_transposed(layer) else W_hat.flatten(1)
        for role, rows in (rows_of(attention, held, matrix_shape(layer, tensor)) or {}).items():
            norms[role] = float(torch.linalg.matrix_norm(matrix[rows.flatten()].float(), 2))
    return norms
