"""Text to a folder of tokens: train.bin and val.bin as nanoGPT writes them, and their tokenizer.

OpenWebText with GPT-2's tokenizer, split as nanoGPT splits it (about 17 GB); or your text, with a byte-level BPE trained on it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recipes.command import command

END = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Settings:
    output: Path
    """folder for train.bin, val.bin and tokenizer/"""
    train: Path | None = None
    """text to train on, a blank line after each document; without it OpenWebText is taken, from the Hugging Face Hub"""
    val: Path | None = None
    """text to validate on"""
    vocab_size: int = 1024
    """of the tokenizer that is trained on `train`"""
    workers: int = 8
    """processes that tokenize OpenWebText"""

    def __post_init__(self) -> None:
        if (self.train is None) != (self.val is None):
            raise ValueError("train and val: allowed are both, or neither for OpenWebText")
        for path in filter(None, (self.train, self.val)):
            if not path.is_file():
                raise ValueError(f"{path}: no such file")
        if not 257 <= self.vocab_size <= 65536:  # bytes and the end; what uint16 holds
            raise ValueError(f"vocab_size = {self.vocab_size}: allowed are whole numbers from 257 to 65536")
        if self.workers < 1:
            raise ValueError(f"workers = {self.workers}: allowed are whole numbers from 1")


def documents(path: Path) -> Iterator[str]:
    """The parts of a text between its blank lines."""
    with path.open(encoding="utf-8") as lines:
        for blank, group in groupby(lines, str.isspace):
            if not blank:
                yield "".join(group).strip()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer, learned from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Tokens of a document and its end."""
    return [*tokenizer.backend_tokenizer.encode(text).ids, tokenizer.eos_token_id]


def write(path: Path, tokenized: Iterable[list[int]]) -> int:
    """Returns how many tokens."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        count = sum(file.write(np.asarray(ids, dtype=np.uint16).tobytes()) // 2 for ids in tokenized)
    part.rename(path)
    return count


def openwebtext(tokenizer: PreTrainedTokenizerFast, workers: int) -> dict[str, Iterator[list[int]]]:
    """nanoGPT's split of it, tokenized."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("OpenWebText comes through datasets, which is missing: pip install datasets") from None
    # As the Hub converted it: the script it comes with is refused by datasets since version 4.
    whole = load_dataset("Skylion007/openwebtext", revision="refs/convert/parquet", split="train", num_proc=workers)
    parts = whole.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    parts = parts.map(
        lambda row: {"ids": encode(tokenizer, row["text"])},
        remove_columns=["text"],
        num_proc=workers,
        desc="tokenizing",
    )
    return {"train": (row["ids"] for row in parts["train"]), "val": (row["ids"] for row in parts["test"])}


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.hf_clm.prepare", description=__doc__)
    if settings.train is None:
        tokenizer = AutoTokenizer.from_pretrained("openai-community/gpt2")
        tokenized = openwebtext(tokenizer, settings.workers)
    else:
        tokenizer = train_tokenizer(documents(settings.train), settings.vocab_size)
        texts = {"train": documents(settings.train), "val": documents(settings.val)}
        tokenized = {name: (encode(tokenizer, text) for text in part) for name, part in texts.items()}
    tokenizer.save_pretrained(settings.output / "tokenizer")
    for name in ("train", "val"):
        count = write(settings.output / f"{name}.bin", tokenized[name])
        print(f"{settings.output / name}.bin: {count:,} tokens of {len(tokenizer):,}")
    print(f"next: python -m recipes.hf_clm.train --data {settings.output} --help")
    return 0


if __name__ == "__main__":
    command(main, stopped="")
