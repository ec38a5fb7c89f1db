"""Operator calls of a training step, and how many a reparametrised weight adds: `python -m benchmarks.calls`.

On a GPU most of them are launches, which take longer than small matrices. One eager update of a small ViT, counted where
operators reach their kernels, forward, backward and optimizer apart. Views are left out; allocations, which launch nothing,
are in, and told apart. Triton's kernels do not come by here: `benchmarks.gpu` counts launches. A weight adds 12 calls, a packed
one 20, and the model nine for all weights together.

How often a weight's numbers are read or written in a step, more than by a plain layer, counted on paper:

                                      torch's operators   Triton kernels   least possible
    forward: W^T u; W_hat             1 + 2               1 + 2            1 + 0, with y scaled in place of W
    backward: <G, W>; dL/dW           2 + 4               2 + 2            0, within the products that make y and G
    after the optimizer: W^T u, W v   2                   2                2
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.families import Step, vit
from benchmarks.paired import Report, arguments

PLAIN = "pre-LN"
LABELS = [PLAIN, "σReparam + pre-LN", "torch spectral_norm + pre-LN", "plain Algorithm 1 + pre-LN"]
LEFT_OUT = ("_unsafe_view", "_record_function_enter_new", "_record_function_exit")  # views by their schema aside
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Calls(TorchDispatchMode):
    """Counts the operators within it that are no views, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in LEFT_OUT:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class StepCalls:
    """Of one update: how many of each name."""

    forward: Counter[str]
    backward: Counter[str]
    optimizer: Counter[str]

    def all(self) -> Counter[str]:
        return self.forward + self.backward + self.optimizer


def count(step: Step) -> StepCalls:
    """Of the second update: the first makes the optimizer's state."""
    step()
    with Calls() as forward, step.autocast():
        loss = step.loss(step.model, step.batch)
    step.optimizer.zero_grad()
    with Calls() as backward:
        loss.backward()
    with Calls() as optimizer:
        step.optimizer.step()
    return StepCalls(forward.by_name, backward.by_name, optimizer.by_name)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """One call for all parameters: gammas add none of their own."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def main() -> None:
    parser = arguments("calls", __doc__, rounds=1)
    parser.add_argument("--depth", type=int, default=12, help="blocks of the ViT (default: %(default)s)")
    args = parser.parse_args()
    family = vit("small", img_size=32, embed_dim=96, num_heads=3, num_classes=10, depth=args.depth)
    report = Report("operator calls of a training step, views left out", args.device)
    for autocast, precision in ((False, "fp32"), (True, "autocast to bfloat16")):
        columns = {name: {} for name in ("forward", "backward", "optimizer", "allocations", "more a weight")}
        totals = {}
        for label in LABELS:
            step = Step(family, label, 2, args.device, autocast, adamw)
            calls = count(step)
            totals[label] = calls.all().total()
            for part in ("forward", "backward", "optimizer"):
                columns[part][label] = getattr(calls, part).total()
            columns["allocations"][label] = sum(calls.all()[name] for name in ALLOCATIONS)
            if weights := sum(map(parametrize.is_parametrized, step.model.modules())):
                columns["more a weight"][label] = (totals[label] - totals[PLAIN]) / weights
        title = f"ViT-S of {args.depth} blocks, {precision}"
        report.add(title, {label: [total] for label, total in totals.items()}, [PLAIN], "calls", 1, columns)
    report.save(args.out)


if __name__ == "__main__":
    main()
