"""A training collapses; from one update on it goes on with each remedy, from the same weights, moments and batches.

A line of JSON for each run; a run that is there already is left alone, so that the same command goes on where it stopped.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import matplotlib
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recipes.command import command
from recipes.trainings import KINDS, Kind, Training
from stable_core import SigmaReparamConfig, sigma_reparam
from stable_core.targets import those_left
from stable_monitor import Monitor, QKClip, rescue

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REMEDIES = {
    "go_on": ("go on", "0.4"),
    "half": ("half the rate", "tab:orange"),
    "back": ("back to the last good checkpoint, half the rate", "tab:olive"),
    "qk_clip": ("QK-clip at 30", "tab:green"),
    "sigma": ("σReparam, gamma = sigma", "tab:purple"),
    "rescue": ("rescue", "tab:blue"),
    "rescue_half": ("rescue, half the rate", "tab:red"),
    "rescue_sigma": ("rescue, and σReparam of all other layers", "tab:brown"),
    "rescue_all": ("rescue of every layer", "tab:cyan"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    kind: tyro.conf.Positional[Literal[*KINDS]]
    """gpt (nanoGPT's), gpt2 (transformers'), vit and vit96 (timm's) or translation (fairseq's)"""
    output: Path
    """folder for log.jsonl, to which runs are added, and picture.png"""
    data: Path | None = None
    """folder of train.bin, val.bin and meta.pkl, by recipes.gpt.prepare: of gpt and gpt2"""
    lr: float | None = None
    """of the optimizer; by default one at which attention collapses"""
    at: int | None = None
    """the update after which the remedy is applied"""
    after: int | None = None
    """updates from there to the end"""
    remedies: tuple[str, ...] = tuple(REMEDIES)
    seeds: tuple[int, ...] = (1, 2, 3)

    def __post_init__(self) -> None:
        if self.kind.startswith("gpt") and not (self.data is not None and (self.data / "meta.pkl").is_file()):
            raise ValueError(f"data = {self.data}: allowed are folders that recipes.gpt.prepare wrote")
        for remedy in self.remedies:
            if remedy not in REMEDIES:
                raise ValueError(f"remedies = {remedy!r}: allowed are {', '.join(REMEDIES)}")
        setting = self.setting
        if setting["at"] <= self.training.good:
            raise ValueError(f"at = {self.at}: allowed are whole numbers from {self.training.good + 1}")
        if setting["after"] < 1 or not setting["lr"] > 0:
            raise ValueError(f"after = {self.after}, lr = {self.lr}: allowed are positive numbers")

    @property
    def training(self) -> Kind:
        return KINDS[self.kind]

    @property
    def setting(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("lr", "at", "after")}
        return {name: getattr(self.training, name) if value is None else value for name, value in own.items()}


def train(training: Training, until: int, every: int) -> None:
    monitor = Monitor(training.model, every, optimizer=training.optimizer, step=training.update)
    for batch in itertools.islice(training.batches(training.seed), training.update, until):
        update = training.update
        loss = training.step(batch)
        if record := monitor.step(loss):
            layers = record["layers"].values()
            entropy = min(median(layer["entropy"]) / math.log(layer["keys"]) for layer in layers)
            logit = max(max(layer["max_logit"]) for layer in layers)
            training.records.append((update, *(round(x, 4) for x in (loss.item(), entropy, logit))))
        training.optimizer.zero_grad()
    monitor.close()


def apply(remedy: str, training: Training) -> list[str]:
    """Applies it; returns what a rescue said."""
    model, optimizer = training.model, training.optimizer
    if remedy in ("half", "back", "rescue_half"):
        training.lr /= 2
    if remedy == "qk_clip":
        QKClip(model, 30.0, optimizer=optimizer)
    said = []
    if remedy.startswith("rescue"):
        batch = next(training.batches(training.seed + 1000))
        settings = {"fraction": 1.1 if remedy == "rescue_all" else 0.3, "others": remedy == "rescue_sigma"}
        said = [str(one) for one in rescue(model, optimizer, lambda: training.loss(batch), **settings)]
    if remedy == "sigma":
        before = set(model.parameters())
        sigma_reparam(model, SigmaReparamConfig(gamma_init="spectral"), those_left(model))
        new = [p for p in model.parameters() if p not in before]
        optimizer.add_param_group({**optimizer.param_groups[0], "params": new, "weight_decay": 0.0})
    return said


def runs_of(seed: int, settings: Settings, missing: list[str], advance: Callable[[], None]):
    """The lines of one seed, each from a copy of the same training."""
    kind, setting = settings.training, settings.setting
    data = settings.data or settings.output / "data"
    base = kind.build(data, setting["lr"], seed)
    train(base, kind.good, kind.every)
    good = base.copy()
    train(base, setting["at"], kind.every)
    before = base.validate()
    for remedy in missing:
        training = (good if remedy == "back" else base).copy()
        said = apply(remedy, training)
        changed = training.validate()
        train(training, setting["at"] + setting["after"], kind.every)
        steps, losses, entropy, logits = zip(*training.records, strict=True)
        yield {
            **{"remedy": remedy, "seed": seed, **setting, "eval_before": round(before, 4)},
            **{"eval_changed": round(changed, 4), "eval_end": round(training.validate(), 4)},
            **{"said": said, "steps": steps, "loss": losses, "entropy": entropy, "logit": logits},
        }
        advance()


def table(lines: list[dict]) -> Table:
    """Each remedy with its seeds beside each other."""
    later = f"{lines[0]['after']} updates later"
    found = Table("", "after the change", later, "least entropy / log(keys)")
    for remedy, (label, _) in REMEDIES.items():
        own = sorted((line for line in lines if line["remedy"] == remedy), key=lambda line: line["seed"])
        if own:
            losses = (" / ".join(f"{line[key]:.3f}" for line in own) for key in ("eval_changed", "eval_end"))
            found.add_row(label, *losses, " / ".join(f"{line['entropy'][-1]:.2f}" for line in own))
    return found


def draw(lines: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.4), layout="constrained")
    for line in lines:
        label, color = REMEDIES[line["remedy"]]
        for panel, key in zip(axes, ("loss", "entropy"), strict=True):
            panel.plot(line["steps"], line[key], color=color, linewidth=1, label=label if line["seed"] == 1 else None)
    for panel, title in zip(axes, ("training loss, nats", "least entropy / log(keys), median head"), strict=True):
        panel.set(xlabel="update", title=title)
        panel.axvline(lines[0]["at"], color="0.6", linestyle=":")
    axes[0].set_ylim(0, 1.2 * max(line["loss"][0] for line in lines))
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.rescue.run", description=__doc__)
    log, setting = settings.output / "log.jsonl", settings.setting
    settings.output.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = [line for line in known if setting.items() <= line.items()]
    there = {(line["remedy"], line["seed"]) for line in known}
    missing = {seed: [r for r in settings.remedies if (r, seed) not in there] for seed in settings.seeds}
    with Progress() as bar:
        task = bar.add_task("runs", total=sum(map(len, missing.values())))
        for seed, remedies in missing.items():
            for line in runs_of(seed, settings, remedies, lambda: bar.advance(task)) if remedies else ():
                with log.open("a") as file:
                    file.write(f"{json.dumps(line)}\n")
                known.append(line)
    Console().print(f"validation loss, nats, seeds {' / '.join(map(str, settings.seeds))}", table(known))
    draw(known, settings.output / "picture.png")
    print(f"log and picture: {log}, {settings.output / 'picture.png'}")
    return 0


if __name__ == "__main__":
    command(main)
