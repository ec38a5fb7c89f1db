"""Token files as nanoGPT has them, uint16 one after the other, and the blocks that a model trains and is tested on."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class TokenFile:
    """A file of tokens, opened for each read: a memory map that is kept grows, and would be copied to worker processes."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; python -m recipes.hf_clm.prepare writes it")
        self.path, self.size = path, path.stat().st_size // 2

    def block(self, start: int, length: int) -> dict[str, Tensor]:
        """What transformers' causal models take; they shift the labels themselves."""
        tokens = np.memmap(self.path, dtype=np.uint16, mode="r")[start : start + length]
        ids = torch.from_numpy(tokens.astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    def check(self, block_size: int) -> None:
        if self.size < block_size:
            raise ValueError(
                f"{self.path} holds {self.size} tokens: allowed are files with block_size = {block_size} or more"
            )


class RandomBlocks(Dataset):
    """`count` blocks from random places, as nanoGPT draws them.

    Which ones depends on the seed and the index alone, so that a resumed run, and any number of processes, see the same.
    """

    def __init__(self, path: Path, block_size: int, count: int, seed: int) -> None:
        self.file, self.block_size, self.count, self.seed = TokenFile(path), block_size, count, seed
        self.file.check(block_size)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = np.random.default_rng((self.seed, index)).integers(self.file.size - self.block_size + 1)
        return self.file.block(start, self.block_size)


class AllBlocks(Dataset):
    """The whole file in blocks that do not overlap; what is left at its end is left out."""

    def __init__(self, path: Path, block_size: int) -> None:
        self.file, self.block_size = TokenFile(path), block_size
        self.file.check(block_size)

    def __len__(self) -> int:
        return self.file.size // self.block_size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.file.block(index * self.block_size, self.block_size)
