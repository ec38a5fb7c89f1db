"""A GPT of characters collapses; from one update on it trains with each remedy, from the same weights, moments and batches.

A line of JSON for each run; a run that is there already is left alone, so that the same command goes on where it stopped.
"""

import copy
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nanogpt_patch.model import GPT, STOCK, GPTConfig
from recipes.command import command
from recipes.gpt.muon import BETAS, CLIP, LENGTH, SHAPES, WEIGHT_DECAY, batches, validate
from stable_core import SigmaReparamConfig, param_groups, sigma_reparam
from stable_monitor import Monitor, QKClip, rescue

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REMEDIES = {
    "go_on": ("go on", "0.4"),
    "half": ("half the rate", "tab:orange"),
    "back": ("back to update 20, half the rate", "tab:olive"),
    "qk_clip": ("QK-clip at 30", "tab:green"),
    "sigma": ("σReparam, gamma = sigma", "tab:purple"),
    "rescue": ("rescue", "tab:blue"),
    "rescue_all": ("rescue of every layer", "tab:cyan"),
}
GOOD, EVERY = 20, 20  # the update of the last good checkpoint; updates from one record to the next


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: Path
    """folder of train.bin, val.bin and meta.pkl, by recipes.gpt.prepare"""
    output: Path
    """folder for log.jsonl, to which runs are added, and picture.png"""
    lr: float = 0.016
    """of AdamW, without warm-up or decay; five times the best by default"""
    at: int = 120
    """the update after which the remedy is applied"""
    after: int = 160
    """updates from there to the end"""
    remedies: tuple[str, ...] = tuple(REMEDIES)
    seeds: tuple[int, ...] = (1, 2, 3)

    def __post_init__(self) -> None:
        if not (self.data / "meta.pkl").is_file():
            raise ValueError(f"data = {self.data}: allowed are folders that recipes.gpt.prepare wrote")
        for remedy in self.remedies:
            if remedy not in REMEDIES:
                raise ValueError(f"remedies = {remedy!r}: allowed are {', '.join(REMEDIES)}")
        if self.at <= GOOD:
            raise ValueError(f"at = {self.at}: allowed are whole numbers from {GOOD + 1}")
        if self.after < 1 or not self.lr > 0:
            raise ValueError(f"after = {self.after}, lr = {self.lr}: allowed are positive numbers")


