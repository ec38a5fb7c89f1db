"""Whether u still belongs to W: how a training forward pass finds out that a weight changed and nobody said so.

Optimizers announce their steps (advancing.py). A weight can change without: written to by the user, swapped for its average,
loaded without its u, stepped in an optimizer that raised half-way. What the forward pass computes anyway, sigma = |W^T u|,
tells: it is bitwise that of the last pass unless W or u changed. On a CPU every pass compares. On a GPU that would wait for the
device, so there a pass compares where a version counter moved, and else at its 1st, 2nd, 4th, ..., 64th, 128th, 192nd ... time.
"""

import warnings

import torch
from torch import Tensor

EXACT = 3e-6  # what another order of summation may change
LAG = 0.5  # how much more than power iteration's own lower bound sigma may be after it, before it is suspicious
EVERY = 64


class Watch:
    """What is known of sigma (blocks,) of one parametrization."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Nothing is known: the next pass is believed, unless somebody writes to a weight before it."""
        self.expect([], None)
        self.look_soon()

    def rebind(self, weights: list[Tensor]) -> None:
        """The same values lie in these tensors from now on."""
        self._seen = versions(weights)

    def expect(self, weights: list[Tensor], sigma: Tensor | list[float] | None, slack: float = 0.0) -> None:
        """u belongs to `weights` as they are: sigma will be as given, or up to `slack` of it more."""
        self._low, self._slack, self._seen, self.announced = sigma, slack, versions(weights), False

    def look_soon(self) -> None:
        """The next pass is the first again."""
        self._passes = 0

    def announce(self) -> None:
        """A step has begun, and says so when it ends; where it does not, the next pass looks."""
        self.announced = True

    @property
    def exact(self) -> bool:
        """Whether sigma is known, and not only how small it can be."""
        return self._low is not None and self._slack == 0

    def moved(self, weights: list[Tensor]) -> bool:
        """Whether a version counter says that a weight was written to since u was put right."""
        # Another tensor in its place has a counter of its own, which says nothing.
        return any(
            new[0] == old[0] and new[1] != old[1] for new, old in zip(versions(weights), self._seen, strict=False)
        )

    def is_due(self, weights: list[Tensor]) -> bool:
        """Whether this pass compares; not with tensors that stand in for the weights (torch.func.functional_call)."""
        if [id(W) for W in weights] != [name for name, _ in self._seen]:
            return False
        if weights[0].device.type == "cpu":
            return True
        self._passes += 1
        scheduled = self._passes % EVERY == 0 or (self._passes < EVERY and self._passes & (self._passes - 1) == 0)
        return scheduled or self.announced or self.moved(weights)

    def agrees(self, sigma: list[float], strictly: bool, dtype: torch.dtype = torch.float32) -> bool:
        """Whether sigma is as it was expected; `strictly`: bitwise that of weights which were swapped and are back.

        In mixed precision FSDP2 hands over weights that are rounded to `dtype`.
        """
        rounding = max(EXACT, torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0)
        if isinstance(self._low, Tensor):
            self._low = self._low.tolist()
        if strictly:
            return self.exact and sigma == self._low
        return self._low is None or all(
            (1 - rounding) * low <= x <= (1 + rounding + self._slack) * low
            for x, low in zip(sigma, self._low, strict=True)
        )


class Notice:
    """The one warning of a model."""

    def __init__(self) -> None:
        self._given = False

    def warn(self, layer: str) -> None:
        if not self._given:
            self._given = True
            warnings.warn(
                f"{layer}: its weight changed and no optimizer announced it (a write to .data?); u was put right. "
                "Call stable_core.advance(model.parameters()) after each such change",
                RuntimeWarning,
                stacklevel=2,
            )


def can_look(W: Tensor) -> bool:
    """Whether values can be read off tensors here: not while a compiler, tracer, transform or graph capture runs the pass."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch.jit.is_tracing()
        or W.is_meta
        or (W.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def is_transformed() -> bool:
    """Whether torch.func (vmap, jvp, grad, ...) or forward-mode differentiation is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def versions(weights: list[Tensor]) -> tuple:
    """Which tensors they are, and how often torch saw each written to; it does not count for those of inference mode."""
    return tuple((id(W), 0 if W.is_inference() else W._version) for W in weights)
