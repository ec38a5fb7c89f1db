"""Which layers an attention module projects with, what they are called, and where the rows of each head lie in them.

The one catalogue of it: `sigma_reparam` cuts packed weights by it, QK-clip scales heads by it, and the monitor reads by it.
An attention that keeps its weights under other names, or packs them in another way, is added here and nowhere else.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# Three layers.
QKV_NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
    ("linear_q", "linear_k", "linear_v"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_proj_weight", "k_proj_weight", "v_proj_weight"),
)
# Queries by themselves, keys and values packed in one.
KEY_VALUE_NAMES = (
    ("q_attn", "c_attn"),  # GPT-2's cross-attention
    ("q", "kv"),
    ("to_q", "to_kv"),
    ("q_proj", "kv_proj"),
    ("q_b_proj", "kv_b_proj"),  # latent attention (DeepSeek's MLA), with and without a latent of the queries
    ("q_proj", "kv_b_proj"),
)
# All packed in one.
PACKED_QKV_NAMES = ("in_proj_weight", "qkv", "c_attn", "qkv_proj", "Wqkv", "to_qkv")
# The same, under a name that says nothing of how: its rows are known for the classes below alone.
MIXED_QKV_NAMES = ("query_key_value",)
OUT_NAMES = ("out_proj", "o_proj", "proj", "c_proj", "to_out", "out_lin", "o", "wo", "Wo", "output", "dense")

HEADS_NAMES = ("num_heads", "n_head", "n_heads", "num_attention_heads", "heads")
KEY_HEADS_NAMES = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_kv_heads", "kv_heads")

# Classes of transformers that pack key head by key head: the queries that share one, the key, its value.
BY_KEY_HEAD = (
    "BloomAttention",
    "FalconAttention",
    "GPTBigCodeAttention",
    "GPTNeoXAttention",
    "GPTNeoXJapaneseAttention",
    "MiniMaxLightningAttention",
    "PersimmonAttention",
)
# CodeGen was trained on four devices, each with a fourth of the queries, of the values and of the keys, in this order.
CODEGEN, CODEGEN_PARTS = "CodeGenAttention", 4

# What stands between the projections and the logits.
QK_NORM = re.compile(r"(q|k|qk|query|key)_(layer_?)?norms?|(q|k)_ln|(ln|norm)_(q|k|query|key)")
COSINE = ("logit_scale", "temperature")  # learned, of q.k over their lengths, as in Swin V2
# What is added to the logits and may be as large as they are, by the names of modules and arguments: ALiBi, T5's positions.
ADDED_BIAS = ("alibi", "position_bias", "relative_attention_bias")
# Biases that the attention keeps itself (BEiT), or a key that it adds to all (add_bias_kv).
OWN_BIASES = (("q", "q_bias"), ("k", "k_bias"), ("k", "bias_k"))

Place = tuple[nn.Module, str]  # a layer and the name of its weight


def find_projections(attention: nn.Module) -> dict[str, Place]:
    """Where each projection is: q, k and v, or q and kv, or qkv, as they are packed. Empty: no attention that is known."""
    for names in KEY_VALUE_NAMES:
        if places := _places(attention, ("q", "kv"), names):
            return places
    for name in PACKED_QKV_NAMES + MIXED_QKV_NAMES:
        if places := _places(attention, ("qkv",), (name,)):
            return places
    for three in QKV_NAMES:
        if places := _places(attention, ("q", "k", "v"), three):
            return places
    return {}


def find_output(attention: nn.Module, parent: nn.Module | None) -> Place | None:
    """The output projection: the attention module's own, or, as in BERT, that of the module around it."""
    for owner in (attention,) if parent is None else (attention, parent):
        for name in OUT_NAMES:
            if (place := _place(owner, name)) is not None:
                return place
    return None


def num_heads(attention: nn.Module) -> int | None:
    """How many heads an attention module, or else its configuration, says it has."""
    return _first_number(attention, HEADS_NAMES)


def num_key_heads(attention: nn.Module) -> int | None:
    """How many heads its keys and values have: fewer than its queries have where several of those share one."""
    return _first_number(attention, KEY_HEADS_NAMES) or num_heads(attention)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer keeps its weight as (in, out): transformers' Conv1D, y = x W + b."""
    return any(cls.__name__ == "Conv1D" for cls in type(layer).__mro__)


def find_qk_norms(attention: nn.Module) -> list[str]:
    """Names of what normalises its queries and keys, after which their size is not that of W_q and W_k."""
    norms = [name for name, module in attention.named_modules() if not isinstance(module, nn.Identity)]
    found = [name for name in norms if QK_NORM.fullmatch(name.rpartition(".")[2])]
    return found + [name for name in COSINE if isinstance(attention._parameters.get(name), Tensor)]


def find_added_biases(attention: nn.Module, arguments: dict[str, object]) -> list[str]:
    """Names of what it adds to its logits, of its own or from the arguments of its forward pass."""
    present = {name for name, value in arguments.items() if isinstance(value, Tensor)} | attention._modules.keys()
    return [name for name in ADDED_BIAS if name in present]


def own_biases(attention: nn.Module) -> list[tuple[str, Tensor]]:
    """("q" or "k", bias) of those biases that no layer has."""
    found = [(role, getattr(attention, name, None)) for role, name in OWN_BIASES]
    return [(role, bias) for role, bias in found if isinstance(bias, Tensor)]


