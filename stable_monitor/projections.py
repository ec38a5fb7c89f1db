"""Where an attention module keeps its query, key, value and output weights, and their spectral norms."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from stable_core.power_iteration import top_singular_vectors
from stable_core.sigma_reparam import SigmaReparam
from stable_core.targets import PACKED_QKV_NAMES, QKV_NAMES, matrix

KEY_VALUE_NAMES = (("q", "kv"), ("to_q", "to_kv"), ("q_proj", "kv_proj"))
MIXED_QKV_NAMES = ("query_key_value",)  # packed head by head: seen, but not told apart
MIXED_QKV_CLASSES = ("CodeGenAttention", "GPTBigCodeAttention")
OUT_NAMES = ("out_proj", "o_proj", "proj", "c_proj", "to_out", "out_lin", "o", "wo", "Wo", "output", "dense")
HEADS_NAMES = ("num_heads", "n_head", "n_heads", "num_attention_heads", "heads")

Place = tuple[nn.Module, str]  # a layer and the name of its weight


def num_heads(attention: nn.Module) -> int | None:
    """How many heads an attention module says it has."""
    return next((n for name in HEADS_NAMES if isinstance(n := getattr(attention, name, None), int)), None)


def find_projections(attention: nn.Module) -> dict[str, Place]:
    """Where each projection is: q, k and v, or q and kv, or qkv, as they are packed. Empty: no attention that is known."""
    for name in PACKED_QKV_NAMES + MIXED_QKV_NAMES:
        if (place := _place(attention, name)) is not None:
            return {"qkv": place}
    for roles, names_of_roles in ((("q", "k", "v"), QKV_NAMES), (("q", "kv"), KEY_VALUE_NAMES)):
        for names in names_of_roles:
            places = [_place(attention, name) for name in names]
            if all(places):
                return dict(zip(roles, places, strict=True))
    return {}


def find_output(attention: nn.Module, parent: nn.Module | None) -> Place | None:
    """The output projection: the attention module's own, or, as in BERT, that of the module around it."""
    for owner in (attention, parent):
        for name in OUT_NAMES if owner is not None else ():
            if (place := _place(owner, name)) is not None:
                return place
    return None


def _place(owner: nn.Module, name: str) -> Place | None:
    if _shape(owner, name) is not None:
        return owner, name
    layer = owner._modules.get(name)
    if isinstance(layer, nn.Sequential | nn.ModuleList) and len(layer):
        layer = layer[0]
    for candidate in (layer, layer._modules.get("dense") if layer is not None else None):
        if candidate is not None and len(_shape(candidate, "weight") or ()) >= 2:
            return candidate, "weight"
    return None


def _shape(layer: nn.Module, name: str) -> torch.Size | None:
    """The shape of a weight, without computing it where it is parametrized: that may count as a use of it."""
    if parametrize.is_parametrized(layer, name):
        parts = layer.parametrizations[name]
        return (parts.original if parts.is_tensor else parts.original1).shape
    weight = layer._parameters.get(name, layer.__dict__.get(name))
    return weight.shape if isinstance(weight, Tensor) else None


class SpectralNorms:
    """sigma of a model's attention weights, found from the last record's singular vectors, within 1e-3."""

    def __init__(self) -> None:
        self._vectors: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self, name: str, attention: nn.Module, parent: nn.Module | None) -> dict[str, Tensor]:
        """The spectral norm of each effective weight of one attention module: {"q": sigma, "k": ..., "v": ..., "out": ...}.

        Where σReparam keeps u and v it is u^T W_hat v, which is gamma. Packed projections are told apart where they are of
        one size, else they are one "qkv".
        """
        places, output = find_projections(attention), find_output(attention, parent)
        mixed = (
            getattr(attention, "head_first", False)
            or type(attention).__name__ in MIXED_QKV_CLASSES
            or any(_place(attention, name) for name in MIXED_QKV_NAMES)
        )
        sigmas = {}
        for role, (layer, weight) in {**places, **({"out": output} if output else {})}.items():
            roles = (role,) if role == "out" or mixed else tuple(role)
            gammas = _gammas(layer, weight)
            if gammas is not None and len(gammas) == len(roles):
                sigmas.update(zip(roles, gammas.abs().unbind(), strict=True))
                continue
            with _unchanged(layer, weight):
                W = getattr(layer, weight).detach()
            W = W.full_tensor() if isinstance(W, DTensor) else W
            W = matrix(W, transposed=type(layer).__name__ == "Conv1D")
            if W.shape[0] != len(roles) * W.shape[1]:
                roles = (role,)
            for part, block in zip(roles, W.chunk(len(roles)), strict=True):
                sigmas[part] = self._sigma(f"{name}.{part}", block)
        return sigmas

    def _sigma(self, key: str, W: Tensor) -> Tensor:
        if not W.isfinite().all():
            return W.new_tensor(torch.nan)
        with torch.autocast(W.device.type, enabled=False):
            u, self._vectors[key] = top_singular_vectors(W, self._vectors.get(key))
            return torch.dot(u, torch.mv(W.float(), self._vectors[key]))


@contextmanager
def _unchanged(layer: nn.Module, weight: str) -> Iterator[None]:
    """Parametrizations in evaluation mode: torch's spectral norm iterates at every access in training mode."""
    parts = list(layer.parametrizations[weight].modules()) if parametrize.is_parametrized(layer, weight) else []
    before = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, training in zip(parts, before, strict=True):
            part.training = training


def _gammas(layer: nn.Module, weight: str) -> Tensor | None:
    """σReparam's gamma of each block of a weight that shares its sigma with no other."""
    if parametrize.is_parametrized(layer, weight):
        reparam = layer.parametrizations[weight][0]
        if isinstance(reparam, SigmaReparam) and len(reparam.members()) == 1:
            return reparam.gamma.detach().float()
    return None
