"""Small trainings of each stack, in a plain loop: what is trained, on which batches, and how it is validated.

A stack is imported where its training is made: all of them take eight seconds.
"""

import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nanogpt_patch.model import GPT, STOCK, GPTConfig
from recipes.gpt.muon import BETAS, CLIP, LENGTH, SHAPES, WEIGHT_DECAY, batches, build_optimizers
from stable_core import WithZLoss, param_groups

Options = Mapping[str, Any]  # of `stable_core.options.Options`, and z_loss
VALIDATED = 10  # batches


class Training:
    """A model, its optimizer, and which update it is at.

    Attributes:
        lr: at its highest; `factor` has the schedule.
        clip: largest norm of the gradient, or 0.
    """

    clip = CLIP
    device = torch.device("cpu")

    def __init__(self, model: nn.Module, optimizer: Any, lr: float, seed: int) -> None:
        self.model, self.optimizer, self.lr, self.seed = model, optimizer, lr, seed
        self.update, self.records = 0, []

    def batches(self, seed: int) -> Iterator[Any]:
        """Training batches without end."""
        raise NotImplementedError

    def validation(self) -> list[Any]:
        """The same batches for every run."""
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        """Mean loss of a batch."""
        raise NotImplementedError

    def factor(self, update: int) -> float:
        return 1.0

    def to(self, device: torch.device) -> None:
        """Trains there, before the first update."""
        self.model.to(device)
        self.device = device

    def _there(self, batch: Any) -> Any:
        return tree_map_only(Tensor, lambda x: x.to(self.device), batch)

    def copy(self) -> "Training":
        new = copy.copy(self)
        new.model, new.optimizer = copy.deepcopy((self.model, self.optimizer))
        new.records = list(self.records)
        return new

    def step(self, batch: Any) -> Tensor:
        """One update but for clearing the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.factor(self.update)
        loss = self.loss(self._there(batch))
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.update += 1
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss in nats."""
        self.model.eval()
        losses = [self.loss(self._there(batch)).item() for batch in self.validation()]
        self.model.train()
        return sum(losses) / len(losses)


@cache
def characters(data: Path) -> dict[str, np.ndarray]:
    return {name: np.fromfile(data / f"{name}.bin", np.uint16) for name in ("train", "val")}


class Characters(Training):
    """nanoGPT's GPT, 0.8M parameters."""

    shape = SHAPES["small"]

    def __init__(self, data: Path, lr: float, seed: int, options: Options = STOCK) -> None:
        self.parts = characters(data)
        torch.manual_seed(seed)
        n_layer, n_head, n_embd = self.shape
        vocab_size = int(max(part.max() for part in self.parts.values())) + 1
        sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "vocab_size": vocab_size}
        model = self.build(sizes, options)
        optimizer = torch.optim.AdamW(param_groups(model, lr, WEIGHT_DECAY), betas=BETAS)
        super().__init__(model, optimizer, lr, seed)

    def build(self, sizes: dict[str, int], options: Options) -> nn.Module:
        return GPT(GPTConfig(**sizes, block_size=LENGTH, **{**STOCK, **options}))

    def batches(self, seed: int) -> Iterator[Any]:
        return batches(self.parts["train"], 8, seed)

    def validation(self) -> list[Any]:
        return list(itertools.islice(batches(self.parts["val"], 8, 0), VALIDATED))

    def loss(self, batch: Any) -> Tensor:
        return self.model(*batch)[1]


class Characters25M(Characters):
    """Eight blocks of width 512."""

    shape = 8, 8, 512


class Characters85M(Characters):
    """The shape of GPT-2 small."""

    shape = SHAPES["gpt2"]


class Together:
    """Several optimizers, each for its own parameters, as one."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class MuonCharacters(Characters):
    """Muon for the blocks' matrices, AdamW for the rest, at one rate."""

    def __init__(self, data: Path, lr: float, seed: int, options: Options = STOCK) -> None:
        super().__init__(data, lr, seed, options)
        self.optimizer = Together(build_optimizers(self.model, "muon", lr))


class GPT2(Characters):
    """transformers' GPT-2 of the same size."""

    def build(self, sizes: dict[str, int], options: Options) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**sizes, n_positions=LENGTH, **dropout))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(input_ids=x).logits.flatten(0, 1), y.flatten())


@cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (n, 3, 8, 8) and labels (n,), for training and for validation."""
    from recipes.vision.data import load

    data = load("digits")
    parts = [
        (torch.from_numpy(part.images).permute(0, 3, 1, 2) / 127.5 - 1, torch.as_tensor(part.labels, dtype=torch.long))
        for part in (data.train, data.test)
    ]
    return parts[0], parts[1]


class Vision(Training):
    """timm's ViT, or with options ours: 6 blocks, 64 patches of a pixel."""

    clip = 0.0
    width, heads, images = 64, 4, 64

    def __init__(self, data: Path, lr: float, seed: int, options: Options | None = None) -> None:
        import timm

        import timm_stable  # noqa: F401  which registers StableViT

        torch.manual_seed(seed)
        sizes = {
            "img_size": 8,
            "patch_size": 1,
            "embed_dim": self.width,
            "depth": 6,
            "num_heads": self.heads,
            "num_classes": 10,
        }
        methods = {**STOCK, **(options or {})}
        self.criterion = WithZLoss(nn.CrossEntropyLoss(), methods.pop("z_loss", 0.0))
        name = "vit_small_patch16_224" if options is None else "stablevit_small"
        model = timm.create_model(name, **sizes, **({} if options is None else methods))
        super().__init__(model, torch.optim.AdamW(param_groups(model, lr, 0.05)), lr, seed)

    def batches(self, seed: int) -> Iterator[Any]:
        (images, labels), _ = digits()
        generator = torch.Generator().manual_seed(seed)
        while True:
            picked = torch.randint(len(images), (self.images,), generator=generator)
            yield images[picked], labels[picked]

    def validation(self) -> list[Any]:
        return [digits()[1]]

    def loss(self, batch: Any) -> Tensor:
        self.criterion.train(self.model.training)
        return self.criterion(self.model(batch[0]), batch[1])


class WideVision(Vision):
    """The same, of another width."""

    width, heads, images = 96, 3, 128


@cache
def number_words(data: Path, *flags: str) -> tuple[Any, Any, Any]:
    """fairseq's task of recipes/number_words, what it builds models from, and a validation in batches."""
    from fairseq import options, tasks, utils
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    from recipes.number_words.run import NARROW, ROOT, prepare

    plugin = ["--user-dir", str(ROOT / "plugins" / "fairseq_sigma")]
    narrow = [str(option) for option in NARROW]
    logging.getLogger().setLevel(logging.WARNING)  # fairseq says all, and lets matplotlib do so
    utils.import_user_module(options.get_training_parser().parse_known_args(plugin)[0])
    arguments = [str(prepare(data)), *plugin, *narrow, "--arch", "preln_transformer_18l", *flags]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), arguments))
    task = tasks.setup_task(cfg.task)
    for split in ("train", "valid"):
        task.load_dataset(split)
    return task, cfg, list(_batches_of(task, "valid", 0, 1))


def _batches_of(task: Any, split: str, seed: int, epoch: int) -> Iterator[Any]:
    iterator = task.get_batch_iterator(task.dataset(split), max_sentences=24, seed=seed, epoch=epoch)
    return iterator.next_epoch_itr(shuffle=split == "train")


class Translation(Training):
    """fairseq's translation, pre-LN of width 64, of number words; 40 updates of warm-up, then 1 / sqrt(update).

    18L-18L, or with options 3L-3L.
    """

    clip = 0.0

    def __init__(self, data: Path, lr: float, seed: int, options: Options | None = None) -> None:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in (options or {}).items()]
        if options is not None:
            flags += ["--encoder-layers=3", "--decoder-layers=3"]
        self.task, cfg, self.valid = number_words(data, *flags)
        torch.manual_seed(seed)
        model, self.criterion = self.task.build_model(cfg.model), self.task.build_criterion(cfg.criterion)
        super().__init__(model, torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.98)), lr, seed)

    def batches(self, seed: int) -> Iterator[Any]:
        for epoch in itertools.count(1):
            yield from _batches_of(self.task, "train", seed, epoch)

    def validation(self) -> list[Any]:
        return self.valid[:VALIDATED]

    def loss(self, batch: Any) -> Tensor:
        loss, tokens, logged = self.criterion(self.model, batch)
        return loss / tokens if self.model.training else logged["nll_loss"] / tokens

    def factor(self, update: int) -> float:
        return min((update + 1) / 40, math.sqrt(40 / (update + 1)))


@dataclass(frozen=True)
class Kind:
    """A training and its setting: a rate at which attention collapses, and when.

    Attributes:
        lr: of the optimizer.
        good: the update of the last good checkpoint.
        at: the update after which the remedy is applied, by default.
        after: updates from there to the end.
        every: updates from one record to the next.
    """

    build: Callable[[Path, float, int], Training]
    lr: float
    good: int
    at: int
    after: int
    every: int


KINDS = {
    "gpt": Kind(Characters, lr=0.016, good=20, at=120, after=160, every=20),
    "gpt2": Kind(GPT2, lr=0.03, good=10, at=120, after=160, every=10),
    "vit": Kind(Vision, lr=0.03, good=20, at=100, after=150, every=10),
    "vit96": Kind(WideVision, lr=0.01, good=20, at=100, after=150, every=10),
    "translation": Kind(Translation, lr=2e-2, good=15, at=60, after=100, every=5),
}
