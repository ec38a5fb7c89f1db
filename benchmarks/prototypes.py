"""What was tried to make σReparam cheaper and is not there, with what it would give: `python -m benchmarks.prototypes`.

Step times of a 6L-6L translation model at 400 tokens, as it is and with the prototypes put in; then the operations on one
matrix, whole and in blocks of rows that fit into the cache, with the cache flushed before each.
"""

import sys
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

import stable_core  # noqa: F401
from benchmarks.families import Step
from benchmarks.models import translation
from benchmarks.paired import Report, arguments, interleave, seconds

module = sys.modules["stable_core.sigma_reparam"]  # its function of the same name hides it
SHAPES = [(512, 512), (2048, 512), (512, 2048)]
WHOLE = ["W^T (W v)", "backward"]


class KeptWeight(torch.autograd.Function):
    """W_hat as it was at the last call; the backward pass as it is."""

    @staticmethod
    def forward(ctx, W, gamma, u, v, rows, stop_gradient, W_hat, sigma):
        ctx.rows, ctx.stop_gradient = rows, stop_gradient
        ctx.save_for_backward(W, gamma, u, v, sigma)
        ctx.set_materialize_grads(False)
        return W_hat.detach(), sigma.detach()

    @staticmethod
    def backward(ctx, *gradients):
        return *module._ScaleBySigma.backward(ctx, *gradients), None


def kept_weight(self: nn.Module, originals: list[Tensor]) -> list[Tensor]:
    if not hasattr(self, "_kept"):
        self._kept = scaled_weights(self, originals)[0].detach().clone(), self.sigma()
    state = self.gamma, self.u.clone(), self.v.clone(), tuple(self.rows), self.config.stop_gradient
    return [KeptWeight.apply(originals[0], *state, *self._kept)[0]]


scaled_weights = module.SigmaReparam.scaled_weights
PROTOTYPES = {
    "sigma kept from the power iteration": partial(patch.object, torch, "mv", lambda W, x: W[:, 0]),
    "W_hat kept between micro-batches": partial(patch.object, module.SigmaReparam, "scaled_weights", kept_weight),
}


@contextmanager
def no_change():
    yield


def step_times(rounds: int, device: torch.device, title: str) -> dict[str, list[float]]:
    family = translation(6)
    work = {"post-LN": Step(family, "post-LN", 400, device)}
    for name, change in {"σReparam as it is": no_change, **PROTOTYPES}.items():
        step = Step(family, "σReparam + post-LN", 400, device)

        def update(step: Step = step, change=change) -> None:
            with change():
                step()

        work[name] = update
    return interleave(work, rounds, device, title)


def operations(rows: int, columns: int, rounds: int, device: torch.device) -> dict[str, list[float]]:
    W, G = torch.randn(2, rows, columns, device=device)
    u, v, scale = (
        torch.randn(rows, device=device),
        torch.randn(columns, device=device),
        torch.tensor(1.5, device=device),
    )
    flush = torch.zeros(2**24, device=device)  # twice the largest cache

    def iteration(size: int) -> Tensor:
        total = torch.zeros_like(v)
        for block in W.split(size):
            total.addmv_(block.T, torch.mv(block, v))
        return total

    def backward(size: int) -> Tensor:
        d_W = torch.empty_like(G)
        for g, block, x in zip(G.split(size), d_W.split(size), u.split(size), strict=True):
            torch.mul(g, scale, out=block).addr_(x, v)
        return d_W

    work = {WHOLE[0]: partial(iteration, rows), WHOLE[1]: partial(backward, rows)}
    for size in (256, 128):
        work[f"W^T (W v), {size} rows at a time"] = partial(iteration, size)
        work[f"backward, {size} rows at a time"] = partial(backward, size)
    work |= {"W v": lambda: torch.mv(W, v), "W^T u": lambda: torch.mv(W.T, u)}
    times = {name: [] for name in work}
    for _ in range(rounds):
        for name, one in work.items():
            flush.add_(1)
            times[name].append(seconds(one, device))
    return times


def main() -> None:
    args = arguments("prototypes", __doc__, rounds=12).parse_args()
    report = Report("prototypes", args.device)
    title = "6L-6L, width 512, 400 tokens"
    report.add(title, step_times(args.rounds, args.device, title), ["σReparam as it is", "post-LN"], "ms a step", 1000)
    for shape in SHAPES:
        times = operations(*shape, 10 * args.rounds, args.device)
        report.add("{} x {}".format(*shape), times, [*WHOLE, "W v"], "µs", 1e6)
    report.save(args.out)


if __name__ == "__main__":
    main()
