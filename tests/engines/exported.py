"""A trained model, folded for export, and the logits that it had unfolded."""

import torch
from torch import Tensor, nn
from torch.export import Dim

from stable_core import fold
from tests.engines.models import REPARAMETRISED, arguments, batch, build, logits, sgd, train


@torch.no_grad()
def folded(kind: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """In evaluation; with inputs of several shapes, none that of `example`."""
    with torch.enable_grad():
        model = build(kind)
        train(kind, model, sgd(model))
    model.eval()
    inputs = [batch(kind, seed)[0][:size] for seed, size in ((11, 1), (12, 3), (13, 7))]
    if "vit" not in kind:
        inputs = [x[:, :length] for x, length in zip(inputs, (16, 9, 2), strict=True)]
    expected = [(x, logits(kind, model, x)) for x in inputs]
    return (fold(model) if kind in REPARAMETRISED else model), expected


def example(kind: str) -> tuple[tuple, dict, tuple]:
    """Arguments to export with, positional and named, and which of their sizes may change: batch, and sequence length."""
    args, kwargs = arguments(kind, batch(kind, 0)[0])
    dynamic = {0: Dim("batch")} if "vit" in kind else {0: Dim("batch"), 1: Dim("sequence", min=2, max=32)}
    return args, kwargs, (dynamic,) * len(args) + (None,) * len(kwargs)
