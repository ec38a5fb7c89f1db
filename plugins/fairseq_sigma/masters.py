"""fairseq's optimizers as holders of the model's own parameters, which some of them hold fp32 copies of."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from fairseq.optim import FairseqBMUF, FairseqOptimizer, FP16Optimizer
from fairseq.optim.composite import CompositeOptimizer
from torch import nn


@contextmanager
def models_own(optimizer: FairseqOptimizer) -> Iterator[torch.optim.Optimizer]:
    """torch's optimizer, whose groups and state are inside the context those of the model's own parameters.

    --fp16 and --bf16 step fp32 copies. Where the context leaves a parameter as it was, its copy stays what it is bit for bit;
    where it changed one, or added one, the copy is made from it.

    Raises:
        ValueError: it holds the weights in another form, by the flag that does so.
    """
    inner = optimizer.optimizer
    for found, flag in (
        (isinstance(optimizer, FairseqBMUF), "--use-bmuf"),
        (isinstance(inner, CompositeOptimizer), "--optimizer composite"),
        (hasattr(inner, "consolidate_state_dict"), "--zero-sharding os"),
        (isinstance(optimizer, FP16Optimizer) and optimizer.has_flat_params, "--fp16 without --fp16-no-flatten-grads"),
    ):
        if found:
            raise ValueError(f"{flag}: its optimizer does not hold the weights one by one")
    if not isinstance(optimizer, FP16Optimizer):
        yield inner
        return
    own = dict(zip(optimizer.fp32_params, optimizer.fp16_params, strict=True))
    _exchange(inner, own)
    try:
        yield inner
    finally:
        copies = {p: copy for copy, p in own.items()}
        for p in (p for group in inner.param_groups for p in group["params"]):
            if p not in copies:
                copies[p] = nn.Parameter(p.detach().float())
                copies[p].grad = torch.zeros_like(copies[p])
                optimizer.fp16_params.append(p)
                optimizer.fp32_params.append(copies[p])
            elif not torch.equal(copies[p].to(p.dtype), p):
                copies[p].data.copy_(p)
        _exchange(inner, copies)


def _exchange(optimizer: torch.optim.Optimizer, others: dict) -> None:
    """Puts other parameters in the place of an optimizer's."""
    for group in optimizer.param_groups:
        group["params"] = [others[p] for p in group["params"]]
    optimizer.state = defaultdict(dict, {others.get(p, p): state for p, state in optimizer.state.items()})
