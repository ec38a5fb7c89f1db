"""transformers' GPT-2 -> StableGPT with the options under which it is GPT-2."""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel

from .configuration_stable_gpt import StableGPTConfig
from .conversion import check_equal, from_pretrained_whole, load_whole, tokens_like
from .exporting import export
from .modeling_stable_gpt import StableGPTForCausalLM

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's Conv1D keeps (in, out)


@torch.no_grad()
def from_gpt2(gpt2: GPT2LMHeadModel) -> StableGPTForCausalLM:
    """The same model as a StableGPT, outputs equal to 1e-4, in evaluation mode.

    Raises:
        ValueError: a GPT-2 with cross-attention or another scale of its logits.
    """
    theirs = gpt2.config
    stock = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for option, allowed in stock.items():
        if getattr(theirs, option) != allowed:
            raise ValueError(f"{option} = {getattr(theirs, option)!r}: allowed is {allowed}")
    config = StableGPTConfig(
        **{name: getattr(theirs, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd", "n_inner")},
        **{name: getattr(theirs, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        block_size=theirs.n_positions,
        activation_function=theirs.activation_function,
        dropout=theirs.resid_pdrop,
        bias=True,
        norm="layernorm",
        norm_eps=theirs.layer_norm_epsilon,
        attention="dot",
        init="stock",
        initializer_range=theirs.initializer_range,
        tie_word_embeddings=theirs.tie_word_embeddings,
    )
    model = StableGPTForCausalLM(config).to(gpt2.dtype).eval()
    state = {k: x.T if k.endswith(TRANSPOSED) else x for k, x in gpt2.state_dict().items()}
    load_whole(model, state, "GPT-2")
    tokens = tokens_like(config.vocab_size, min(64, config.block_size)).to(gpt2.device)
    check_equal(model.to(gpt2.device)(tokens).logits, gpt2.eval()(tokens).logits, "GPT-2")
    return model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a GPT-2")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")


def run(args: argparse.Namespace) -> Path:
    kind = AutoConfig.from_pretrained(args.model).model_type
    if kind != "gpt2":
        raise ValueError(f"{args.model} holds a model of type {kind!r}: allowed is 'gpt2'")
    model = from_gpt2(from_pretrained_whole(GPT2LMHeadModel, args.model))
    return export(model, args.out, processors=(AutoTokenizer.from_pretrained(args.model),))
