"""Where an attention module keeps its query, key, value and output weights, and their spectral norms."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from stable_core.power_iteration import matvec, top_singular_vectors
from stable_core.sigma_reparam import SigmaReparam
from stable_core.targets import PACKED_QKV_NAMES, QKV_NAMES, matrix

MIXED_QKV_NAMES = ("query_key_value",)  # packed head by head: seen, but not told apart
OUT_NAMES = ("out_proj", "o_proj", "proj", "c_proj", "to_out", "out_lin", "o", "wo", "Wo", "output", "dense")
HEADS_NAMES = ("num_heads", "n_head", "n_heads", "num_attention_heads", "heads")


def num_heads(attention: nn.Module) -> int:
    """How many heads an attention module says it has; 1 if it says nothing."""
    return next((n for name in HEADS_NAMES if isinstance(n := getattr(attention, name, None), int)), 1)


def find_projections(attention: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The module and tensor name of each projection: q, k, v, or qkv where they are packed. Empty: no attention known."""
    for name in PACKED_QKV_NAMES + MIXED_QKV_NAMES:
        if (found := _weight(attention, name)) is not None:
            return {"qkv": found}
    for names in QKV_NAMES:
        if all(_weight(attention, name) is not None for name in names):
            return {role: _weight(attention, name) for role, name in zip("qkv", names, strict=True)}
    return {}


def find_output(attention: nn.Module, parent: nn.Module | None) -> tuple[nn.Module, str] | None:
    """The output projection: the attention module's own, or, as in BERT, that of the module it is part of."""
    for owner in (attention, parent):
        for name in OUT_NAMES if owner is not None else ():
            if (found := _weight(owner, name)) is not None:
                return found
    return None


def _weight(owner: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    if isinstance(owner._parameters.get(name), Tensor) or name in getattr(owner, "parametrizations", ()):
        return owner, name
    layer = owner._modules.get(name)
    if isinstance(layer, nn.Sequential | nn.ModuleList) and len(layer):
        layer = layer[0]
    for candidate in (layer, getattr(layer, "dense", None)):
        if isinstance(getattr(candidate, "weight", None), Tensor) and candidate.weight.ndim >= 2:
            return candidate, "weight"
    return None


class SpectralNorms:
    """sigma of a model's attention weights, found from the last record's singular vectors, within 1e-3."""

    def __init__(self) -> None:
        self._vectors: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self, name: str, attention: nn.Module, parent: nn.Module | None) -> dict[str, Tensor]:
        """The spectral norm of each effective weight of one attention module: {"q": sigma, "k": ..., "v": ..., "out": ...}.

        Where σReparam keeps u and v it is u^T W_hat v, which is gamma. Packed projections are told apart where they are of
        one size.
        """
        projections = find_projections(attention)
        output = find_output(attention, parent)
        sigmas = {}
        for role, (layer, tensor_name) in {**projections, **({"out": output} if output else {})}.items():
            transposed = type(layer).__name__ == "Conv1D"
            packed = role == "qkv" and _weight(attention, MIXED_QKV_NAMES[0]) is None
            gammas = _gammas(layer, tensor_name)
            if gammas is not None and len(gammas) in ((3,) if packed else (1,)):
                sigmas.update(zip("qkv" if packed else (role,), gammas.abs().unbind(), strict=True))
                continue
            W = getattr(layer, tensor_name).detach()
            W = matrix(W.full_tensor() if isinstance(W, DTensor) else W, transposed)
            alike = packed and W.shape[0] == 3 * W.shape[1]
            parts = zip("qkv", W.chunk(3), strict=True) if alike else ((role, W),)
            sigmas.update((part, self._sigma(f"{name}.{part}", block)) for part, block in parts)
        return sigmas

    def _sigma(self, key: str, W: Tensor) -> Tensor:
        if not W.isfinite().all():
            return W.new_tensor(torch.nan)
        with torch.autocast(W.device.type, enabled=False):
            u, self._vectors[key] = top_singular_vectors(W, self._vectors.get(key))
            return torch.dot(u, matvec(W, self._vectors[key]))


def _gammas(layer: nn.Module, tensor_name: str) -> Tensor | None:
    """σReparam's gamma of each block of a weight that shares its sigma with no other."""
    if parametrize.is_parametrized(layer, tensor_name):
        reparam = layer.parametrizations[tensor_name][0]
        if isinstance(reparam, SigmaReparam) and len(reparam.members()) == 1:
            return reparam.gamma.detach().float()
    return None
