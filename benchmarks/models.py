"""The models that are held against each other, ours beside what a user would take instead, and one training step of each."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import fairseq_sigma  # noqa: F401  registers the archs
import timm_stable  # noqa: F401  registers the models
from nanogpt_patch.model import GPT, STOCK, GPTConfig
from stable_core import recompute
from tests.reference import Algorithm1

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

    def build(change: Callable[[nn.Module], None]) -> nn.Module:
        names = [n for n, module in sigma().named_modules() if parametrize.is_parametrized(module)]
        model = plain()
        for layer in map(model.get_submodule, names):
            change(layer)
        return model

    def algorithm_1(layer: nn.Module) -> None:
        parametrize.register_parametrization(layer, "weight", PlainAlgorithm1(layer.weight))

    return {
        f"torch spectral_norm + {name}": partial(build, spectral_norm),
        f"plain Algorithm 1 + {name}": partial(build, algorithm_1),
    }


# ------------------------------------------------------------------------------------------------ translation


class Task:
    """A vocabulary, which is what fairseq's models want of a task."""

    source_dictionary = target_dictionary = Dictionary()


for word in range(8000 - len(Task.source_dictionary)):
    Task.source_dictionary.add_symbol(str(word))

SENTENCE = 25  # tokens


def _translation_model(arch: str, layers: int, width: int, **settings) -> nn.Module:
    args = Namespace(
        encoder_embed_dim=width,
        encoder_ffn_embed_dim=4 * width,
        encoder_layers=layers,
        decoder_layers=layers,
        max_source_positions=4096,
        max_target_positions=4096,
        **settings,
    )
    ARCH_CONFIG_REGISTRY[arch](args)
    return ARCH_MODEL_REGISTRY[arch].build_model(args, Task)


def translation(layers: int, width: int = 512, sentence: int = SENTENCE) -> Family:
    """fairseq's encoder-decoder, 8,000 words; batches of so many target tokens in sentences of one length."""
    build = partial(_translation_model, layers=layers, width=width)
    plain, sigma = partial(build, "postln_transformer_6l"), partial(build, "sigma_postln_transformer_6l")

    def batch(tokens: int, generator: torch.Generator) -> Batch:
        shape = (max(1, tokens // sentence), sentence)
        words = torch.randint(4, len(Task.source_dictionary), (3, *shape), generator=generator)
        return *words, torch.full(shape[:1], sentence)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        source, previous, target, lengths = batch
        return _cross_entropy(model(source, lengths, previous)[0], target)

    variants = {
        "pre-LN": partial(build, "preln_transformer_6l"),
        "post-LN": plain,
        "σReparam, no LayerNorm": partial(sigma, residual="none"),
        "σReparam + post-LN": sigma,
        "σReparam, recomputed + post-LN": lambda: recompute(sigma()),
        **peers(plain, sigma, "post-LN"),
    }
    return Family(variants, ["pre-LN", "post-LN"], batch, loss, "tokens", (400, 1600))


# ----------------------------------------------------------------------------------------------------- images


def vit(size: str) -> Family:
    plain, sigma = (partial(timm.create_model, f"{kind}_{size}_patch16_224") for kind in ("vit", "sigma_vit"))
    preln = partial(timm.create_model, f"sigma_vit_{size}_patch16_224_preln")

    def batch(images: int, generator: torch.Generator) -> Batch:
        return torch.randn(images, 3, 224, 224, generator=generator), torch.arange(images)

    variants = {
        "pre-LN": plain,
        "σReparam, no LayerNorm": sigma,
        "σReparam + pre-LN": preln,
        "StableViT": partial(timm.create_model, f"stablevit_{size}"),
        **peers(plain, preln, "pre-LN"),
    }
    return Family(variants, ["pre-LN"], batch, lambda model, xy: _cross_entropy(model(xy[0]), xy[1]), "images", (4, 16))


# ----------------------------------------------------------------------------------------------------- language


def gpt() -> Family:
    """nanoGPT's GPT-2 small, sequences of 256 tokens."""

    def build(**settings) -> nn.Module:
        return GPT(GPTConfig(block_size=256, **settings))

    def batch(tokens: int, generator: torch.Generator) -> Batch:
        return tuple(torch.randint(50257, (2, max(1, tokens // 256), 256), generator=generator))

    plain, sigma = partial(build, **STOCK), partial(build, **STOCK | {"reparam": "sigma"})
    variants = {
        "pre-LN": plain,
        "σReparam, no LayerNorm": partial(build, **STOCK | {"reparam": "sigma", "norm": "none"}),
        "σReparam + pre-LN": sigma,
        "StableGPT": build,
        **peers(plain, sigma, "pre-LN"),
    }
    return Family(variants, ["pre-LN"], batch, lambda model, xy: model(*xy)[1], "tokens", (256, 1024))


FAMILIES = {
    "translation_6l": partial(translation, 6),
    "translation_18l": partial(translation, 18),
    "vit_small": partial(vit, "small"),
    "vit_base": partial(vit, "base"),
    "gpt_small": gpt,
}


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())


class Step:
    """One update with torch's Adam on a fixed batch."""

    def __init__(self, family: Family, label: str, size: int, device: torch.device, autocast: bool = False) -> None:
        torch.manual_seed(0)
        self.model = family.variants[label]().to(device).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.batch = tuple(x.to(device) for x in family.batch(size, torch.Generator().manual_seed(0)))
        self.loss = family.loss
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=autocast)

    def __call__(self) -> None:
        with self.autocast():
            loss = self.loss(self.model, self.batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
