"""Muon for the blocks' matrices and AdamW for the rest, beside AdamW for all: nanoGPT's GPT, stock and with σReparam.

A line of JSON for each run; a run that is there already is left alone, so that the same command goes on where it stopped.
"""

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from nanogpt_patch.model import GPT, STOCK, GPTConfig
from recipes.command import command
from stable_core import muon_param_groups, param_groups

SHAPES = {  # blocks, heads, width
    "small": (4, 4, 128),
    "gpt2": (12, 12, 768),
}
LENGTH, BETAS, WEIGHT_DECAY, CLIP = 128, (0.9, 0.95), 0.1, 1.0  # all but the length nanoGPT's
VALIDATED = 20  # batches


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: Path
    """folder of train.bin, val.bin and meta.pkl, by recipes.gpt.prepare"""
    output: Path
    """JSONL, to which runs are added"""
    shape: Literal["small", "gpt2"] = "small"
    """4 blocks of width 128, or GPT-2 small's 12 of 768"""
    optimizers: tuple[Literal["adamw", "muon"], ...] = ("adamw", "muon")
    """muon: with AdamW for what Muon does not take"""
    reparams: tuple[Literal["none", "sigma"], ...] = ("none", "sigma")
    """sigma: σReparam, gamma = 1, beside the LayerNorm of both"""
    lrs: tuple[float, ...] = (1e-3,)
    """of AdamW and Muon, which has adjust_lr_fn = "match_rms_adamw"; a tenth of the updates is warm-up"""
    seeds: tuple[int, ...] = (1,)
    """of weights and batches"""
    updates: int = 200
    batch_size: int = 8
    """sequences of 128 characters"""

    def __post_init__(self) -> None:
        if not (self.data / "meta.pkl").is_file():
            raise ValueError(f"data = {self.data}: allowed are folders that recipes.gpt.prepare wrote")
        for name in ("updates", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: allowed are whole numbers from 1")


def build_optimizers(model: GPT, kind: str, lr: float) -> list[torch.optim.Optimizer]:
    if kind == "adamw":
        return [torch.optim.AdamW(param_groups(model, lr, WEIGHT_DECAY), betas=BETAS)]
    muon, adamw = muon_param_groups(model, lr, WEIGHT_DECAY)
    return [torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(adamw, betas=BETAS)]


def batches(part: np.ndarray, size: int, seed: int):
    """Windows of the text and their successors, (size, LENGTH) each, without end."""
    text, generator = torch.from_numpy(part.astype(np.int64)), torch.Generator().manual_seed(seed)
    while True:
        windows = torch.randint(len(text) - LENGTH, (size, 1), generator=generator) + torch.arange(LENGTH + 1)
        yield text[windows][:, :-1], text[windows][:, 1:].contiguous()


@torch.no_grad()
def validate(model: GPT, part: np.ndarray, size: int) -> float:
    """Mean loss in nats, of the same batches for every run."""
    model.eval()
    return sum(model(x, y)[1].item() for x, y in itertools.islice(batches(part, size, 0), VALIDATED)) / VALIDATED


def train(run: dict, parts: dict[str, np.ndarray], vocab_size: int, batch_size: int) -> dict:
    """What came of a run: a loss for each update, the validation loss at the end, and seconds an update."""
    torch.manual_seed(run["seed"])
    n_layer, n_head, n_embd = SHAPES[run["shape"]]
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": LENGTH, "vocab_size": vocab_size}
    model = GPT(GPTConfig(**sizes, **{**STOCK, "reparam": run["reparam"], "gamma_init": "one"}))
    optimizers = build_optimizers(model, run["optimizer"], run["lr"])
    warmup = max(1, run["updates"] // 10)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1, (i + 1) / warmup)) for o in optimizers]
    losses: list[float] = []
    start = time.perf_counter()
    for x, y in itertools.islice(batches(parts["train"], batch_size, run["seed"]), run["updates"]):
        loss: Tensor = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for step in (*optimizers, *schedules):
            step.step()
        model.zero_grad()
        losses.append(round(loss.item(), 4))
    seconds = (time.perf_counter() - start) / run["updates"]
    eval_loss = validate(model, parts["val"], batch_size)
    return {"eval_loss": round(eval_loss, 4), "seconds_per_update": round(seconds, 3), "loss": losses}


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.gpt.muon", description=__doc__)
    parts = {name: np.fromfile(settings.data / f"{name}.bin", np.uint16) for name in ("train", "val")}
    vocab_size = int(max(part.max() for part in parts.values())) + 1
    lines = settings.output.read_text().splitlines() if settings.output.exists() else []
    known = [json.loads(line) for line in lines]
    for lr, reparam, optimizer, seed in itertools.product(
        settings.lrs, settings.reparams, settings.optimizers, settings.seeds
    ):
        run = {"shape": settings.shape, "reparam": reparam, "optimizer": optimizer, "lr": lr, "seed": seed}
        run |= {"updates": settings.updates, "tokens_per_update": settings.batch_size * LENGTH}
        if any(run.items() <= other.items() for other in known):
            continue
        run |= train(run, parts, vocab_size, settings.batch_size)
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        with settings.output.open("a") as file:
            file.write(f"{json.dumps(run)}\n")
        print(
            f"{reparam}, {optimizer}, {lr:g}, seed {seed}: {run['eval_loss']}, {run['seconds_per_update']} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    command(main)
