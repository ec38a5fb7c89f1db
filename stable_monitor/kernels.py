"""The kernels that torch does not dispatch, by the names of their functions, and how their arguments are read.

flash-attn (2, 3 and 4, from its package or a hub of kernels), xformers, torch's FlexAttention and attention of sequences that
lie one after the other. All of them are recognised by name and parameters, so that no package is imported.
"""

import inspect
import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .kernel_calls import Arguments, Kernel, Scores
from .rules import alibi, flex, in_order, masked, softcap, window

# Arguments that change what is computed in ways that are not read here, and their values that do not.
NOT_READ = ("qv", "attention_chunk", "block_table", "page_table", "seqused_q", "seqused_k", "leftpad_k")
STARTS = (("cu_seqlens_q", "cu_seqlens_k"), ("cu_seq_q", "cu_seq_k"), ("cu_seqlens", "cu_seqlens"))
SINKS = ("s_aux", "learnable_sink")


def find_kernel(function: Any) -> Kernel | None:
    """How the arguments of a function are read; None for one that is no kernel."""
    read = BY_NAME.get(getattr(function, "__name__", ""))
    if read is None:
        return None
    kernel, needed = read
    try:
        names = inspect.signature(function).parameters.keys()
    except (TypeError, ValueError):
        return None
    return kernel if needed <= names else None


def by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """All arguments of a call by name, also those in its **kwargs."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    rest = next((name for name, p in signature.parameters.items() if p.kind == inspect.Parameter.VAR_KEYWORD), None)
    others = bound.arguments.pop(rest) if rest else {}
    return {**bound.arguments, **others}


# ------------------------------------------------------------------------------------------------------------ flash-attn


def _read_flash(given: Arguments) -> list[Scores]:
    for name in NOT_READ:
        if isinstance(given.get(name), Tensor) or given.get(name):
            raise ValueError(f"{name} is given, which is not read; name the module's queries and keys in attention=")
    q, k = _queries_and_keys(given)
    scale = given.get("softmax_scale", given.get("scale"))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    slopes = given.get("alibi_slopes")

    def scores(q: Tensor, k: Tensor, slopes: Tensor | None) -> Scores:
        ahead = k.shape[1] - q.shape[1]  # the last query sees up to the last key
        rule = in_order(softcap(given.get("softcap")), alibi(slopes, ahead), window(ahead, *_sides(given)))
        return Scores(q.transpose(1, 2), k.transpose(1, 2), scale, rule, _sinks(given))

    starts = next(
        ([given[name] for name in names] for names in STARTS if isinstance(given.get(names[0]), Tensor)), None
    )
    if starts is None:
        return [scores(q, k, slopes)]
    return [
        scores(q[None], k[None], slopes[i] if slopes is not None and slopes.ndim == 2 else slopes)
        for i, (q, k) in enumerate(_cut(q, k, *(start.tolist() for start in starts)))
        if q.numel()
    ]


def _flash_at(given: Arguments, tau: float) -> Arguments:
    scale = "softmax_scale" if "softmax_scale" in given else "scale"
    q, _ = _queries_and_keys(given)
    changed = {scale: (q.shape[-1] ** -0.5 if given[scale] is None else given[scale]) / tau}
    for name in ("softcap", "alibi_slopes", *SINKS):
        if isinstance(given.get(name), Tensor) or given.get(name):
            changed[name] = given[name] / tau
    return {**given, **changed}


def _queries_and_keys(given: Arguments) -> tuple[Tensor, Tensor]:
    if "qkv" in given:
        q, k, _ = given["qkv"].unbind(-3)
        return q, k
    q = given["q"] if "q" in given else given["query"]
    if "kv" in given:
        return q, given["kv"].unbind(-3)[0]
    return q, given["k"] if "k" in given else given["key"]


def _sides(given: Arguments) -> tuple[int | None, int | None]:
    """How far a query sees to the left and to the right; None without a limit, which flash-attn writes as -1 or None."""
    left, right = (None if side is None or side < 0 else side for side in given.get("window_size") or (None, None))
    return left, 0 if given.get("causal") else right


def _sinks(given: Arguments) -> Tensor | None:
    return next((given[name] for name in SINKS if isinstance(given.get(name), Tensor)), None)


def _cut(q: Tensor, k: Tensor, q_starts: list[int], k_starts: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Sequences that lie one after the other in the first dimension, by where each begins and the last one ends."""
    ends = zip(pairwise(q_starts), pairwise(k_starts), strict=True)
    return [(q[first:last], k[start:end]) for (first, last), (start, end) in ends]


# -------------------------------------------------------------------------------------------------------------- xformers


