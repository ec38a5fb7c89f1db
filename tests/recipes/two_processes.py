"""What each of two processes does in test_simclr.py; apart from it, as a new process imports what it needs anew."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recipes.simclr.loss import contrastive


def projected() -> tuple[nn.Module, Tensor]:
    """A model, and two views of eight images."""
    torch.manual_seed(0)
    return nn.Linear(6, 4), torch.randn(2, 8, 6)


def nt_xent_of_half(rank: int, folder: str) -> None:
    """Saves the loss and the gradients of the process that has half of the images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, views = projected()
    wrapped = nn.parallel.DistributedDataParallel(model)
    loss = contrastive(0.1)(wrapped, [views.chunk(2, dim=1)[rank].unbind(), None])
    loss.backward()
    torch.save((loss.detach(), model.weight.grad, model.bias.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
