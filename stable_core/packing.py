"""How attention modules name their query, key and value projections, and how those lie where one weight packs all three.

The one table of it: `sigma_reparam` cuts by it, and the monitor reads by it.
"""

from torch import nn

# Three layers, or packed in one.
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
PACKED_QKV_NAMES = ("in_proj_weight", "qkv", "c_attn", "qkv_proj", "Wqkv", "to_qkv")

HEADS_NAMES = ("num_heads", "n_head", "n_heads", "num_attention_heads", "heads")
KEY_HEADS_NAMES = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_kv_heads", "kv_heads")
# Attention that packs head by head, or several heads after several, by its class; of timm's and transformers'.
MIXED_CLASSES = ("CodeGenAttention", "GPTBigCodeAttention", "MiniMaxLightningAttention")


def num_heads(attention: nn.Module) -> int | None:
    """How many heads an attention module says it has."""
    return _first_number(attention, HEADS_NAMES)


def in_thirds(attention: nn.Module, out_features: int, in_features: int) -> bool:
    """Whether the rows of its packed weight (out, in) are [Wq; Wk; Wv], each (in, in), one after the other.

    The shape alone does not say: rows may lie head by head, and grouped queries can make it up by chance.
    """
    if out_features != 3 * in_features or getattr(attention, "head_first", False):
        return False
    if hasattr(attention, "key_dim") and hasattr(attention, "val_dim"):  # LeViT and those after it: head by head
        return False
    if any(cls.__name__ in MIXED_CLASSES for cls in type(attention).__mro__):
        return False
    owners = [owner for owner in (attention, getattr(attention, "config", None)) if owner is not None]
    heads, key_heads = (
        next((n for owner in owners if (n := _first_number(owner, names)) is not None), None)
        for names in (HEADS_NAMES, KEY_HEADS_NAMES)
    )
    return key_heads is None or heads in (None, key_heads)


def _first_number(owner, names: tuple[str, ...]) -> int | None:
    return next((n for name in names if isinstance(n := getattr(owner, name, None), int)), None)
