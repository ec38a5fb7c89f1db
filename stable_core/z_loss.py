"""z-loss: keeps the normaliser of the output softmax near 1 (Chowdhery et al., "PaLM", 2022, Section 5).

Cross-entropy does not change where a constant is added to all logits, so nothing holds them, and they may drift until they lose
their precision: the divergence of output logits of Wortsman et al., "Small-scale proxies for large-scale Transformer training
instabilities" (ICLR 2024), which this term prevents there.
"""

import math
from collections.abc import Callable

from torch import Tensor, nn

from .scale_by_sigma import wide


def z_loss(logits: Tensor, coefficient: float = 1e-4, mask: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
    """coefficient * mean(log(Z)^2) with Z = sum_i exp(logits_i): what is added to a cross-entropy.

    The logarithm of Z is taken in at least fp32, by logsumexp, so that no softmax is kept for the backward pass.

    Args:
        logits: (..., classes), as the softmax of the output gets them.
        coefficient: 1e-4 in both papers.
        mask: (...), True where a position counts, as those do that the cross-entropy does not ignore; None: all.
        reduction: "mean" over the positions that count (NaN where none does, as torch's cross-entropy has it) or "sum".

    Returns:
        A scalar, fp32 or float64.

    Raises:
        ValueError: a coefficient below 0 or not finite; another reduction; a mask that has not the logits' positions.
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
        squares = squares.masked_fill(~mask, 0)  # not squares[mask], for which a GPU waits and a compiler stops
    total = squares.sum()
    if reduction == "sum":
        return coefficient * total
    return coefficient * total / (squares.numel() if mask is None else mask.sum())


def check_coefficient(coefficient: float, name: str = "coefficient") -> None:
    """Raises ValueError where it is below 0, or not finite."""
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"{name} = {coefficient!r}: allowed are finite numbers from 0, which is off")


class WithZLoss(nn.Module):
    """loss(logits, target) + z-loss while training, and loss(logits, target) in evaluation, for a loop of your own.

        loss_fn = WithZLoss(nn.CrossEntropyLoss(label_smoothing=0.1))

    Args:
        loss: of a softmax over classes, with the mean over the batch: torch's CrossEntropyLoss, timm's
            LabelSmoothingCrossEntropy and SoftTargetCrossEntropy. Logits are (batch, classes); targets (batch,), of which the
            loss's `ignore_index` does not count, or probabilities (batch, classes).
        coefficient: as for `z_loss`.

    Raises:
        ValueError: as `z_loss`; a binary loss, which has no softmax; one that does not take the mean.
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
