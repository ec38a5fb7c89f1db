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
LAG = 3.0  # after a step sigma may be 1 + LAG times its known lower bound, which is far more than was ever seen
EVERY = 64


class Watch:
    """What is known of sigma (blocks,) of one parametrization."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Nothing is known: the next pass's sigma is taken as right, unless a weight is written to before."""
        self.expect([], None)
        self.look_soon()

    def rebind(self, weights: list[Tensor]) -> None:
        """The same values lie in these tensors from now on."""
        self._seen = versions(weights)

    def expect(self, weights: list[Tensor], sigma: Tensor | list[float] | None, slack: float = 0.0) -> None:
        """u belongs to `weights` as they are: sigma will be as given, or up to `slack` of it more."""
        self._low, self._slack, self._seen, self.announced = sigma, slack, versions(weights), False

    def look_soon(self) -> None:
        """The next pass counts as the first again, at which a GPU compares."""
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
        now = versions(weights)
        if now == self._seen:
            return False
        # Another tensor in its place has a counter of its own, which says nothing.
        return any(new[0] == old[0] and new[1] != old[1] for new, old in zip(now, self._seen, strict=False))

    def is_due(self, weights: list[Tensor]) -> bool:
        """Whether this pass compares; not with tensors that stand in for the weights (torch.func.functional_call)."""
        now, seen = versions(weights), self._seen
        if now != seen and [name for name, _ in now] != [name for name, _ in seen]:
            return False
        if weights[0].is_cpu:
            return True
        self._passes += 1
        scheduled = self._passes % EVERY == 0 or (self._passes < EVERY and self._passes & (self._passes - 1) == 0)
        return scheduled or self.announced or now != seen

    def agrees(self, sigma: list[float], strictly: bool, dtype: torch.dtype = torch.float32) -> bool:
        """Whether sigma is as it was expected.

        With `strictly` it must be so to the bit, as it is of weights that were swapped for others and are back. Else it may
        differ by the rounding of `dtype`, to which FSDP2 rounds weights in mixed precision.
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
    """Whether values can be read off tensors here: they are there, and no graph is captured."""
    return is_real(W) and not (W.is_cuda and torch.cuda.is_current_stream_capturing())


def is_real(W: Tensor) -> bool:
    """Whether there are values: not while a compiler or tracer runs the pass, or a mode that sees each operator."""
    return not (
        W.is_meta or torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    )


def is_transformed() -> bool:
    """Whether torch.func (vmap, jvp, grad, ...) or forward-mode differentiation is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def versions(weights: list[Tensor]) -> tuple[tuple[int, int], ...]:
    """Which tensors they are, and how often torch saw each written to; it does not count for those of inference mode."""
    return tuple([(id(W), 0 if W.is_inference() else W._version) for W in weights])
