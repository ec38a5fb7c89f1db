"""z-loss: keeps the normaliser of the output softmax near 1 (Chowdhery et al., "PaLM", 2022, Section 5).

Cross-entropy does not change when a constant is added to all logits, so they may drift to sizes at which they lose precision.
Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities" (ICLR 2024), call this the divergence
of output logits, and prevent it with this term.
"""

import math
from collections.abc import Callable

from torch import Tensor, nn

from .scale_by_sigma import wide


def z_loss(logits: Tensor, coefficient: float = 1e-4, mask: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
    """coefficient * mean(log(Z)^2) with Z = sum_i exp(logits_i), to be added to a cross-entropy.

    log(Z) is one logsumexp in at least fp32, so that no softmax is kept for the backward pass.

    Args:
        logits: (..., classes), the input of the output softmax.
        coefficient: 1e-4 in both papers.
        mask: (...), boolean, True for positions that count, which should be those that the cross-entropy does not ignore; None
            counts all.
        reduction: "mean" over the positions that count (NaN where none does, as in torch's cross-entropy) or "sum".

    Returns:
        A scalar, fp32 or float64.

    Raises:
        ValueError: a coefficient below 0 or not finite; another reduction; a mask of another shape.
    """
    check_coefficient(coefficient)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction = {reduction!r}: allowed are 'mean', 'sum'")
    if mask is not None and mask.shape != logits.shape[:-1]:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)}: allowed is that of the positions, {tuple(logits.shape[:-1])}"
        )
    squares = wide(logits).logsumexp(-1).square()
    if mask is not None:
        squares = squares.masked_fill(~mask, 0)  # squares[mask] would wait for a GPU and break a compiled graph
    total = squares.sum()
    if reduction == "sum":
        return coefficient * total
    return coefficient * total / (squares.numel() if mask is None else mask.sum())


def check_coefficient(coefficient: float, name: str = "coefficient") -> None:
    """Raises ValueError where `coefficient` is below 0 or not finite; `name` is for the error."""
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"{name} = {coefficient!r}: allowed are finite numbers from 0, which is off")


class WithZLoss(nn.Module):
    """A loss with z-loss added in training, for a loop of your own: loss(logits, target) + z_loss(logits).

    In evaluation it is loss(logits, target) alone.

        loss_fn = WithZLoss(nn.CrossEntropyLoss(label_smoothing=0.1))

    Args:
        loss: a loss with a softmax over classes and the mean over the batch: torch's CrossEntropyLoss, timm's
            LabelSmoothingCrossEntropy and SoftTargetCrossEntropy. Logits are (batch, classes); targets are classes (batch,),
            where the loss's `ignore_index` (else -100) does not count, or probabilities (batch, classes).
        coefficient: as for `z_loss`.

    Raises:
        ValueError: the coefficient, as for `z_loss`; a binary loss, which has no softmax; a loss with another reduction.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], coefficient: float = 1e-4) -> None:
        super().__init__()
        check_coefficient(coefficient)
        if type(loss).__name__.startswith(("BCE", "Binary")):
            raise ValueError(f"loss = {loss!r}: it has a sigmoid for each class, and no softmax whose Z could be held")
        if (reduction := getattr(loss, "reduction", "mean")) != "mean":
            raise ValueError(f"loss = {loss!r}: reduction = {reduction!r}: allowed is 'mean'")
        self.loss, self.coefficient = loss, coefficient

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = self.loss(logits, target)
        if not self.training:
            return loss
        mask = None if target.is_floating_point() else target != getattr(self.loss, "ignore_index", -100)
        return loss + z_loss(logits, self.coefficient, mask)
