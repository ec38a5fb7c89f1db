"""Finds the query, key, value and output projections of an attention module, and the rows of each head in their weights.

This is the only catalogue of such names: `sigma_reparam` uses it to cut packed weights, QK-clip to scale heads, the monitor to
name what it reads. An attention with other names, or with another order of rows, is added here and nowhere else.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# Queries, keys and values in three layers.
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
# Queries in one layer, keys and values packed in another.
KEY_VALUE_NAMES = (
    ("q_attn", "c_attn"),  # GPT-2's cross-attention
    ("q", "kv"),
    ("to_q", "to_kv"),
    ("q_proj", "kv_proj"),
    ("q_b_proj", "kv_b_proj"),  # latent attention (DeepSeek's MLA), whose queries are projected down and up
    ("q_proj", "kv_b_proj"),  # latent attention, whose queries have one projection
)
# Queries, keys and values packed in one layer, as [q; k; v].
PACKED_QKV_NAMES = ("in_proj_weight", "qkv", "c_attn", "qkv_proj", "Wqkv", "to_qkv")
# Packed in one layer, under a name that different models use for different orders of rows: known for the classes below only.
MIXED_QKV_NAMES = ("query_key_value",)
OUT_NAMES = ("out_proj", "o_proj", "proj", "c_proj", "to_out", "out_lin", "o", "wo", "Wo", "output", "dense")

HEADS_NAMES = ("num_heads", "n_head", "n_heads", "num_attention_heads", "heads")
KEY_HEADS_NAMES = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_kv_heads", "kv_heads")

# Classes of transformers that pack rows by key head: for each, the query heads that share it, then itself, then its value head.
BY_KEY_HEAD = (
    "BloomAttention",
    "FalconAttention",
    "GPTBigCodeAttention",
    "GPTNeoXAttention",
    "GPTNeoXJapaneseAttention",
    "MiniMaxLightningAttention",
    "PersimmonAttention",
)
# CodeGen packs four parts, one for each device that it was trained on: a fourth of the queries, of the values, of the keys.
CODEGEN, CODEGEN_PARTS = "CodeGenAttention", 4

# Modules that normalise queries or keys between their projection and the logits.
QK_NORM = re.compile(r"(q|k|qk|query|key)_(layer_?)?norms?|(q|k)_ln|(ln|norm)_(q|k|query|key)")
COSINE = ("logit_scale", "temperature")  # learned factor of the cosine q.k / (|q| |k|), as in Swin V2
# Modules and arguments that add a bias to the logits, which may be as large as q.k: ALiBi, T5's relative positions.
ADDED_BIAS = ("alibi", "position_bias", "relative_attention_bias")
# Biases of q and k that are parameters of the attention itself, as in BEiT; bias_k is an extra key (add_bias_kv).
OWN_BIASES = (("q", "q_bias"), ("k", "k_bias"), ("k", "bias_k"))

Place = tuple[nn.Module, str]  # a layer and the name of its weight


def find_projections(attention: nn.Module) -> dict[str, Place]:
    """The projections by what they hold: q, k and v, or q and kv, or qkv. Empty where the attention is not known."""
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
    """The output projection, in the attention module or, as in BERT, in its parent. None where there is no known name."""
    for owner in (attention,) if parent is None else (attention, parent):
        for name in OUT_NAMES:
            if (place := _place(owner, name)) is not None:
                return place
    return None


def num_heads(attention: nn.Module) -> int | None:
    """The number of query heads, read from the attention module or else from its `config`; None where neither has it."""
    return _first_number(attention, HEADS_NAMES)


def num_key_heads(attention: nn.Module) -> int | None:
    """The number of key and value heads, which is smaller than that of query heads in grouped-query attention."""
    return _first_number(attention, KEY_HEADS_NAMES) or num_heads(attention)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer's weight is (in, out), which is so in transformers' Conv1D: y = x W + b."""
    return any(cls.__name__ == "Conv1D" for cls in type(layer).__mro__)


def find_qk_norms(attention: nn.Module) -> list[str]:
    """Names of modules and parameters that normalise queries or keys, so that logits do not scale with W_q and W_k."""
    norms = [name for name, module in attention.named_modules() if not isinstance(module, nn.Identity)]
    found = [name for name in norms if QK_NORM.fullmatch(name.rpartition(".")[2])]
    return found + [name for name in COSINE if isinstance(attention._parameters.get(name), Tensor)]


