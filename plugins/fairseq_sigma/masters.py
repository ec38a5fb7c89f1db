"""fairseq's optimizers as holders of the model's own parameters, which some of them hold fp32 copies of."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fairseq.optim import FairseqBMUF, FairseqOptimizer, FP16Optimizer
from fairseq.optim.composite import CompositeOptimizer
from torch import Tensor, nn


@contextmanager
def models_own(optimizer: FairseqOptimizer) -> Iterator[torch.optim.Optimizer]:
    """torch's optimizer, whose groups and state are inside the context those of the model's own parameters.

    --fp16 and --bf16 step fp32 copies. Where the context leaves a parameter as it was, its copy stays what it is bit for bit;
    where it changed one, or added one, the copy is made from it. Copies in one piece are taken apart, for good.

    Raises:
        ValueError: it holds the weights in another form, by the flag that does so.
    """
    inner = optimizer.optimizer
    for found, flag in (
        (isinstance(optimizer, FairseqBMUF), "--use-bmuf"),
        (isinstance(inner, CompositeOptimizer), "--optimizer composite"),
        (hasattr(inner, "consolidate_state_dict"), "--zero-sharding os"),
        (
            isinstance(getattr(optimizer, "fp32_params", None), dict) and len(optimizer.fp32_params) > 1,
            "--pipeline-devices",
        ),
    ):
        if found:
            raise ValueError(f"{flag}: its optimizer does not hold the weights one by one")
    if not isinstance(optimizer, FP16Optimizer):
        yield inner
        return
    if optimizer.has_flat_params:
        _take_apart(optimizer)
    own = dict(zip(optimizer.fp32_params, optimizer.fp16_params, strict=True))
    _exchange(inner, own)
    try:
        yield inner
    finally:
        copies = {p: fp32 for fp32, p in own.items()}
        for p in (p for group in inner.param_groups for p in group["params"]):
            if p not in copies:
                copies[p] = nn.Parameter(p.detach().float())
                copies[p].grad = torch.zeros_like(copies[p])
                optimizer.fp16_params.append(p)
                optimizer.fp32_params.append(copies[p])
            elif not torch.equal(copies[p].to(p.dtype), p):
                copies[p].data.copy_(p)
        _exchange(inner, copies)


def _take_apart(optimizer: FP16Optimizer) -> None:
    """Makes of an optimizer of --fp16 what --fp16-no-flatten-grads would have made it."""
    (flat,) = optimizer.fp32_params.values()
    copies = [nn.Parameter(x) for x in _pieces(flat.detach(), optimizer.fp16_params)]
    states = split_flat(optimizer.optimizer.state_dict(), optimizer.fp16_params)["state"]
    for fp32 in copies:
        fp32.grad = torch.zeros_like(fp32)
    optimizer.fp32_params = copies
    optimizer.optimizer.param_groups[0]["params"] = list(copies)
    optimizer.optimizer.state = defaultdict(dict, {copies[index]: state for index, state in states.items()})


def is_flat(saved: dict[str, Any], parameters: Sequence[nn.Parameter]) -> bool:
    """Whether the saved state of an optimizer is that of one flat copy of these parameters."""
    return len(parameters) > 1 == sum(len(group["params"]) for group in saved["param_groups"])


def split_flat(saved: dict[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """The state of an optimizer of one flat copy of these parameters, as that of one with a copy of each.

    Raises:
        ValueError: it is of other parameters.
    """
    size, moments = sum(p.numel() for p in parameters), saved["state"].get(0, {})
    states: dict[int, dict[str, Any]] = {index: {} for index in range(len(parameters) if moments else 0)}
    for name, x in moments.items():
        tensor = isinstance(x, Tensor) and x.ndim > 0
        if tensor and x.numel() != size:
            raise ValueError(f"{name} of the saved optimizer has {x.numel()} numbers, the model {size}")
        pieces = _pieces(x, parameters) if tensor else [copy.deepcopy(x) for _ in parameters]
        for index, piece in enumerate(pieces):
            states[index][name] = piece
    (group,) = saved["param_groups"]
    return {**saved, "state": states, "param_groups": [{**group, "params": list(range(len(parameters)))}]}


def _pieces(flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    pieces = flat.split([p.numel() for p in parameters])
    return [piece.view(p.shape).clone() for piece, p in zip(pieces, parameters, strict=True)]


def _exchange(optimizer: torch.optim.Optimizer, others: dict) -> None:
    """Puts other parameters in the place of an optimizer's."""
    for group in optimizer.param_groups:
        group["params"] = [others[p] for p in group["params"]]
    optimizer.state = defaultdict(dict, {others.get(p, p): state for p, state in optimizer.state.items()})
