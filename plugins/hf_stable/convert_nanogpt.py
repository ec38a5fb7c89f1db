"""A nanoGPT checkpoint -> StableGPT."""

import argparse
import importlib.util
import inspect
import sys
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer

from stable_core.checkpoint_file import read_checkpoint
from stable_core.folding import fold_state_dict
from stable_core.options import NAMES, Options, renamed
from stable_core.unfolding import is_plain

from .character_tokenizer import character_tokenizer
from .configuration_stable_gpt import StableGPTConfig
from .conversion import check_equal, load_whole, tokens_like
from .exporting import export
from .modeling_stable_gpt import StableGPTForCausalLM

UPSTREAM = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
ALLOWED = (*UPSTREAM, *NAMES, "z_loss")  # those after the first are nanogpt_patch's


def from_nanogpt(checkpoint: dict) -> StableGPTForCausalLM:
    """What nanoGPT's train.py writes to ckpt.pt -> the same model as a StableGPT, in evaluation mode.

    Layers that a rescue has reparametrised, of which the settings say nothing, are folded.

    Raises:
        ValueError: no checkpoint of nanoGPT; one with a setting that is neither upstream's nor nanogpt_patch's.
    """
    whole = isinstance(checkpoint, dict) and {"model", "model_args"} <= checkpoint.keys()
    if not whole or not all(isinstance(checkpoint[name], dict) for name in ("model", "model_args")):
        raise ValueError("no checkpoint of nanoGPT: it holds no 'model' and 'model_args'")
    args = {**vars(Options()), **renamed(checkpoint["model_args"])}  # nanoGPT's own GPT is what they are by default
    for name in args:
        if name not in ALLOWED:
            raise ValueError(f"model_args holds {name}: allowed are {', '.join(ALLOWED)}")
    try:
        config = StableGPTConfig(**args)
    except StrictDataclassError as error:
        raise ValueError(f"model_args: {' '.join(str(error).split())}") from error
    model = StableGPTForCausalLM(config).eval()
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
    if config.reparam == "none" and not is_plain(state):
        state = fold_state_dict(state)
    # Before torch 2 nanoGPT kept the causal mask as a buffer.
    load_whole(model, {name: x for name, x in state.items() if not name.endswith(".attn.bias")}, "nanoGPT")
    return model


@torch.no_grad()
def check_against(model: StableGPTForCausalLM, checkpoint: dict, code: Path) -> float:
    """The largest difference from the `GPT` of a nanoGPT checkout's model.py; raises ValueError above 1e-4."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", code)
    if spec is None or not code.is_file():
        raise ValueError(f"{code}: no model.py of nanoGPT")
    upstream = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(upstream)
    args = renamed(checkpoint["model_args"])
    if strange := args.keys() - inspect.signature(upstream.GPTConfig).parameters.keys():
        raise ValueError(f"{code}: its GPT has no {min(strange)}: for a checkpoint of nanogpt_patch give its model.py")
    gpt = upstream.GPT(upstream.GPTConfig(**args)).eval()
    gpt.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()})
    tokens = tokens_like(model.config.vocab_size, min(64, model.config.block_size))
    theirs, _ = gpt(tokens, targets=tokens)  # without targets it gives the last token's logits alone
    return check_equal(model(tokens).logits, theirs, "nanoGPT")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="ckpt.pt of nanoGPT's train.py")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--code", type=Path, metavar="MODEL_PY", help="nanoGPT's model.py, to compare outputs with")
    parser.add_argument("--tokenizer", metavar="NAME", help="tokenizer to save along: gpt2, a folder, or meta.pkl")


def run(args: argparse.Namespace) -> Path:
    checkpoint = read_checkpoint(args.checkpoint)
    model = from_nanogpt(checkpoint)
    if args.code is not None:
        check_against(model, checkpoint, args.code)
    return export(model, args.out, processors=_tokenizers(args.tokenizer, model.config.vocab_size))


def _tokenizers(name: str | None, vocab_size: int) -> tuple:
    if name is None:
        ways = "--tokenizer gpt2 (from its hub; nanoGPT's own BPE), or --tokenizer data/NAME/meta.pkl for characters"
        print(f"convert: no tokenizer is saved along: {ways}", file=sys.stderr)
        return ()
    if Path(name).suffix == ".pkl":
        return (character_tokenizer(Path(name), vocab_size),)
    return (AutoTokenizer.from_pretrained(name),)
