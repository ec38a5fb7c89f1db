"""The translation model of the Hugging Face plugin: fairseq's blocks where fairseq is not."""

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.families import Batch, Family, peers, reparametrised
from hf_stable import SigmaTransformerConfig, SigmaTransformerForConditionalGeneration
from stable_core import recompute


def translation(layers: int, width: int = 512, sentence: int = 25, vocab_size: int = 8000) -> Family:
    """An encoder and a decoder of so many layers; batches of so many target tokens in sentences of one length."""

    def plain(residual: str, norm: str = "layernorm") -> nn.Module:
        sides = {"encoder_layers": layers, "encoder_ffn_dim": 4 * width, "encoder_attention_heads": max(1, width // 64)}
        sides |= {name.replace("encoder", "decoder"): value for name, value in sides.items()}
        methods = {"residual": residual, "norm": norm, "reparam": "none"}
        config = SigmaTransformerConfig(vocab_size=vocab_size, d_model=width, **methods, **sides)
        return SigmaTransformerForConditionalGeneration(config)

    def sigma(residual: str, norm: str = "layernorm") -> nn.Module:
        return reparametrised(plain(residual, norm), filter_fn=lambda module, name: ".layers." in name)

    def batch(tokens: int, generator: torch.Generator) -> Batch:
        return tuple(torch.randint(4, vocab_size, (3, max(1, tokens // sentence), sentence), generator=generator))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        source, previous, target = batch
        return model(source, decoder_input_ids=previous, labels=target).loss

    variants = {
        "pre-LN": partial(plain, "pre-ln"),
        "post-LN": partial(plain, "post-ln"),
        "σReparam, no LayerNorm": partial(sigma, "pre-ln", "none"),
        "σReparam + pre-LN": partial(sigma, "pre-ln"),
        "σReparam + post-LN": partial(sigma, "post-ln"),
        "σReparam, recomputed + post-LN": lambda: recompute(sigma("post-ln")),
        **peers(partial(plain, "post-ln"), partial(sigma, "post-ln"), "post-LN"),
    }
    return Family(variants, ["pre-LN", "post-LN"], batch, loss, "tokens", (400, 1600))
