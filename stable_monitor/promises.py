"""What a remedy promises of the logits of one attention: a bound, by the method's equation, for the batch that is running.

With s the scale of the logits, all for tokens x (queries') and y (keys'):

    L2          the kernel's logits are s (|q_i|^2 - |q_i - k_j|^2) <= s max |q_i|^2 [ST, App. N]
    QK-norm     |logit| <= s L_q L_k, L the greatest length that a norm gives: sqrt(d1) max |gamma| of RMSNorm, so that it is
                sqrt(d1) at gamma = 1 [ST, Theorem 3]; tau of StableAtten, whose norms contain it [ST, eq. 3]
    σReparam    |logit| <= s (gamma_q max |x| + |b_q|) (gamma_k max |y| + |b_k|), as |W_hat| = gamma [σ, Section 3.2]
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stable_core.layers import chain_of, find_qk_norms, matrix_shape, num_heads, num_key_heads, own_biases, rows_of
from stable_core.qk_clip import query_and_key_places

from .calls import Call, FusedCall
from .projections import is_sigma_reparam

ROLES = {"q": ("query",), "k": ("key", "query")}  # the arguments that are projected, where projections are not called


@dataclass(frozen=True)
class Input:
    """The last input of a module: the length of its longest row, its shape, and an empty tensor of its type."""

    longest: float
    shape: torch.Size
    like: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Input":
        return cls(torch.linalg.vector_norm(x.detach().float(), dim=-1).max().item(), x.shape, x.detach().new_empty(0))


@dataclass(frozen=True)
class Promise:
    """A remedy, the bound of the logits that it promises (inf: none), and what is wrong with it before any logit is seen."""

    remedy: str = "none"
    bound: float = math.inf
    fault: str = ""


def promise(call: Call, inputs: Mapping[nn.Module, Input]) -> Promise:
    """What bounds the logits of this call. `inputs`: of the projections and norms that were called in this pass."""
    attention = call.site.module
    if (longest := _l2(call)) is not None:
        return Promise("L2", longest)
    modules = dict(attention.named_modules())
    norms = {name: modules[name] for name in find_qk_norms(attention) if name in modules}
    if unused := [name for name, norm in norms.items() if norm not in inputs]:
        return Promise("QK-norm", fault=f"{unused[0]} is there, and not called")
    scale, heads = _scale(call), (num_heads(attention), num_key_heads(attention))
    if scale is None:
        return Promise()
    longest_of = {
        role: max((_greatest_length(norm, inputs[norm], heads) for norm in norms.values()), default=math.inf)
        for role, norms in (("q", _of_role("q", norms)), ("k", _of_role("k", norms)))
    }
    if (bound := scale * longest_of["q"] * longest_of["k"]) < math.inf:
        return Promise("QK-norm", bound)
    lengths = _reparametrised(call, inputs)
    return Promise("σReparam", scale * lengths["q"] * lengths["k"]) if lengths.keys() == {"q", "k"} else Promise()


def _l2(call: Call) -> float | None:
    """s max |q_i|^2 where the kernel is given [2 q_i, 1] and [k_j, -|k_j|^2]; else None."""
    if not isinstance(call, FusedCall) or not (call.q[..., -1] == 1).all():
        return None
    k, squares = call.k[..., :-1].float(), call.k[..., -1].float()
    if not torch.allclose(squares, -k.square().sum(-1), rtol=0.02, atol=1e-6):
        return None
    return call.scale * (call.q[..., :-1].float() / 2).square().sum(-1).max().item()


def _scale(call: Call) -> float | None:
    """s; where softmax is written out what the module has as such, or 1 / sqrt(d1). None where d1 is not known."""
    if isinstance(call, FusedCall):
        return abs(call.scale)
    attention: Any = call.site.module
    own = [x for name in ("scaling", "scale") if isinstance(x := getattr(attention, name, None), float)]
    rows = _rows(attention).get("q")
    return abs(own[0]) if own else None if rows is None else rows.shape[1] ** -0.5


def _rows(attention: nn.Module) -> dict[str, Tensor]:
    places = query_and_key_places(attention).items()
    return {role: x for held, at in places for role, x in (rows_of(attention, held, matrix_shape(*at)) or {}).items()}


def _of_role(role: str, norms: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The norms of queries or of keys, by the names that `find_qk_norms` knows, in which "qk" is both."""
    parts = {name: name.rpartition(".")[2].replace("query", "q").replace("key", "k").split("_") for name in norms}
    return {name: norms[name] for name, found in parts.items() if {role, "qk"} & set(found)}


