"""Verifies that a remedy acts: not that a model has it, but that its forward pass does what the method promises."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from stable_core.sharding import is_sharded
from stable_core.targets import FilterFn, layers

from .compiled import unwrap
from .interception import UNSEEN, without_wrappers
from .qk_clip import QKClip
from .trial import Forward, as_it_was
from .verify_attentions import Attentions
from .verify_layers import Layers


@dataclass(frozen=True)
class Row:
    """What was found of one layer or attention. `verdict` is "acts", or what is wrong; with `ok` it need not act."""

    name: str
    remedy: str
    measured: str
    promised: str
    verdict: str
    ok: bool


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `str()` is the table.

    Attributes:
        rows: one for each reparametrised or picked layer and for each attention, in the model's order.
    """

    rows: tuple[Row, ...]

    @property
    def faults(self) -> list[Row]:
        """The rows of what does not act."""
        return [row for row in self.rows if not row.ok]

    @property
    def ok(self) -> bool:
        """Whether all remedies act."""
        return not self.faults

    def __str__(self) -> str:
        cells = [("", "remedy", "measured", "promised", "verdict")]
        cells += [(row.name, row.remedy, row.measured, row.promised, row.verdict) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        count = f"{len(self.faults)} of {len(self.rows)} do not act" if self.faults else f"all {len(self.rows)} act"
        return "\n".join([*lines, count])


def verify(
    model: nn.Module,
    forward: Forward,
    *,
    clip: QKClip | None = None,
    filter_fn: FilterFn | None = None,
    lag: float = 0.3,
) -> Verification:
    """Whether each remedy in a model acts: σReparam and weight norm of layers; σReparam, QK-norm, StableAtten, L2 and QK-clip
    of attentions, whose logits must be bounded.

        report = verify(model, lambda: model(batch), clip=clip)
        assert report.ok, report

    Between two updates; the model is afterwards what it was, bit for bit. It takes five to seven forward passes, one of them
    with a graph, and more for layers that are at fault. Each process looks at its own copy.

    Args:
        model: what the training loop calls: plain, compiled, or in DistributedDataParallel.
        forward: runs the model on one batch, a small one will do, the same at each call, and without a backward pass. Where
            layers are skipped at random, call model.eval() before.
        clip: the QKClip of the run.
        filter_fn: filter_fn(module, name) -> bool picks layers that must be reparametrised, and attentions whose logits must be
            bounded; by default no layer must, and every attention.
        lag: the largest part by which |W_hat| may be off gamma: one iteration an update is behind by more at higher rates.

    Raises:
        ValueError: the forward pass shows nothing, is not the same twice, or gives NaN; weights that are cut up over processes;
            a clip of another model.
    """
    inner = unwrap(model)
    if any(map(is_sharded, inner.parameters())):
        raise ValueError("model: its weights are cut up over processes; verify it before fully_shard")
    if clip is not None and not any(map(clip.clips, inner.modules())):
        raise ValueError("clip: it clips no attention of this model; make it after the model is complete")
    with as_it_was(model, inner):
        rows = list(_rows(inner, forward, clip, filter_fn, lag))
    if not rows:
        raise ValueError(f"{UNSEEN}, and no layer is reparametrised")
    order = {without_wrappers(name): i for i, (name, _) in enumerate(inner.named_modules())}
    return Verification(
        tuple(sorted(rows, key=lambda row: order.get(row.name, order.get(row.name.rpartition(".")[0], 0))))
    )


def _rows(
    model: nn.Module, forward: Forward, clip: QKClip | None, filter_fn: FilterFn | None, lag: float
) -> Iterator[Row]:
    found = Layers(model, forward)
    if not found.first.outputs:
        raise ValueError("forward: it gives no tensors; it must call the model")
    if any(x.isnan().any() for x in found.first.outputs):
        raise ValueError("forward: its outputs are not numbers; go back to a sound checkpoint")
    for name, remedy, measured, promised, fault in found.verdicts(lag):
        yield Row(name, remedy, measured, promised, fault or "acts", not fault)
    if filter_fn is not None:
        for target in layers(model):
            if target.tensor_name in target.module._parameters and filter_fn(target.module, target.module_name):
                yield Row(without_wrappers(target.name), "none", "", "", "picked, and not reparametrised", False)
    for module, name, remedy, measured, promised, fault in Attentions(model, forward, found.first, clip).verdicts():
        if promised == "nothing" and filter_fn is not None and not filter_fn(module, name):
            yield Row(name, remedy, measured, promised, f"{fault}; not picked", True)
        else:
            yield Row(name, remedy, measured, promised, fault or "acts", not fault)
