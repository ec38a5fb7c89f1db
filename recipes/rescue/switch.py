"""The switch in each stack's own command: a run that collapses, left alone, with the switch on, and both at half the rate.

It runs `python -m stable_monitor.sweep`, three seeds each, and goes on where it was stopped.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from recipes.command import command
from recipes.number_words.run import NARROW, ROOT, prepare
from recipes.quickstart.run import least_entropy
from stable_monitor import sweep
from stable_monitor.records import load

HEAD = """
| validation loss | alone | half the rate | the switch | the switch, half the rate |
|---|---|---|---|---|"""


@dataclass(frozen=True)
class Stack:
    """A stack's training.

    Attributes:
        lr: a rate at which attention collapses.
        switch: the flags.
        command: a module and its arguments, from the folder of the data and a checkout of nanoGPT.
    """

    lr: float
    switch: str
    command: Callable[[Path | None, Path | None], list[object]]


def fairseq(data: Path | None, checkout: Path | None) -> list[object]:
    """18L-18L, pre-LN, number words."""
    flags = """--arch preln_transformer_18l --cpu --lr {lr} --warmup-updates 40 --batch-size 24 --max-update 200 --seed {seed}
        --validate-interval-updates 100 --num-workers 0 --save-dir {out} --no-epoch-checkpoints --monitor-every 5"""
    return ["fairseq_cli.train", data, "--user-dir", ROOT / "plugins/fairseq_sigma", *NARROW, *flags.split()]


def nanogpt(data: Path | None, checkout: Path | None) -> list[object]:
    """The GPT of characters of SMALL=1 in recipes/gpt."""
    flags = """--norm=layernorm --attention=dot --init=stock --device=cpu --dtype=float32 --compile=False --n_layer=4 --n_head=4
        --n_embd=128 --block_size=128 --batch_size=16 --gradient_accumulation_steps=1 --max_iters=300 --lr_decay_iters=300
        --warmup_iters=0 --eval_interval=100 --eval_iters=20 --learning_rate={lr} --extra_seed={seed} --out_dir={out}
        --monitor_every=10"""
    return ["nanogpt_patch", f"{checkout}/train.py", f"--dataset={data}", *flags.split()]


def trainer(data: Path | None, checkout: Path | None) -> list[object]:
    """The GPT of SMALL=1 in recipes/hf_clm."""
    flags = """--output {out} --size small --norm layernorm --attention dot --init stock --lr {lr} --warmup 0 --steps 300
        --seed {seed} --batch-tokens 2048 --device-batch 16 --eval-every 100 --save-every 100 --monitor-every 10"""
    return ["recipes.hf_clm.train", "--data", data, *flags.split()]


def vision(data: Path | None, checkout: Path | None) -> list[object]:
    """The ViT of recipes.vision.grid on CIFAR-10."""
    flags = """--output {out} --model vit_small_patch16_224 --data cifar10 --batch-size 128 --epochs 1 --lr {lr}
        --weight-decay 0.05 --smoothing 0.1 --monitor-every 10 --seed {seed}
        --model-kwargs patch_size=8 depth=8 embed_dim=64 num_heads=4"""
    return ["recipes.vision.train", *(() if data is None else ("--data-dir", data)), *flags.split()]


STACKS = {
    "fairseq": Stack(2e-2, "--monitor-alarm rescue", fairseq),
    "nanogpt": Stack(1.6e-2, "--monitor_alarm=rescue", nanogpt),
    "trainer": Stack(3e-2, "--on-alarm rescue", trainer),
    "vision": Stack(3e-2, "--on-alarm rescue", vision),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    stack: tyro.conf.Positional[Literal[*STACKS]]
    output: Path
    """folder of the sweep"""
    data: Path | None = None
    """nanogpt: a folder of recipes.gpt.prepare; trainer: of recipes.hf_clm.prepare; vision: of CIFAR-10, else it is fetched"""
    checkout: Path | None = None
    """nanogpt: a checkout of github.com/karpathy/nanoGPT"""
    seeds: tuple[int, ...] = (1, 2, 3)
    jobs: int = os.cpu_count() or 1
    """runs at a time, a thread each"""

    def __post_init__(self) -> None:
        if self.stack in ("nanogpt", "trainer") and not (self.data is not None and (self.data / "val.bin").is_file()):
            raise ValueError(f"data = {self.data}: allowed are folders with a val.bin, see --help")
        if self.stack == "nanogpt" and not (self.checkout is not None and (self.checkout / "train.py").is_file()):
            raise ValueError(f"checkout = {self.checkout}: allowed is a checkout of nanoGPT, with its train.py")
        if self.stack != "nanogpt" and self.checkout is not None:
            raise ValueError(f"checkout = {self.checkout}: allowed for nanogpt alone")
        if self.stack == "fairseq" and self.data is not None:
            raise ValueError(f"data = {self.data}: allowed for the other stacks alone; this one writes its own")
        for name in ("output", "data", "checkout"):  # nanoGPT's script runs in its own folder
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, path.resolve())


def line_of(outcome: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run's line of the log: its losses, and the part of log(keys) in the layer that attends to least."""
    records, _ = load(folder)
    entropy = [round(least_entropy(record), 3) for record in records]
    alarms = [[record["step"], alarm["layer"]] for record in records for alarm in record["alarms"]]
    losses = [record["loss"] for record in records]
    return {**outcome, "alarms": alarms, "steps": [r["step"] for r in records], "loss": losses, "entropy": entropy}


def row(stack: str, lines: list[dict[str, Any]]) -> str:
    """Markdown: validation losses of all seeds, alone, alone at half the rate, with the switch, with it at half the rate."""
    cells: dict[tuple[str, float], list[str]] = {}
    for line in sorted(lines, key=lambda line: (line["variant"], -line["lr"], line["seed"])):
        cells.setdefault((line["variant"], line["lr"]), []).append(
            "diverged" if line["final"] is None else f"{line['final']:.3f}"
        )
    return f"| {' | '.join([stack, *(' / '.join(losses) for losses in cells.values())])} |"


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.rescue.switch", description=__doc__)
    stack, data = STACKS[settings.stack], settings.data
    if settings.stack == "fairseq":
        data = prepare(settings.output / "number_words")
    training = [sys.executable, "-m", *stack.command(data, settings.checkout), "{variant}"]
    rates = ["--lr", stack.lr / 2, stack.lr, "--seed", *settings.seeds, "--jobs", settings.jobs]
    variants = ["--variant", "alone=", "--variant", f"switch={stack.switch}"]
    status = sweep.main([*map(str, ["--out", settings.output, *rates, *variants, "--", *training])])
    if status:
        return status
    outcomes = [json.loads(line) for line in (settings.output / "outcomes.jsonl").read_text().splitlines()]
    lines = [line_of(one, settings.output / f"{one['variant']}-{one['lr']:g}-{one['seed']}") for one in outcomes]
    (settings.output / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    print(f"{HEAD}\n{row(settings.stack, lines)}\nlog: {settings.output / 'log.jsonl'}")
    return 0


if __name__ == "__main__":
    command(main)
