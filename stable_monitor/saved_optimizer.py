"""The saved state of an optimizer in memory, where nothing says how it had grouped the parameters."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .resume import prepare_to_resume

Groups = list[list[nn.Parameter]]


def optimizer_holding(
    model: nn.Module, saved: dict[str, Any], groupings: Iterable[Groups]
) -> torch.optim.Optimizer | None:
    """An optimizer with the saved state on the model's parameters, in the first of the groupings that its shapes fit; or None.

    It makes no steps: it keeps whatever state it is given. Gammas of a rescue are put where the saved groups have them.
    """
    for groups in groupings:
        optimizer = torch.optim.Optimizer([{"params": group} for group in groups], {})
        prepare_to_resume(model, optimizer, saved)
        if _fits(optimizer, saved):
            optimizer.load_state_dict(saved)
            return optimizer
    return None


def usual_groupings(model: nn.Module) -> Iterator[Groups]:
    """All parameters in one group; matrices and vectors; vectors and matrices."""
    parameters = list(model.parameters())
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
    yield [parameters]
    yield [matrices, vectors]
    yield [vectors, matrices]


def _fits(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> bool:
    ours, theirs = ([group["params"] for group in groups] for groups in (optimizer.param_groups, saved["param_groups"]))
    if list(map(len, ours)) != list(map(len, theirs)):
        return False
    pairs = [pair for group, indices in zip(ours, theirs, strict=True) for pair in zip(group, indices, strict=True)]
    return all(
        (x.shape, x.dtype) == (p.shape, p.dtype)
        for p, index in pairs
        for x in saved["state"].get(index, {}).values()
        if isinstance(x, torch.Tensor) and x.ndim
    )
