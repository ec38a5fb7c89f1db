"""Finds weights that changed without an optimizer's step, so that their u is out of date.

After a step, u is advanced (advancing.py). But a weight may also be written to by the user, swapped for its average, loaded
without its u, or changed by an optimizer that raised half-way. The forward pass detects this by comparing sigma = |W^T u|,
which it computes anyway, with its last value: they are equal to the bit unless W or u changed. On a CPU every pass compares. On
a GPU this would wait for the device, so a pass compares only where a tensor's version counter moved, and else at the 1st, 2nd,
4th, ..., 64th, 128th, 192nd, ... pass.

A pass may also be given other tensors in place of the weights (torch.func.functional_call, FSDP1's views). u is then left
alone, as it is of the weights, and a training pass in which it is far behind is a warning.
"""

import warnings

import torch
from torch import Tensor

EXACT = 3e-6  # relative difference that another order of summation may make
LAG = 3.0  # after a step sigma is accepted up to 1 + LAG times its lower bound, far above what was ever seen
EVERY = 64  # passes between comparisons on a GPU, after the first 64
PROVES = 50  # updates of a weight in which an optimizer must have held its gamma
AWAITS = "_awaits_an_optimizer"  # attribute of a gamma until one has


class Watch:
    """The sigma (blocks,) that the next forward pass of one parametrization should find, and the weights that it is of."""

    def __init__(self) -> None:
        self.is_stepped = False  # an optimizer's step runs its closure, and may have written to the weights before
        self.forget()

    def forget(self) -> None:
        """Expects nothing: the next pass's sigma is accepted, unless a weight is written to before."""
        self.expect([], None)
        self.look_soon()

    def rebind(self, weights: list[Tensor]) -> None:
        """The weights are now these tensors, with the same values as before."""
        self._seen = versions(weights)

    def expect(self, weights: list[Tensor], sigma: Tensor | list[float] | None, slack: float = 0.0) -> None:
        """u is up to date with `weights`: sigma (blocks,) will be as given, or up to 1 + slack times that; None: any sigma."""
        self._low, self._slack, self._seen, self.announced = sigma, slack, versions(weights), False

    def look_soon(self) -> None:
        """Restarts the count of passes, so that a GPU compares at the next one."""
        self._passes = 0

    def announce(self) -> None:
        """Notes that an optimizer's step has begun. `expect` clears it after the step; if not, the next pass compares."""
        self.announced, self.is_stepped = True, False

    @property
    def trusts(self) -> bool:
        """Whether any sigma is expected: not of a model that was just loaded, or has no values yet but memory."""
        return self._low is not None

    @property
    def exact(self) -> bool:
        """Whether sigma itself is expected, and not only a range from a lower bound up."""
        return self._low is not None and self._slack == 0

    def moved(self, weights: list[Tensor]) -> bool:
        """Whether a version counter shows that a weight was written to since `expect` or `rebind`."""
        now = versions(weights)
        if now == self._seen:
            return False
        # Only counters of the same tensor are compared: another tensor in its place has a counter of its own.
        return any(new[0] == old[0] and new[1] != old[1] for new, old in zip(now, self._seen, strict=False))

    def replaces(self, weights: list[Tensor]) -> bool:
        """Whether a pass is given these tensors in place of the weights."""
        return bool(self._seen) and [id(W) for W in weights] != [name for name, _ in self._seen]

    def is_due(self, weights: list[Tensor]) -> bool:
        """Whether this pass, of the weights themselves, compares sigma."""
        return weights[0].is_cpu or self.is_scheduled() or self.announced or versions(weights) != self._seen

    def is_scheduled(self, first: int = 1) -> bool:
        """Counts a pass; whether it is one of those, from `first` on, that look at numbers even where that waits for a GPU."""
        self._passes += 1
        passes = self._passes
        return passes >= first and (passes % EVERY == 0 or (passes < EVERY and passes & (passes - 1) == 0))

    def agrees(self, sigma: list[float], strictly: bool, dtype: torch.dtype = torch.float32) -> bool:
        """Whether sigma (blocks,) is as expected.

        With `strictly` it must be equal to the bit, which holds for weights that were swapped for others and then restored.
        Otherwise it may differ by the rounding of `dtype`, to which FSDP2 rounds weights in mixed precision.
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


UNANNOUNCED = (
    "its weight changed and no optimizer announced it (a write to .data?); u was put right. "
    "Call stable_core.advance(model.parameters()) after each such change"
)
REPLACED = (
    "the forward pass is given other tensors in place of its weight (functional_call, FSDP1?), and u, which is the weight's, "
    "is far behind them, so that the effective weight is larger than gamma. Copy them into the model after each update and "
    "call stable_core.advance(model.parameters()); in place of FSDP1 take fully_shard"
)
IDLE = (
    "its weight learns and its gamma does not, as no optimizer holds it: build the optimizer after sigma_reparam, or add "
    "stable_core.param_groups(model, ...) to it"
)
NEGATIVE = (  # W_hat and its gradient to W are zero where gamma is, so that the layer stops there for a while
    "its gamma is negative, and has passed zero, where a layer computes and learns nothing; leave it out with filter_fn, or "
    "draw the head of another task anew"
)


class Notice:
    """Warns of what keeps a layer from learning or u from following, each once per model."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def warn(self, layer: str, what: str) -> None:
        if what not in self._given:
            self._given.add(what)
            warnings.warn(f"{layer}: {what}", RuntimeWarning, stacklevel=2)


def can_look(W: Tensor) -> bool:
    """Whether the values of W can be read here: it has values, and no CUDA graph is being captured."""
    return is_real(W) and not (W.is_cuda and torch.cuda.is_current_stream_capturing())


def is_real(W: Tensor) -> bool:
    """Whether W has values: not on the meta device, under a compiler or tracer, or in a mode that intercepts operators."""
    return not (
        W.is_meta or torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    )


def is_transformed() -> bool:
    """Whether torch.func (vmap, jvp, grad, ...) or forward-mode differentiation is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def unwrapped(W: Tensor) -> Tensor | None:
    """What torch.func's transforms (grad, jvp) have wrapped as W, without gradient; None where vmap cuts it up."""
    plain = W
    while torch._C._functorch.is_functorch_wrapped_tensor(plain):
        plain = torch._C._functorch.get_unwrapped(plain)
    return plain.detach() if plain is not W and plain.shape == W.shape else None


def versions(weights: list[Tensor]) -> tuple[tuple[int, int], ...]:
    """(id, version counter) of each tensor; the counter is how often torch saw it written to, 0 in inference mode."""
    return tuple([(id(W), 0 if W.is_inference() else W._version) for W in weights])
