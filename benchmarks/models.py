"""fairseq's translation models, and the list of all that the benchmarks of a CPU measure."""

from argparse import Namespace
from functools import partial

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from torch import Tensor, nn

import fairseq_sigma  # noqa: F401  registers the archs
from benchmarks.families import Batch, Family, cross_entropy, gpt, peers, vit
from stable_core import recompute


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
        return cross_entropy(model(source, lengths, previous)[0], target)

    variants = {
        "pre-LN": partial(build, "preln_transformer_6l"),
        "post-LN": plain,
        "σReparam, no LayerNorm": partial(sigma, residual="none"),
        "σReparam + post-LN": sigma,
        "σReparam, recomputed + post-LN": lambda: recompute(sigma()),
        **peers(plain, sigma, "post-LN"),
    }
    return Family(variants, ["pre-LN", "post-LN"], batch, loss, "tokens", (400, 1600))


FAMILIES = {
    "translation_6l": partial(translation, 6),
    "translation_18l": partial(translation, 18),
    "vit_small": partial(vit, "small"),
    "vit_base": partial(vit, "base"),
    "gpt_small": gpt,
}