def _greatest_length(norm: nn.Module, given: Input, heads: tuple[int | None, int | None]) -> float:
    """max |norm(x)| over all x, or inf where there is none; found by what the module does, whatever its class.

    norm(x) = gamma * z + beta with |z| = sqrt(d) has at most the length max |sqrt(d) gamma_j| + |beta|. With the unit vectors
    e_i as x, column j of the matrix norm(c e_i) - beta has the length sqrt(d) |gamma_j|, for RMSNorm and for LayerNorm.
    """
    width = given.shape[-1]
    eye = torch.eye(width, dtype=given.like.dtype, device=given.like.device)
    # Each head may have a norm of its own.
    probe = eye.view(width, *[1] * (len(given.shape) - 2), width)
    probe = probe.expand(width, *[n if n in heads else 1 for n in given.shape[1:-1]], width)
    try:
        beta = norm.forward(0 * probe).float().nan_to_num()
        near, far = (norm.forward(c * probe).float() - beta for c in (2.0**5, 2.0**10))
    except (RuntimeError, ValueError, TypeError):
        return math.inf  # it takes other shapes alone; whether logits grow is seen all the same
    columns = torch.linalg.vector_norm(far, dim=0)
    if not torch.allclose(near, far, rtol=0.02, atol=0.02 * columns.max().item()):
        return math.inf  # it grows with x
    return (columns.max() + torch.linalg.vector_norm(beta, dim=-1).max()).item()


def _reparametrised(call: Call, inputs: Mapping[nn.Module, Input]) -> dict[str, float]:
    """The greatest lengths {"q": ..., "k": ...} of queries and keys over all heads, where σReparam makes their weights."""
    attention, lengths = call.site.module, {}
    for held, (layer, tensor) in query_and_key_places(attention).items():
        chain, rows = chain_of(layer, tensor), rows_of(attention, held, matrix_shape(layer, tensor))
        if chain is None or not is_sigma_reparam(chain) or rows is None or "q_shared" in rows:
            return {}
        for role in rows.keys() & {"q", "k"}:
            x, own = _longest_input(call, layer, role, inputs), rows[role].flatten()
            bias = layer.in_proj_bias if isinstance(layer, nn.MultiheadAttention) else getattr(layer, "bias", None)
            if isinstance(layer, nn.MultiheadAttention) and held != "qkv":
                own = own + "qkv".index(role) * layer.embed_dim  # one bias for the three weights
            biases = [] if bias is None else [bias[own.to(bias.device)]]
            biases += [b for which, b in own_biases(attention) if which == role]
            length = _gamma(chain, rows[role].flatten()) * x
            lengths[role] = length + sum(torch.linalg.vector_norm(b.detach().float()).item() for b in biases)
    return lengths


def _longest_input(call: Call, layer: nn.Module, role: str, inputs: Mapping[nn.Module, Input]) -> float:
    """The longest token that a projection is given: by the layer's call, or by the attention's arguments."""
    if layer in inputs and layer is not call.site.module:
        return inputs[layer].longest
    given = call.site.arguments()
    x = next((x for name in ROLES[role] if isinstance(x := given.get(name), Tensor)), None)
    return math.inf if x is None else Input.of(x).longest


def _gamma(chain: Any, rows: Tensor) -> float:
    """The largest |gamma| over the blocks that some rows of a weight are in."""
    leader, index = chain[0].leader(), chain[0].layout().index
    before = sum(W.shape[1 if leader.transposed else 0] for W in leader.originals()[:index])
    ends = torch.tensor(leader.rows).cumsum(0)
    return leader.gamma.detach().abs()[torch.bucketize(rows + before, ends, right=True).unique()].max().item()
