"""Spectral norms of the query, key, value and output weights of attention modules."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stable_core.layers import chain_of, equal_blocks, find_output, find_projections, is_transposed
from stable_core.power_iteration import top_singular_vectors
from stable_core.targets import matrix


class SpectralNorms:
    """Spectral norms of a model's attention weights, within 1e-3, each found from the singular vector of the last call.

    A sharded weight is gathered, in which all processes must take part; its norm is NaN where may_gather() returns False.
    """

    def __init__(self, may_gather: Callable[[], bool] = lambda: True) -> None:
        self._may_gather = may_gather
        self._vectors: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self, name: str, attention: nn.Module, parent: nn.Module | None) -> dict[str, dict[str, Tensor]]:
        """{"sigma": {"q": ..., "k": ..., "v": ..., "out": ...}, "lag": {...}} of one attention module, as scalar tensors.

        sigma is the spectral norm of each effective weight. lag, of weights under σReparam, is 1 - estimate / sigma(W), where
        the estimate is the sigma that σReparam divides by. Packed projections are measured one by one where they are square
        blocks one after the other, else as one "qkv".
        """
        places, output = find_projections(attention), find_output(attention, parent)
        sigmas, lags = {}, {}
        for role, (layer, weight) in {**places, **({"out": output} if output else {})}.items():
            chain = chain_of(layer, weight)
            with _unchanged(*([] if chain is None else [chain])):
                W = self._matrix(layer, getattr(layer, weight))
            roles = equal_blocks(attention, role, W.shape)
            for part, block in zip(roles, W.chunk(len(roles)), strict=True):
                sigmas[part] = self._sigma(f"{name}.{part}", block)
            if chain is not None and is_sigma_reparam(chain):
                lags.update(self._lags(name, layer, chain, W, {part: sigmas[part] for part in roles}))
        return {"sigma": sigmas, "lag": lags}

    def _matrix(self, layer: nn.Module, W: Tensor) -> Tensor:
        """A layer's whole weight as (out, in), gathered if sharded."""
        W = W.detach()
        if isinstance(W, DTensor):
            W = W.full_tensor() if self._may_gather() else torch.full(W.shape, torch.nan, device=W.device)
        return matrix(W, transposed=is_transposed(layer))

    def _sigma(self, key: str, W: Tensor) -> Tensor:
        if not W.isfinite().all():
            return W.new_tensor(torch.nan)
        with torch.autocast(W.device.type, enabled=False):
            u, self._vectors[key] = top_singular_vectors(W, self._vectors.get(key))
            return torch.dot(u, torch.mv(W.float(), self._vectors[key]))

    def _lags(self, name: str, layer: nn.Module, chain: Any, W: Tensor, sigmas: dict[str, Tensor]) -> dict[str, Tensor]:
        """The lag of each part of W_hat, whose norms are `sigmas`.

        As W_hat = gamma / estimate * W, estimate / sigma(W) = gamma / sigma(W_hat)."""
        members = chain[0].members()
        leader = next(member[0] for member in members if hasattr(member[0], "gamma"))
        gammas, norms = leader.gamma.detach().float().abs(), list(sigmas.values())
        parts = [W]
        if len(members) > 1 or len(gammas) != len(norms):  # several parts share a sigma, that of their stack
            if len(members) > 1:
                with _unchanged(*members):
                    parts = [self._matrix(layer, member()) for member in members]
            shared = torch.cat(parts).split(list(leader.rows))
            norms = [self._sigma(f"{name}.{'.'.join(sigmas)}.shared.{i}", block) for i, block in enumerate(shared)]
        ends = torch.tensor(list(leader.rows)).cumsum(0).tolist()
        row = sum(part.shape[0] for part in parts[: [member is chain for member in members].index(True)])
        lags = {}
        for part in sigmas:
            block = next(i for i, end in enumerate(ends) if row < end)
            lags[part] = (1 - gammas[block] / norms[block]).clamp(min=0)  # negative only by rounding
            row += W.shape[0] // len(sigmas)
        return lags


def is_sigma_reparam(chain: Any) -> bool:
    """Whether a weight has σReparam and no other parametrization. Not by isinstance: models may ship copies of the classes."""
    return len(chain) == 1 and hasattr(chain[0], "members")


@contextmanager
def _unchanged(*chains: nn.Module) -> Iterator[None]:
    """A context with parametrizations in evaluation mode, as torch's spectral norm iterates at each access in training."""
    parts = [part for chain in chains for part in chain.modules()]
    before = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, training in zip(parts, before, strict=True):
            part.training = training
