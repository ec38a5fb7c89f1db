"""A saved reparametrised model -> plain weights: this plugin's models with their source, any other as transformers has it."""

import argparse
from pathlib import Path

import transformers
from transformers import AutoConfig

import hf_stable

from .conversion import from_pretrained_whole
from .exporting import export

# Weights and the state of training; all else goes along: tokenizers and processors, whatever their kind.
LEFT_OUT = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", "trainer_state.json", ".jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder that save_pretrained or the Trainer wrote")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")


def run(args: argparse.Namespace) -> Path:
    if not (args.model / "config.json").is_file():
        raise ValueError(f"{args.model}: no config.json, so no folder of save_pretrained")
    name = (AutoConfig.from_pretrained(args.model).architectures or ["a config.json without architectures"])[0]
    cls = getattr(hf_stable, name, None) or getattr(transformers, name, None)
    if cls is None:
        raise ValueError(f"{args.model} holds a {name}: allowed are the models of hf_stable and of transformers")
    files = [path for path in args.model.iterdir() if path.is_file() and not path.name.endswith(LEFT_OUT)]
    return export(from_pretrained_whole(cls, args.model), args.out, folded=True, files=files)