class Training:
    """A model, its optimizer, and which update it is at."""

    def __init__(self, seed: int, lr: float, parts: dict[str, np.ndarray]) -> None:
        torch.manual_seed(seed)
        n_layer, n_head, n_embd = SHAPES["small"]
        vocab_size = int(max(part.max() for part in parts.values())) + 1
        sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": LENGTH, "vocab_size": vocab_size}
        self.model = GPT(GPTConfig(**sizes, **STOCK))
        self.optimizer = torch.optim.AdamW(param_groups(self.model, lr, WEIGHT_DECAY), betas=BETAS)
        self.seed, self.parts, self.update, self.records = seed, parts, 0, []

    def run(self, until: int) -> None:
        monitor = Monitor(self.model, EVERY, optimizer=self.optimizer, step=self.update)
        stream = itertools.islice(batches(self.parts["train"], 8, self.seed), self.update, until)
        for x, y in stream:
            loss = self.model(x, y)[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            if record := monitor.step(loss):
                layers = record["layers"].values()
                entropy = min(float(np.median(layer["entropy"]) / np.log(layer["keys"])) for layer in layers)
                logit = max(max(layer["max_logit"]) for layer in layers)
                self.records.append((self.update, round(loss.item(), 4), round(entropy, 4), round(logit, 1)))
            self.optimizer.zero_grad()
            self.update += 1
        monitor.close()

    def apply(self, remedy: str) -> list[str]:
        """What a rescue said."""
        batch = next(batches(self.parts["train"], 8, self.seed + 1000))
        if remedy in ("half", "back"):
            for group in self.optimizer.param_groups:
                group["lr"] /= 2
        elif remedy == "qk_clip":
            QKClip(self.model, 30.0, optimizer=self.optimizer)
        elif remedy == "sigma":
            before = set(self.model.parameters())
            sigma_reparam(self.model, SigmaReparamConfig(gamma_init="spectral"))
            new = [p for p in self.model.parameters() if p not in before]
            self.optimizer.add_param_group({**self.optimizer.param_groups[0], "params": new, "weight_decay": 0.0})
        elif remedy.startswith("rescue"):
            layers = [f"transformer.h.{i}.attn" for i in range(SHAPES["small"][0])] if remedy == "rescue_all" else []
            done = rescue(self.model, self.optimizer, lambda: self.model(*batch), layers=layers)
            return [str(one) for one in done]
        return []


def runs_of(seed: int, settings: Settings, parts: dict[str, np.ndarray], missing: list[str]):
    """The lines of one seed, each from a copy of the same training."""
    base = Training(seed, settings.lr, parts)
    base.run(GOOD)
    good = copy.deepcopy(base)
    base.run(settings.at)
    before = validate(base.model, parts["val"], 8)
    base.model.train()
    for remedy in missing:
        training = copy.deepcopy(good if remedy == "back" else base)
        said = training.apply(remedy)
        changed = validate(training.model, parts["val"], 8)
        training.model.train()
        training.run(settings.at + settings.after)
        steps, losses, entropy, logits = zip(*training.records, strict=True)
        end = validate(training.model, parts["val"], 8)
        yield {
            **{"remedy": remedy, "seed": seed, "lr": settings.lr, "at": settings.at, "after": settings.after},
            **{"eval_before": round(before, 4), "eval_changed": round(changed, 4), "eval_end": round(end, 4)},
            **{"said": said, "steps": steps, "loss": losses, "entropy": entropy, "logit": logits},
        }


def rows(lines: list[dict]) -> list[list[str]]:
    """Each remedy with its seeds beside each other."""
    found = []
    for remedy, (label, _) in REMEDIES.items():
        own = sorted((line for line in lines if line["remedy"] == remedy), key=lambda line: line["seed"])
        if own:
            losses = (" / ".join(f"{line[key]:.3f}" for line in own) for key in ("eval_changed", "eval_end"))
            found.append([label, *losses, " / ".join(f"{line['entropy'][-1]:.2f}" for line in own)])
    return found


def draw(lines: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for line in lines:
        label, color = REMEDIES[line["remedy"]]
        for panel, key in zip(axes, ("loss", "entropy"), strict=True):
            panel.plot(line["steps"], line[key], color=color, linewidth=1, label=label if line["seed"] == 1 else None)
    for panel, title in zip(axes, ("training loss, nats", "least entropy / log(keys), median head"), strict=True):
        panel.set(xlabel="update", title=title)
        panel.axvline(lines[0]["at"], color="0.6", linestyle=":")
    axes[0].set_ylim(top=min(4, axes[0].get_ylim()[1]))
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.rescue.gpt", description=__doc__)
    parts = {name: np.fromfile(settings.data / f"{name}.bin", np.uint16) for name in ("train", "val")}
    log = settings.output / "log.jsonl"
    settings.output.mkdir(parents=True, exist_ok=True)
    setting = {"lr": settings.lr, "at": settings.at, "after": settings.after}
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = [line for line in known if setting.items() <= line.items()]
    for seed in track(settings.seeds, "seeds"):
        there = {line["remedy"] for line in known if line["seed"] == seed}
        if missing := [remedy for remedy in settings.remedies if remedy not in there]:
            for line in runs_of(seed, settings, parts, missing):
                with log.open("a") as file:
                    file.write(f"{json.dumps(line)}\n")
                known.append(line)
    table = Table(title=f"validation loss, nats, seeds {' / '.join(map(str, settings.seeds))}")
    for column in ("", "after the change", f"{settings.after} updates later", "least entropy / log(keys)"):
        table.add_column(column)
    for row in rows(known):
        table.add_row(*row)
    Console().print(table)
    draw(known, settings.output / "picture.png")
    print(f"log and picture: {log}, {settings.output / 'picture.png'}")
    return 0


if __name__ == "__main__":
    command(main)
