"""A saved reparametrised model -> plain weights: this plugin's models with their source, any other as transformers has it."""

import argparse
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

import hf_stable

from .exporting import export

PROCESSORS = {"tokenizer_config.json": AutoTokenizer, "preprocessor_config.json": AutoImageProcessor}


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
    processors = [auto.from_pretrained(args.model) for file, auto in PROCESSORS.items() if (args.model / file).exists()]
    return export(cls.from_pretrained(args.model), args.out, folded=True, processors=tuple(processors))