def chain_of(layer: nn.Module, tensor: str) -> Any:
    """torch's list of the parametrizations that make a weight, with its originals; None where the weight is plain."""
    parametrizations: Any = layer._modules.get("parametrizations")
    return parametrizations[tensor] if parametrize.is_parametrized(layer, tensor) else None


def matrix_shape(layer: nn.Module, tensor: str) -> tuple[int, int]:
    """(out, in) of a weight; a convolution's kernel is in `in`."""
    first, *rest = list(_shape(layer, tensor) or ())
    return (rest[0], first) if is_transposed(layer) else (first, math.prod(rest))


def rows_of(attention: nn.Module, held: str, shape: Sequence[int]) -> dict[str, Tensor] | None:
    """Which rows of a weight W (out, in) make each head of each projection that W holds; None where that is not known.

    Args:
        attention: the module around the weight.
        held: what the weight holds, a key of `find_projections`: "q", "k", "v", "kv" or "qkv".
        shape: of W as (out, in).

    Returns:
        {"q": (heads, head_dim), "k": (key_heads, head_dim), "v": (key_heads, value_dim)}, row numbers, of those that are
        held. In latent attention "q" is the part of the queries that meets the head's own keys, and "q_shared" that which
        meets the rotary key that all heads share. Where the number of heads is not known, all rows are as one head.
    """
    packing = _packing(attention, held, *shape)
    if packing is None:
        return None
    groups, sizes = packing
    parts = torch.arange(shape[0], device="cpu").view(groups, -1).split(list(sizes.values()), dim=1)
    return {role: _by_head(attention, role, part) for role, part in zip(sizes, parts, strict=True)}


def equal_blocks(attention: nn.Module, held: str, shape: Sequence[int]) -> tuple[str, ...]:
    """The projections of W (out, in) if each is a block (in, in) of it, one after the other in this order; else (held,).

    The shape alone does not say: rows may lie head by head, and grouped queries can make it up by chance.
    """
    groups, sizes = _packing(attention, held, *shape) or (0, {})
    return tuple(sizes) if groups == 1 and set(sizes.values()) == {shape[1]} and set(sizes) == set(held) else (held,)


def _packing(attention: nn.Module, held: str, out: int, width: int) -> tuple[int, dict[str, int]] | None:
    """How many times the same pattern of rows is repeated, and how many rows of which projection follow each other in it."""
    heads, key_heads = num_heads(attention), num_key_heads(attention)
    if (dims := _dims(attention)) and held in ("q", "kv", "qkv"):  # head by head
        sizes = {role: size for role, size in dims.items() if role[0] in held}
        return (heads, sizes) if heads and out == heads * sum(sizes.values()) else None
    if held not in ("kv", "qkv"):
        return 1, {held: out}
    if held == "kv":
        return None if out % 2 else (1, {"k": out // 2, "v": out // 2})
    names = {cls.__name__ for cls in type(attention).__mro__}
    if CODEGEN in names:
        return None if out % (3 * CODEGEN_PARTS) else (CODEGEN_PARTS, dict.fromkeys("qvk", out // 3 // CODEGEN_PARTS))
    by_key_head = getattr(attention, "head_first", False) or not names.isdisjoint(BY_KEY_HEAD)
    if not by_key_head and any(_place(attention, name) for name in MIXED_QKV_NAMES):
        return None
    if not heads or not key_heads or out % (heads + 2 * key_heads):
        return (1, dict.fromkeys("qkv", width)) if out == 3 * width and heads == key_heads and not by_key_head else None
    head_dim = out // (heads + 2 * key_heads)
    groups = key_heads if by_key_head else 1
    if heads % groups:
        return None
    return groups, {
        "q": heads * head_dim // groups,
        "k": key_heads * head_dim // groups,
        "v": key_heads * head_dim // groups,
    }


def _dims(attention: nn.Module) -> dict[str, int]:
    """Rows of each head by projection, where the attention says them: in latent attention, and in LeViT and those after it."""
    for names in (
        {"q": "qk_nope_head_dim", "q_shared": "qk_rope_head_dim", "k": "qk_nope_head_dim", "v": "v_head_dim"},
        {"q": "key_dim", "k": "key_dim", "v": "val_dim"},
    ):
        if all(isinstance(getattr(attention, name, None), int) for name in names.values()):
            return {role: getattr(attention, name) for role, name in names.items()}
    return {}


def _by_head(attention: nn.Module, role: str, rows: Tensor) -> Tensor:
    heads = (num_key_heads if role in ("k", "v") and not _dims(attention) else num_heads)(attention)
    return rows.reshape(heads if heads and rows.numel() % heads == 0 else 1, -1)


def _places(attention: nn.Module, roles: tuple[str, ...], names: tuple[str, ...]) -> dict[str, Place]:
    places = [place for name in names if (place := _place(attention, name)) is not None]
    return dict(zip(roles, places, strict=True)) if len(places) == len(roles) else {}


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
    if (parts := chain_of(layer, name)) is not None:
        return (parts.original if parts.is_tensor else parts.original1).shape
    weight = layer._parameters.get(name, layer.__dict__.get(name))
    return weight.shape if isinstance(weight, Tensor) else None


def _first_number(attention: nn.Module, names: tuple[str, ...]) -> int | None:
    owners = (attention, getattr(attention, "config", None))
    return next((n for owner in owners for name in names if isinstance(n := getattr(owner, name, None), int)), None)
