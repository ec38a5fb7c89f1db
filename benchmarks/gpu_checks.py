"""Correctness on a device against float64 on the CPU: σReparam's layers in training, and the attention's entropy.

Each check yields what it compared, how far apart the two are, |a - b| / |b|, and how far they may be.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_core import attention_entropy, attention_statistics, sigma_reparam
from stable_core.reference import Algorithm1, attention_probabilities, entropy

Finding = tuple[str, float, float]

UPDATES, LR = 5, 0.5
FP32, BF16 = 1e-4, 3e-2  # of float32 the arithmetic lands far below, of bfloat16 an operand has 2^-9


def apart(ours: Tensor, truth: Tensor) -> float:
    """NaN is not close to anything: compare the result with `not ... <=`."""
    return ((ours.detach().cpu().double() - truth).norm() / truth.norm()).item()


class Twin:
    """A layer without bias under σReparam in float64: Algorithm 1 on every block, and plain SGD."""

    def __init__(self, chain: nn.Module) -> None:
        self.W, self.gamma, u = (
            x.detach().cpu().double().requires_grad_() for x in (chain.original, chain[0].gamma, chain[0].u)
        )
        self.rows, self.u = list(chain[0].rows), u.detach()

    def _algorithms(self) -> Iterator[Algorithm1]:
        blocks = self.W.flatten(1).split(self.rows), self.gamma, self.u.split(self.rows)
        return (Algorithm1(*block) for block in zip(*blocks, strict=True))

    def W_hat(self) -> Tensor:
        return torch.cat([algorithm.W_hat() for algorithm in self._algorithms()]).view_as(self.W)

    def update(self) -> None:
        with torch.no_grad():
            for x in (self.W, self.gamma):
                x -= LR * x.grad
                x.grad = None
            algorithms = list(self._algorithms())
            for algorithm in algorithms:
                algorithm.step()
            self.u = torch.cat([algorithm.u for algorithm in algorithms])


def check_layer(
    name: str, layer: nn.Module, shape: tuple[int, ...], device: torch.device, limit: float, autocast: bool = False
) -> Iterator[Finding]:
    """W_hat, the gradients of W and gamma, and u after some updates, of one layer in a model."""
    model = sigma_reparam(nn.ModuleDict({"qkv" if name.startswith("packed") else "layer": layer}).to(device))
    chain = layer.parametrizations.weight
    twin, optimizer = Twin(chain), torch.optim.SGD(model.parameters(), lr=LR)
    x = torch.randn(shape)
    target = torch.randn_like(layer(x.to(device, chain.original.dtype)), device="cpu", dtype=torch.float32)
    apply = F.linear if twin.W.ndim == 2 else partial(F.conv2d, stride=layer.stride)
    precision = torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()
    for update in range(UPDATES):
        with precision:
            y = layer(x.to(device, chain.original.dtype))
        (y.float() - target.to(device)).square().mean().backward()
        (apply(x.double(), twin.W_hat()) - target.double()).square().mean().backward()
        if update == 0:
            with precision:
                yield f"{name}: W_hat", apart(layer.weight, twin.W_hat().detach()), limit
            yield f"{name}: gradient of W", apart(chain.original.grad, twin.W.grad), limit
            yield f"{name}: gradient of gamma", apart(chain[0].gamma.grad, twin.gamma.grad), limit
        optimizer.step()
        optimizer.zero_grad()
        twin.update()
    yield f"{name}: u after {UPDATES} updates", apart(chain[0].u, twin.u), limit


def check_entropy(name: str, device: torch.device, dtype: torch.dtype, is_causal: bool) -> Iterator[Finding]:
    """Entropy and statistics; bfloat16's q and k are exact in float64, so that there too only fp32 rounds."""
    q, k = torch.randn(2, 2, 3, 257, 64).to(dtype) * 2
    scale = 64**-0.5
    dense = attention_probabilities(q.double(), k.double(), scale=scale, is_causal=is_causal)
    on_device = (q.to(device), k.to(device))
    yield (
        f"entropy, {name}",
        apart(attention_entropy(*on_device, scale=scale, is_causal=is_causal), entropy(dense)),
        FP32,
    )
    rows = attention_statistics(*on_device, scale=scale, is_causal=is_causal)
    logits = scale * q.double() @ k.double().mT
    if is_causal:
        logits = logits.masked_fill(dense == 0, -torch.inf)
    yield f"statistics, {name}: entropy", apart(rows.entropy, entropy(dense)), FP32
    yield f"statistics, {name}: largest logit", apart(rows.max_logit, logits.amax(-1)), FP32
    yield f"statistics, {name}: keys", apart(rows.keys, (dense > 0).sum(-1).double()), 0.0


def findings(device: torch.device) -> Iterator[Finding]:
    """Of every check, each from the same seed."""
    bf16 = torch.bfloat16
    bare = partial(nn.Linear, bias=False)
    checks: list[Callable[[], Iterator[Finding]]] = [
        partial(check_layer, "Linear", bare(96, 80), (64, 96), device, FP32),
        partial(check_layer, "wide Linear", bare(1024, 768), (64, 1024), device, FP32),
        partial(check_layer, "packed q, k, v", bare(48, 144), (64, 48), device, FP32),
        partial(check_layer, "odd shape", bare(129, 67), (64, 129), device, FP32),
        partial(check_layer, "Conv2d", nn.Conv2d(3, 70, 4, 4, bias=False), (32, 3, 16, 16), device, FP32),
        partial(check_layer, "Linear of bfloat16", bare(96, 80, dtype=bf16), (64, 96), device, BF16),
        partial(check_layer, "Linear, autocast", bare(96, 80), (64, 96), device, BF16, True),
        partial(check_layer, "packed, autocast", bare(48, 144), (64, 48), device, BF16, True),
        partial(check_entropy, "fp32", device, torch.float32, False),
        partial(check_entropy, "fp32, causal", device, torch.float32, True),
        partial(check_entropy, "bfloat16, causal", device, bf16, True),
        # Kernels of our own belong here: the same checks under the setting that chooses them.
    ]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # a convolution's own rounding is not at issue
        for check in checks:
            torch.manual_seed(0)
            yield from check()
