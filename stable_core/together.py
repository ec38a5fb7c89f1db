"""Computes sigma of all weights of a model in three kernel launches on a GPU, instead of three for each layer.

Each layer asks for its sigma in its forward pass, as its weight may have changed just before. When the first layer asks, sigma
is computed for all layers. Each layer uses its result once, in its next forward pass; results not used are dropped at the next
backward pass or change of u. So no result is older than the forward pass that uses it, and it is bitwise what the layer would
find by itself (kernels.py).
"""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .kernels import Measured, Place, Plan, keep_if_captured, measure_all, plan
from .sharding import is_sharded

if TYPE_CHECKING:
    from .sigma_reparam import SigmaReparam


class Batch:
    """What was measured of several weights, and on which CUDA stream. All their sigmas are read off the GPU at once."""

    def __init__(self, found: list[Measured], stream: int) -> None:
        self.found, self.stream = found, stream
        self._sigmas: list[float] | None = None

    def sigma(self, index: int) -> list[float]:
        """sigma of each block of one weight."""
        if self._sigmas is None:
            self._sigmas = torch.cat([measured.s for measured in self.found]).tolist()
        start = sum(len(measured.s) for measured in self.found[:index])
        return self._sigmas[start : start + len(self.found[index].s)]


class Together:
    """Batches the layers of one `sigma_reparam` call that are used in training, in the order in which they first were."""

    def __init__(self) -> None:
        self._first: int | None = None  # id of the layer whose `take` measures all
        self._layers: dict[int, weakref.ref[SigmaReparam]] = {}
        self._ready: dict[
            int, tuple[tuple[Any, ...], Batch, int]
        ] = {}  # layer -> (its `place`, batch, index in the batch)
        self._plan: tuple[tuple[Place, ...], Plan] | tuple[None, None] = (None, None)
        self._misses = 0  # calls of `take` without a result since the last batch

    def __reduce__(self) -> tuple[Any, ...]:
        return Together, ()  # a copy of the model starts with an empty one

    def drop(self) -> None:
        """Drops results that were not used."""
        self._ready.clear()

    def take(self, layer: "SigmaReparam", W: Tensor) -> tuple[Batch | None, int]:
        """(batch, index in it) with the result for this layer, whose weight is W; (None, 0): it must measure by itself."""
        # Activation checkpointing runs layers again in the backward pass, in another order.
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return None, 0
        mine = id(layer)
        if mine == self._first and _is_plain(layer, W):
            self._measure(W)
        state, batch, index = self._ready.pop(mine, (None, None, 0))
        # A result from another stream may not be computed yet.
        if batch is not None and state == layer.place(W) and batch.stream == _stream(W):
            return batch, index
        if _is_plain(layer, W):
            self._missed(layer)
        return None, 0

    def _missed(self, layer: "SigmaReparam") -> None:
        self._misses += 1
        if self._misses > 4 * len(self._layers) + 4:
            self._layers.clear()  # the first layer was frozen, or is not called any more: choose another
            self._misses = 0
        if not self._layers:
            self._first = id(layer)
        self._layers[id(layer)] = weakref.ref(layer)

    def _measure(self, like: Tensor) -> None:
        self.drop()
        self._misses = 0
        layers, states = [], []
        for key, link in list(self._layers.items()):
            layer = link()
            W = None if layer is None else layer.lone_weight()
            if layer is None or W is None:
                del self._layers[key]
            elif is_sharded(W):
                return  # a sharded weight is gathered in its own layer's pass only
            elif W.dtype == like.dtype and W.device == like.device and _is_plain(layer, W) and layer.takes_kernels(W):
                layers.append(key)
                states.append(layer.place(W))
        if len(layers) < 2:
            return
        places = tuple([state[0] for state in states])
        if self._plan[0] != places:
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                return  # making a plan waits for the GPU, which is not allowed during capture
            self._plan = places, plan(places, like.device, like.dtype)
        keep_if_captured(self._plan[1])
        batch = Batch(measure_all(self._plan[1], like.dtype), _stream(like))
        self._ready = {key: (state, batch, i) for i, (key, state) in enumerate(zip(layers, states, strict=True))}


def _is_plain(layer: "SigmaReparam", W: Tensor) -> bool:
    """Whether W is a contiguous parameter that learns, in a layer that is in training."""
    return (
        layer.training
        and type(W) is nn.Parameter
        and W.requires_grad
        and W.is_leaf
        and W.is_contiguous()
        and layer.gamma.dtype == torch.float32
    )


def _stream(W: Tensor) -> int:
    return torch._C._cuda_getCurrentRawStream(W.get_device()) if W.is_cuda else 0
