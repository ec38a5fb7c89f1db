"""Models that are held against each other, ours beside what a user would take instead, and one training step of each."""

import functools
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import timm_stable  # noqa: F401  registers the models
from nanogpt_patch.model import GPT, STOCK, GPTConfig
from stable_core import SigmaReparamConfig, recompute, sigma_reparam
from stable_core.reference import Algorithm1
from stable_core.targets import FilterFn

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Family:
    """Models that do the same work.

    Attributes:
        variants: builders by label.
        bases: the labels of the plain models, to which the others are held.
        batch: of a size, from a generator.
        loss: of a model on a batch.
        unit: of the size.
        sizes: that are measured by default.
    """

    variants: dict[str, Callable[[], nn.Module]]
    bases: list[str]
    batch: Callable[[int, torch.Generator], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    unit: str
    sizes: tuple[int, ...]

    def on(self, device: torch.device, labels: list[str] | None = None) -> "Family":
        """The same models, or those with these labels, built where they run: drawing a large one on the CPU takes seconds."""

        def build(make: Callable[[], nn.Module]) -> nn.Module:
            with device:
                return make()

        variants = {label: partial(build, self.variants[label]) for label in labels or self.variants}
        return replace(self, variants=variants, bases=[base for base in self.bases if base in variants])


class PlainAlgorithm1(nn.Module):
    """Algorithm 1 as the paper prints it, in every forward pass, with autograd's backward pass."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1))
        self.register_buffer("u", nn.functional.normalize(torch.randn(W.shape[0]), dim=0))
        self.register_buffer("v", nn.functional.normalize(torch.randn(W.flatten(1).shape[1]), dim=0))

    def forward(self, W: Tensor) -> Tensor:
        algorithm = Algorithm1(W.flatten(1), self.gamma, self.u, self.v)
        if self.training:
            algorithm.step()
            self.u, self.v = algorithm.u, algorithm.v
        return algorithm.W_hat().view_as(W)


def peers(plain: Callable[[], nn.Module], sigma: Callable[[], nn.Module], name: str) -> dict[str, Callable]:
    """torch's spectral_norm and a plain Algorithm 1 on the layers of `plain` that are reparametrised in `sigma`."""

    @functools.cache
    def names() -> list[str]:
        return [name for name, module in sigma().named_modules() if parametrize.is_parametrized(module)]

    def build(change: Callable[[nn.Module], None]) -> nn.Module:
        model = plain()
        for layer in map(model.get_submodule, names()):
            change(layer)
        return model

    def algorithm_1(layer: nn.Module) -> None:
        parametrize.register_parametrization(layer, "weight", PlainAlgorithm1(layer.weight))

    return {
        f"torch spectral_norm + {name}": partial(build, spectral_norm),
        f"plain Algorithm 1 + {name}": partial(build, algorithm_1),
    }


def reparametrised(
    model: nn.Module, config: SigmaReparamConfig | None = None, filter_fn: FilterFn | None = None
) -> nn.Module:
    """`model` with σReparam, which draws on the CPU, also within the context of a device on which models are built."""
    with torch.device("cpu"):
        return sigma_reparam(model, config, filter_fn)


def reparametrised_bytes(model: nn.Module) -> int:
    """Bytes of the weights under a parametrization, in fp32."""
    return sum(
        4 * chain.original.numel()
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for chain in module.parametrizations.values()
    )


def vit(size: str, **settings) -> Family:
    """timm's ViT, patches of 16; the settings are timm's."""
    side = settings.get("img_size", 224)

    def plain(**more) -> nn.Module:
        return timm.create_model(f"vit_{size}_patch16_224", **settings, **more)

    def sigma(**more) -> nn.Module:
        return reparametrised(plain(**more), SigmaReparamConfig(gamma_init="spectral"))

    def batch(images: int, generator: torch.Generator) -> Batch:
        return torch.randn(images, 3, side, side, generator=generator), torch.arange(images)

    variants = {
        "pre-LN": plain,
        "σReparam, no LayerNorm": partial(sigma, norm_layer=nn.Identity),
        "σReparam + pre-LN": sigma,
        "QK-norm + pre-LN": partial(plain, qk_norm=True),
        "StableViT": partial(timm.create_model, f"stablevit_{size}", **settings),
        **peers(plain, sigma, "pre-LN"),
    }
    return Family(variants, ["pre-LN"], batch, lambda model, xy: cross_entropy(model(xy[0]), xy[1]), "images", (4, 16))


def gpt(sequence: int = 256, **settings) -> Family:
    """nanoGPT's GPT, GPT-2 small if the settings say no other size."""

    def build(**more) -> nn.Module:
        with redirect_stdout(io.StringIO()):  # it tells its number of parameters
            return GPT(GPTConfig(block_size=sequence, **settings, **more))

    def sigma(**more) -> nn.Module:
        model = build(**STOCK | more)
        reparametrised(model.transformer.h)
        return model

    def batch(tokens: int, generator: torch.Generator) -> Batch:
        shape = (max(1, tokens // sequence), min(tokens, sequence))
        return tuple(torch.randint(settings.get("vocab_size", 50257), (2, *shape), generator=generator))

    plain = partial(build, **STOCK)
    variants = {
        "pre-LN": plain,
        "σReparam, no LayerNorm": partial(sigma, norm="none"),
        "σReparam + pre-LN": sigma,
        "σReparam, recomputed + pre-LN": lambda: recompute(sigma()),
        "QK-norm + pre-LN": partial(build, **STOCK | {"attention": "qknorm"}),
        "StableGPT": build,
        **peers(plain, sigma, "pre-LN"),
    }
    return Family(variants, ["pre-LN"], batch, lambda model, xy: model(*xy)[1], "tokens", (256, 1024))


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-4)


class Step:
    """One update on a fixed batch, with torch's Adam or the optimizer that is made of the model."""

    def __init__(
        self,
        family: Family,
        label: str,
        size: int,
        device: torch.device,
        autocast: bool = False,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam,
        compiler: str | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.model = family.variants[label]().to(device).train()
        self.optimizer = optimizer(self.model)
        self.loss, self.device = family.loss, device
        self.feed(family, size)
        if compiler is not None:
            self.model.compile(backend=compiler)
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=autocast)

    def feed(self, family: Family, size: int) -> None:
        """From now on it learns from a batch of this size."""
        self.batch = tuple(x.to(self.device) for x in family.batch(size, torch.Generator().manual_seed(0)))

    def __call__(self) -> Tensor:
        """The loss before the update."""
        with self.autocast():
            loss = self.loss(self.model, self.batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()
