"""A linear probe that learns beside pretraining, for its accuracy after each epoch [σ, Figures 4 to 6, 10, 11]."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

LR = 3e-3


class OnlineProbe(nn.Module):
    """features (batch, dim) -> logits: a BatchNorm without parameters, and a linear layer that starts from zero.

    It sees the encoder's features, and the encoder nothing of it. In every process it learns from the features of all of them,
    by Adam at 3e-3, and so is the same in each.
    """

    def __init__(self, dim: int, num_classes: int, device: torch.device) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, device=device)
        self.head = nn.Linear(dim, num_classes, device=device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=LR)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.norm(features))

    def learn(self, features: Tensor, labels: Tensor) -> None:
        """One update, from this process's share of a batch."""
        features, labels = everyones(features.detach().float()), everyones(labels)
        self.train()
        # the mean over the first ten batches, so that where statistics start from is forgotten; then a moving average
        self.norm.momentum = max(0.1, 1 / (int(self.norm.num_batches_tracked) + 1))
        with torch.autocast(features.device.type, enabled=False):
            F.cross_entropy(self(features), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_extra_state(self) -> dict:
        """For checkpoints, which take what `state_dict` gives."""
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict) -> None:
        self.optimizer.load_state_dict(state)


def everyones(x: Tensor) -> Tensor:
    """x of all processes."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
