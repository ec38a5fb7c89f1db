"""The keywords that a model's `forward` takes: those of its signature, and those that transformers hands to every model."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# What transformers calls the cache in outputs: "cache" since 5.24, and "past_key_values" before.
CACHE = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))

FROM_TRANSFORMERS = frozenset({
    "num_items_in_batch", "shift_labels",  # Trainer, for the loss
    "output_attentions", "output_hidden_states", "return_dict",  # its decorators, which act on them
    "is_causal", "debug_io", "debug_io_dir", "prune_layers",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",  # its collators, for flash attention
    "use_cache", "cache_position",  # generation, also to models and parts that have no cache: they say nothing new
})  # fmt: skip


def known_keywords(forward: Callable) -> Callable:
    """Decorates a `forward(..., **kwargs)`: it refuses unknown keywords, and takes the cache by both of its names.

    Raises:
        TypeError, when it is called: a keyword that is neither in the signature nor in `FROM_TRANSFORMERS`; both `cache`
            and `past_key_values`.
    """
    named = tuple(name for name, p in inspect.signature(forward).parameters.items() if p.kind is not p.VAR_KEYWORD)[1:]
    known = FROM_TRANSFORMERS.union(named)

    @wraps(forward)
    def checked(self, *args, **kwargs):
        if "cache" in kwargs and "past_key_values" in named:
            if kwargs.get("past_key_values") is not None:
                raise TypeError(f"{type(self).__name__}: give one of cache and past_key_values, which are the same")
            kwargs["past_key_values"] = kwargs.pop("cache")
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__} has no keyword {name!r}: allowed are {', '.join(named)}, and of transformers "
                    f"{', '.join(sorted(FROM_TRANSFORMERS.difference(named)))}"
                )
        return forward(self, *args, **kwargs)

    return checked


def check_cache(model: PreTrainedModel, cache: Cache | None, past: int | torch.Tensor, length: int) -> None:
    """Looks at a cache of `past` tokens that gets `length` more.

    Raises:
        ValueError: a layer of it has a sliding window shorter than that, where the model attends to every token; or layers
            are checkpointed, and would fill it a second time.
    """
    if cache is None:
        return
    if getattr(model, "gradient_checkpointing", False) and model.training and torch.is_grad_enabled():
        raise ValueError("a cache under gradient checkpointing: allowed is none, or gradient_checkpointing_disable()")
    for layer in cache.layers:
        if getattr(layer, "is_sliding", False):
            window = getattr(layer, "sliding_window", None) or layer.max_cache_len
            if past + length > window:
                raise ValueError(
                    f"a sequence of {past + length} tokens: the cache's sliding window keeps {window}, and "
                    f"{type(model).__name__} attends to all; allowed are caches without one"
                )