def _read_xformers(given: Arguments) -> list[Scores]:
    q, k, bias = given["query"], given["key"], given["attn_bias"]
    scale = q.shape[-1] ** -0.5 if given.get("scale") is None else given["scale"]
    kind = type(bias).__name__
    if kind in ("BlockDiagonalMask", "BlockDiagonalCausalMask"):  # sequences one after the other, in a batch of one
        rule = window(0, None, 0 if kind == "BlockDiagonalCausalMask" else None)
        parts = _cut(q[0], k[0], bias.q_seqinfo.seqstart_py, bias.k_seqinfo.seqstart_py)
        return [Scores(*_heads_first(q[None], k[None]), scale, rule) for q, k in parts if q.numel()]
    q, k = _heads_first(q, k)
    if kind == "LowerTriangularMask":
        rule = window(0, None, 0)
    elif isinstance(bias, Tensor) or bias is None:
        rule = masked(bias if bias is None or given["query"].ndim > 3 else bias[:, None])
    else:
        rule = masked(_dense(bias, q, k))
    return [Scores(q, k, scale, rule)]


def _xformers_at(given: Arguments, tau: float) -> Arguments:
    q, bias = given["query"], given["attn_bias"]
    scale = q.shape[-1] ** -0.5 if given.get("scale") is None else given["scale"]
    if isinstance(bias, Tensor):
        bias = (bias / tau).clamp(min=torch.finfo(bias.dtype).min)
    elif bias is not None:
        dense = _dense(bias, *_heads_first(q, given["key"]))
        if ((dense != 0) & (dense > -math.inf)).any():
            raise ValueError(
                f"attn_bias = {type(bias).__name__}: its values cannot be divided by a temperature; give them as a tensor"
            )
    return {**given, "scale": scale / tau, "attn_bias": bias}


def _heads_first(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, tokens, heads, dim), (batch, tokens, dim) or (batch, tokens, key heads, queries of each, dim), heads moved."""
    if q.ndim == 3:
        return q[:, None], k[:, None]
    if q.ndim == 5:
        q, k = (x.flatten(2, 3) for x in (q, k.expand(*k.shape[:2], *q.shape[2:4], k.shape[-1])))
    return q.transpose(1, 2), k.transpose(1, 2)


def _dense(bias: Any, q: Tensor, k: Tensor) -> Tensor:
    return bias.materialize((*q.shape[:3], k.shape[2]), dtype=torch.float32, device=q.device)


# -------------------------------------------------------------------------------------------------- FlexAttention, torch


def _read_flex(given: Arguments) -> list[Scores]:
    q, k = given["query"], given["key"]
    scale = q.shape[-1] ** -0.5 if given.get("scale") is None else given["scale"]
    return [Scores(q, k.expand(q.shape[0], -1, -1, -1), scale, flex(given.get("score_mod"), given.get("block_mask")))]


def _flex_at(given: Arguments, tau: float) -> Arguments:
    score_mod = given.get("score_mod")

    def colder(score: Tensor, *where: Tensor) -> Tensor:
        return (score if score_mod is None else score_mod(score, *where)) / tau

    return {**given, "score_mod": colder}


def _read_nested(given: Arguments) -> list[Scores]:
    q, k = given["query"], given["key"]
    scale = q.size(-1) ** -0.5 if given["scale"] is None else given["scale"]
    rule = window(0, None, 0 if given["is_causal"] else None)
    return [Scores(one[None], other[None], scale, rule) for one, other in zip(q.unbind(), k.unbind(), strict=True)]


def _nested_at(given: Arguments, tau: float) -> Arguments:
    scale = given["query"].size(-1) ** -0.5 if given["scale"] is None else given["scale"]
    return {**given, "scale": scale / tau}


FLASH, XFORMERS, FLEX = (
    Kernel(_read_flash, _flash_at),
    Kernel(_read_xformers, _xformers_at),
    Kernel(_read_flex, _flex_at),
)
NESTED = Kernel(_read_nested, _nested_at)  # scaled_dot_product_attention of nested and jagged tensors
BY_NAME: dict[str, tuple[Kernel, set[str]]] = {  # with parameters that tell it from others of that name
    "flash_attn_func": (FLASH, {"q", "k", "softmax_scale"}),
    "flash_attn_varlen_func": (FLASH, {"q", "k", "softmax_scale"}),
    "flash_attn_qkvpacked_func": (FLASH, {"qkv", "softmax_scale"}),
    "flash_attn_varlen_qkvpacked_func": (FLASH, {"qkv", "softmax_scale"}),
    "flash_attn_kvpacked_func": (FLASH, {"q", "kv", "softmax_scale"}),
    "flash_attn_varlen_kvpacked_func": (FLASH, {"q", "kv", "softmax_scale"}),
    "varlen_attn": (FLASH, {"query", "key", "cu_seq_q", "cu_seq_k", "scale"}),  # torch's
    "memory_efficient_attention": (XFORMERS, {"query", "key", "attn_bias"}),
    "flex_attention": (FLEX, {"query", "key", "score_mod", "block_mask"}),
    "compile_friendly_flex_attention": (
        FLEX,
        {"query", "key", "kwargs"},
    ),  # transformers': calls a compiled flex_attention
}
