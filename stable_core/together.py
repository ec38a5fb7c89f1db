"""On a GPU, sigma of all weights of a model in three launches, where each layer by itself would take three.

Each layer asks for its sigma in its forward pass, as its weight may have changed just before without notice. When the first
layer asks, sigma is computed for all. Each layer uses its own once, in its next forward pass, and what is left is dropped with
the next backward pass or change of u. So no sigma is older than the forward pass that uses it, and its bits are those that the
layer would have found by itself (kernels.py).
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
    """What was measured together on a stream; `sigmas` are read off the device once for all."""

    def __init__(self, found: list[Measured], stream: int) -> None:
        self.found, self.stream = found, stream
        self._sigmas: list[float] | None = None

    def sigma(self, index: int) -> list[float]:
        """Of one weight, (blocks,)."""
        if self._sigmas is None:
            self._sigmas = torch.cat([measured.s for measured in self.found]).tolist()
        start = sum(len(measured.s) for measured in self.found[:index])
        return self._sigmas[start : start + len(self.found[index].s)]


class Together:
    """The layers of one `sigma_reparam` call that ask in training, in the order in which they first did."""

    def __init__(self) -> None:
        self._first: int | None = None  # the layer whose question makes a batch
        self._layers: dict[int, weakref.ref[SigmaReparam]] = {}
        self._ready: dict[
            int, tuple[tuple[Any, ...], Batch, int]
        ] = {}  # layer -> (what it is true of, batch, its index there)
        self._plan: tuple[tuple[Place, ...], Plan] | tuple[None, None] = (None, None)
        self._misses = 0  # questions without an answer since the first layer asked

    def __reduce__(self) -> tuple[Any, ...]:
        return Together, ()  # in a copy of the model it starts empty

    def drop(self) -> None:
        """Forgets what was computed and not used."""
        self._ready.clear()

    def take(self, layer: "SigmaReparam", W: Tensor) -> tuple[Batch | None, int]:
        """The batch that a layer whose weight is W is in, and where in it; without one it has to measure by itself."""
        # In a backward pass, activation checkpointing runs layers again, in another order.
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return None, 0
        mine = id(layer)
        if mine == self._first and _is_plain(layer, W):
            self._measure(W)
        state, batch, index = self._ready.pop(mine, (None, None, 0))
        # What another stream computes may not be there yet.
        if batch is not None and state == layer.place(W) and batch.stream == _stream(W):
            return batch, index
        if _is_plain(layer, W):
            self._missed(layer)
        return None, 0

    def _missed(self, layer: "SigmaReparam") -> None:
        self._misses += 1
        if self._misses > 4 * len(self._layers) + 4:
            self._layers.clear()  # the first was frozen, or is not called any more: there may be another
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
                return  # a sharded weight is whole in its own layer's pass alone
            elif W.dtype == like.dtype and W.device == like.device and _is_plain(layer, W) and layer.takes_kernels(W):
                layers.append(key)
                states.append(layer.place(W))
        if len(layers) < 2:
            return
        places = tuple([state[0] for state in states])
        if self._plan[0] != places:
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                return  # to make a plan is to wait for the device, which must not be while a graph is captured
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
