"""NT-Xent, the loss of SimCLR: lightly's, of which a batch's negatives come from all processes."""

from collections.abc import Callable

import torch
from lightly.loss import NTXentLoss
from torch import Tensor, nn


def contrastive(temperature: float) -> Callable[[nn.Module, list], Tensor]:
    """(model, ((first views, second views), labels)) -> the mean loss of this process's views, in full precision.

    Of a view i and the other one j of its image, -log(exp(s(i, j) / temperature) / sum over k != i of exp(s(i, k) /
    temperature)); s is the cosine of what the model makes of them, and k runs over the views of all processes.
    """
    nt_xent = NTXentLoss(temperature, gather_distributed=True)

    def loss_of(model: nn.Module, batch: list) -> Tensor:
        (first, second), _ = batch
        z = model(torch.cat((first, second)))
        with torch.autocast(z.device.type, enabled=False):
            return nt_xent(*z.float().chunk(2))

    return loss_of
