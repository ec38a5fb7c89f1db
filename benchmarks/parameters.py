"""How many parameters every named architecture has, beside the papers' counts: `python -m benchmarks.parameters`.

Models are built on the meta device, without memory for their weights. What is printed is benchmarks/results/parameters.md.
"""

import contextlib
import io
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import timm
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from torch import nn

import fairseq_sigma  # noqa: F401  registers the archs
import timm_stable  # noqa: F401  registers the models
from benchmarks.markdown import table
from fairseq_sigma.ctc_model import DEPTHS as SPEECH_DEPTHS
from fairseq_sigma.language_model import FAMILIES as LM_FAMILIES
from fairseq_sigma.transformer import DEPTHS, FAMILIES
from hf_stable import (
    SigmaViTConfig,
    SigmaViTForImageClassification,
    StableGPTConfig,
    StableGPTForCausalLM,
    StableViTConfig,
    StableViTForImageClassification,
)
from nanogpt_patch.launch import CONFIGS, _assigned
from nanogpt_patch.model import GPT, SETTINGS, GPTConfig

# [ST, Table 1], millions
STABLE_VIT = {"small": None, "base": None, "large": 307, "huge": 632, "giant": 1011, "200": 1439}
STABLE_GPT = {"small": 124, "medium": 350, "large": 774, "200": None}  # [ST, Table 2]
SIGMA_VIT = ("small_patch16", "base_patch16", "large_patch16", "huge_patch14")
SUBWORDS, WORDS, LETTERS = 40_000, 267_740, 28  # of the recipes' vocabularies, without fairseq's four of its own


def count(build: Callable[[], nn.Module]) -> float:
    """Learned parameters in millions, a tied one once."""
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
        model = build()
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6


def vits() -> str:
    """The ViTs of timm and Hugging Face."""
    rows = [("ViT, millions", "timm", "Hugging Face", "the paper", "difference")]
    for size, paper in STABLE_VIT.items():
        config = StableViTConfig.preset(size, num_labels=1000)
        timms = count(lambda size=size: timm.create_model(f"stablevit_{size}"))
        hf = count(lambda config=config: StableViTForImageClassification(config))
        rows.append((f"`stablevit_{size}`", timms, hf, *beside(timms, paper)))
    for size in SIGMA_VIT:
        config = SigmaViTConfig.preset(size.partition("_")[0], num_labels=1000)
        for variant, norm in (("", "none"), ("_preln", "layernorm")):
            name = f"sigma_vit_{size}_224{variant}"
            config.norm = norm
            timms = count(lambda name=name: timm.create_model(name))
            hf = count(lambda config=config: SigmaViTForImageClassification(config))
            rows.append((f"`{name}`", timms, hf, *beside(timms, None)))
    return table(*rows)


def beside(ours: float, paper: int | None) -> tuple[str, str]:
    return ("-", "-") if paper is None else (f"{paper:,}", f"{100 * (ours / paper - 1):+.2f} %")


def gpts() -> str:
    """The GPTs of Hugging Face, with GPT-2's vocabulary, and of nanoGPT, with its own."""
    rows = [("GPT, millions", "nanoGPT", "Hugging Face", "the paper", "difference")]
    for size, paper in STABLE_GPT.items():
        for kind in ("stablegpt", "gpt2"):
            configs = ["train_gpt", *([] if size == "small" else [size]), *([] if kind == "stablegpt" else ["stock"])]
            assigned = {}
            for config in configs:
                assigned |= _assigned((CONFIGS / f"{config}.py").read_text())
            fields = {name: assigned[name] for name in (*SETTINGS, "n_layer", "n_head", "n_embd") if name in assigned}
            ours, hf = count(lambda fields=fields: GPT(GPTConfig(**fields, bias=False))), "-"
            if size != "200" and kind == "stablegpt":
                hf = count(lambda size=size: StableGPTForCausalLM(StableGPTConfig.preset(size[0].upper())))
            rows.append((" ".join(f"`{config}.py`" for config in configs), ours, hf, *beside(ours, paper)))
    return table(*rows)


