"""A norm and a transform of q and k that the library does not have, as a user writes them in a module of their own."""

import torch
from torch import Tensor, nn

from stable_core.attentions import QueryKey
from stable_core.registry import register_attention, register_norm


class Tanh(nn.Module):
    """gain * tanh(x) in the place of a norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x.tanh()


def shifted(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of (q + 1) . (k - 1)."""
    return q + 1, k - 1


@register_norm("tanh", "gain tanh(x)")
def tanh(dim, options, **made):
    return Tanh(dim)


@register_attention("shifted", "(q + 1) . (k - 1) / sqrt(d1)")
def shifted_attention(head_dim, options, **made):
    return QueryKey(nn.Identity(), nn.Identity(), shifted)