def find_added_biases(attention: nn.Module, arguments: dict[str, object]) -> list[str]:
    """Names of biases added to the logits, among the attention's modules and the `arguments` of its forward pass."""
    present = {name for name, value in arguments.items() if isinstance(value, Tensor)} | attention._modules.keys()
    return [name for name in ADDED_BIAS if name in present]


def own_biases(attention: nn.Module) -> list[tuple[str, Tensor]]:
    """("q" or "k", bias) for each bias that is a parameter of the attention itself and not of its projections."""
    found = [(role, getattr(attention, name, None)) for role, name in OWN_BIASES]
    return [(role, bias) for role, bias in found if isinstance(bias, Tensor)]


def chain_of(layer: nn.Module, tensor: str) -> Any:
    """torch's ParametrizationList of a weight, which holds its parametrizations and originals; None for a plain weight."""
    parametrizations: Any = layer._modules.get("parametrizations")
    return parametrizations[tensor] if parametrize.is_parametrized(layer, tensor) else None


def matrix_shape(layer: nn.Module, tensor: str) -> tuple[int, int]:
    """The shape (out, in) of a weight seen as a matrix; a convolution's kernel is flattened into `in`."""
    first, *rest = list(_shape(layer, tensor) or ())
    return (rest[0], first) if is_transposed(layer) else (first, math.prod(rest))


def rows_of(attention: nn.Module, held: str, shape: Sequence[int]) -> dict[str, Tensor] | None:
    """The rows of a weight W (out, in) that belong to each head of each projection in W; None where this is not known.

    Args:
        attention: the module around the weight.
        held: what the weight holds, a key of `find_projections`: "q", "k", "v", "kv" or "qkv".
        shape: of W as (out, in).

    Returns:
        Row numbers {"q": (heads, head_dim), "k": (key_heads, head_dim), "v": (key_heads, value_dim)} of the projections
        that W holds. In latent attention "q" are the features multiplied with the head's own keys, and "q_shared" those
        multiplied with the rotary key that all heads share. Where the number of heads is not known, all rows are one head.
    """
    packing = _packing(attention, held, *shape)
    if packing is None:
        return None
    groups, sizes = packing
    parts = torch.arange(shape[0], device="cpu").view(groups, -1).split(list(sizes.values()), dim=1)
    return {role: _by_head(attention, role, part) for role, part in zip(sizes, parts, strict=True)}


def equal_blocks(attention: nn.Module, held: str, shape: Sequence[int]) -> tuple[str, ...]:
    """The projections in W (out, in), in order, if W is square blocks (in, in) of one projection each; else (held,).

    The shape (3 in, in) does not prove it: rows may be packed by head, and grouped queries may have this shape by chance.
    """
    groups, sizes = _packing(attention, held, *shape) or (0, {})
    return tuple(sizes) if groups == 1 and set(sizes.values()) == {shape[1]} and set(sizes) == set(held) else (held,)


def _packing(attention: nn.Module, held: str, out: int, width: int) -> tuple[int, dict[str, int]] | None:
    """(groups, {projection: rows}): W is `groups` repetitions of these rows, in this order. None where it is not known."""
    heads, key_heads = num_heads(attention), num_key_heads(attention)
    if (dims := _dims(attention)) and held in ("q", "kv", "qkv"):  # rows are packed by head
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
    """{projection: rows per head} of attentions with attributes for it: latent attention, LeViT and its successors; else {}."""
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
    """The shape of a weight, read off the original where it is parametrized: its forward pass may have side effects."""
    if (parts := chain_of(layer, name)) is not None:
        return (parts.original if parts.is_tensor else parts.original1).shape
    weight = layer._parameters.get(name, layer.__dict__.get(name))
    return weight.shape if isinstance(weight, Tensor) else None


def _first_number(attention: nn.Module, names: tuple[str, ...]) -> int | None:
    owners = (attention, getattr(attention, "config", None))
    return next((n for owner in owners for name in names if isinstance(n := getattr(owner, name, None), int)), None)