def fairseq(arch: str, symbols: int, **settings) -> float:
    args, words = Namespace(**settings), vocabulary(symbols)
    ARCH_CONFIG_REGISTRY[arch](args)
    task = SimpleNamespace(source_dictionary=words, target_dictionary=words, cfg=SimpleNamespace(mel_bins=80))
    return count(lambda: ARCH_MODEL_REGISTRY[arch].build_model(args, task))


@cache
def vocabulary(symbols: int) -> Dictionary:
    dictionary = Dictionary()
    for i in range(symbols):
        dictionary.add_symbol(f"w{i}")
    return dictionary


def translation() -> str:
    """The 20 archs, as deep as each is registered."""

    def parameters(arch: str) -> float:
        ARCH_CONFIG_REGISTRY[arch](args := Namespace())
        return by_depth(
            lambda n: fairseq(arch, SUBWORDS, share_all_embeddings=True, encoder_layers=n, decoder_layers=n),
            args.encoder_layers,
        )

    rows = [("translation, millions", *(f"{depth}L-{depth}L" for depth in DEPTHS))]
    rows += [
        (f"`{family.format('N')}`", *(parameters(family.format(depth)) for depth in DEPTHS)) for family in FAMILIES
    ]
    return table(*rows)


def language_and_speech() -> str:
    """The other archs of fairseq."""
    rows = [("language model, speech, millions", "parameters")]
    for family in LM_FAMILIES:
        for suffix in ("", "_32l"):
            rows.append((f"`{family}{suffix}`", fairseq(family + suffix, WORDS, tokens_per_sample=512)))
    for depth in SPEECH_DEPTHS:
        arch = f"sigma_transformer_ctc_{depth}l"
        rows.append((f"`{arch}`", fairseq(arch, LETTERS)))
    return table(*rows)


EVERYTHING = {"norm": "layernorm", "attention": "qknorm", "init_values": 0.1, "reg_tokens": 4, "pre_norm": True}
OPTIONS = {
    "as in Table 1": {},
    "patch 14": {"patch_size": 14},
    "patch 16": {"patch_size": 16},
    "images of 384": {"img_size": 384},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no position table": {"pos_embed": "none"},
    "no biases of q, k, v and projection": {"qkv_bias": False, "proj_bias": False},
    "no head": {"num_classes": 0},
    "a head of 21,843 classes": {"num_classes": 21843},
    "LayerNorm, QK-norm, LayerScale, 4 registers, pre-norm": EVERYTHING,
}


def stablevit_options() -> str:
    """What one option or another of timm's makes of StableViT's count."""
    sizes = [size for size, paper in STABLE_VIT.items() if paper]
    rows = [("StableViT, millions", *sizes), ("[ST, Table 1]", *(f"{STABLE_VIT[size]:,}" for size in sizes))]
    for name, options in OPTIONS.items():
        rows.append((name, *(with_options(size, options) for size in sizes)))
    return table(*rows)


def with_options(size: str, options: dict) -> float:
    depth = StableViTConfig.preset(size).num_hidden_layers
    return by_depth(lambda n: count(lambda: timm.create_model(f"stablevit_{size}", depth=n, **options)), depth)


def by_depth(parameters: Callable[[int], float], depth: int) -> float:
    """From one block and two, as every block has the same."""
    one, two = parameters(1), parameters(2)
    return one + (depth - 1) * (two - one)


def page() -> str:
    """All tables, in Markdown."""
    return f"""# How many parameters

Written by `python -m benchmarks.parameters`: the learned parameters of every named architecture, a tied weight once, beside the
Stable-Transformer paper's counts (the other paper gives none).

## Vision
1,000 classes, 224 pixels. Hugging Face has them as `StableViTConfig.preset("large")` and its like.

{vits()}

**StableViT-L and -200 cannot be had from what the paper says**: no combination of timm's options has all four counts within 0.3
%. We keep Table 1's sizes (with patches of 14 for 200, where it gives none). One option at a time:

{stablevit_options()}

## Language models
nanoGPT's vocabulary is 50,304, GPT-2's 50,257, and position tables count.

{gpts()}

## fairseq
The vocabulary is 40,000 joint subwords in translation, and WikiText-103's 267,744 words in language models. Speech has letters
and 80 mel bins.

{translation()}

{language_and_speech()}
"""


def main() -> None:
    print(page(), end="")


if __name__ == "__main__":
    main()
