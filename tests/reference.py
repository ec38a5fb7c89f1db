"""The papers' algorithms written out slowly: what the fast code in the library is tested equal to."""

import torch
from torch import Tensor


class Algorithm1:
    """σReparam of one weight, line by line from Algorithm 1 [σ, App. C]; autograd does the backward pass.

    W (d, c); gamma (1,); u (d,); v (c,). `step` is the part under `if training`, which the paper runs once per update.
    """

    def __init__(self, W: Tensor, gamma: Tensor, u: Tensor, v: Tensor) -> None:
        self.W, self.gamma, self.u, self.v = W, gamma, u, v

    def step(self) -> None:
        with torch.no_grad():
            u = self.W.mv(self.v)
            self.u = u / u.norm(dim=0)
            v = self.W.T.mv(self.u)
            self.v = v / v.norm(dim=0)

    def sigma(self) -> Tensor:
        return torch.einsum("d,dc,c->", self.u, self.W, self.v)

    def W_hat(self) -> Tensor:
        return self.gamma / self.sigma() * self.W


def numerical_gradient(f, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Central differences of the scalar f() with respect to every entry of x, which f reads; use float64."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        entry = x.data.view(-1)[i : i + 1]
        value = entry.clone()
        entry.copy_(value + eps)
        above = f()
        entry.copy_(value - eps)
        below = f()
        entry.copy_(value)
        gradient.view(-1)[i] = (above - below) / (2 * eps)
    return gradient
