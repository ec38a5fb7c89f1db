"""What each of two processes does in test_simclr.py; apart from it, as a new process imports what it needs anew."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recipes.simclr.loss import contrastive
from recipes.simclr.online import OnlineProbe

FEATURES = torch.randn(5, 12, 6, generator=torch.Generator().manual_seed(1))  # of five updates
LABELS = torch.arange(12) % 3


def projected() -> tuple[nn.Module, Tensor]:
    """A model, and two views of eight images."""
    torch.manual_seed(0)
    return nn.Linear(6, 4), torch.randn(2, 8, 6)


def nt_xent_of_half(rank: int, folder: str) -> None:
    """Saves the loss and the gradients of the process that has half of the images, and the probe that learned from its half."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, views = projected()
    wrapped = nn.parallel.DistributedDataParallel(model)
    loss = contrastive(0.1)(wrapped, [views.chunk(2, dim=1)[rank].unbind(), None])
    loss.backward()
    torch.save((loss.detach(), model.weight.grad, model.bias.grad), f"{folder}/{rank}.pt")
    probe = OnlineProbe(6, 3, torch.device("cpu"))
    for batch in FEATURES:
        probe.learn(batch.chunk(2)[rank], LABELS.chunk(2)[rank])
    torch.save(probe.state_dict(), f"{folder}/probe-{rank}.pt")
    dist.destroy_process_group()
