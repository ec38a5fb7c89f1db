"""Settings of a run, and the directory that is claimed for them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hf_stable import StableGPTConfig
from stable_core.options import renamed

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128}
MODEL_FIELDS = ("norm", "alpha", "attention", "tau_scale", "init", "reparam")  # StableGPTConfig's
# When a run goes on:
MAY_CHANGE = ("device_batch", "eval_every", "save_every", "monitor_every", "on_alarm", "workers", "compile", "output",
              "data")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    output: Path
    """directory of the run; the same command goes on with it"""
    data: Path
    """folder that recipes.hf_clm.prepare wrote; nanoGPT's with a tokenizer/ in it is one too"""
    size: Literal["S", "M", "L", "small"] = "S"
    """124M, 350M, 774M, or 4 layers of width 128 for blocks of 128"""
    n_head: int | None = None
    """by default the size's"""
    norm: Literal["stable", "layernorm", "rmsnorm", "none"] = "stable"
    alpha: float = 0.475
    """of StableNorm and StableAtten"""
    attention: Literal["stable", "dot", "qknorm", "l2", "l2_tied"] = "stable"
    tau_scale: float = 1.0
    """multiple of StableAtten's tau"""
    init: Literal["stable", "stock", "xavier"] = "stable"
    reparam: Literal["none", "sigma"] = "none"
    """sigma: σReparam on the blocks' layers"""
    lr: float
    """peak; a cosine takes it to a tenth"""
    decay_steps: int | None = None
    """updates until then, warm-up included; by default steps. Where there are more the run ends on the way"""
    warmup: int = 2000
    """updates"""
    steps: int = 600_000
    """updates"""
    batch_tokens: int = 480 * 1024
    """tokens of an update, over all processes and accumulated batches"""
    device_batch: int = 12
    """blocks in a device's memory at a time"""
    weight_decay: float = 0.1
    """of matrices and embeddings; norms, biases and gammas are not decayed"""
    betas: tuple[float, float] = (0.9, 0.95)
    """of AdamW"""
    grad_clip: float = 1.0
    """largest norm of the gradient; 0 does not clip"""
    eval_every: int = 1000
    """updates from one validation to the next"""
    save_every: int = 1000
    """updates from one checkpoint to the next"""
    monitor_every: int = 100
    """updates from one record of the monitor to the next"""
    on_alarm: Literal["warn", "stop", "rescue"] = "warn"
    """when attention entropy collapses: go on, end the run with a checkpoint, or bound the layer's queries and keys"""
    workers: int = 0
    """processes that load tokens"""
    compile: bool = False
    """torch.compile"""
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("lr", "steps", "batch_tokens", "device_batch", "eval_every", "save_every", "monitor_every"):
            self._check(name, getattr(self, name) > 0, "numbers above 0")
        for name in ("weight_decay", "grad_clip", "workers", "seed"):
            self._check(name, getattr(self, name) >= 0, "numbers from 0")
        self._check("betas", all(0 <= beta < 1 for beta in self.betas), "numbers from 0 to under 1")
        self._check("warmup", 0 <= self.warmup < self.steps, f"numbers from 0 to under steps, {self.steps}")
        self._check("decay_steps", (self.decay_steps or self.steps) >= self.steps, f"numbers from steps, {self.steps}")
        self.config()  # which checks the model's

    def _check(self, name: str, right: bool, allowed: str) -> None:
        if not right:
            raise ValueError(f"{name} = {getattr(self, name)!r}: allowed are {allowed}")

    def config(self, **fields) -> StableGPTConfig:
        """The model's; `fields` are what the tokenizer knows."""
        fields |= {name: getattr(self, name) for name in MODEL_FIELDS}
        if self.n_head is not None:
            fields["n_head"] = self.n_head
        return (
            StableGPTConfig(**SMALL | fields) if self.size == "small" else StableGPTConfig.preset(self.size, **fields)
        )

    def accumulation(self, block_size: int, processes: int) -> int:
        """Batches of an update in each process."""
        at_a_time = block_size * self.device_batch * processes
        what = f"multiples of {at_a_time}: device_batch = {self.device_batch} blocks of {block_size} in {processes} processes"
        self._check("batch_tokens", self.batch_tokens % at_a_time == 0, what)
        return self.batch_tokens // at_a_time


def claim(settings: Settings) -> None:
    """Makes the run's directory, or refuses one that holds another run."""
    path, given = settings.output / "settings.json", json.loads(json.dumps(asdict(settings), default=str))
    if not path.exists():
        settings.output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(given, indent=1) + "\n")
        return
    before = renamed(json.loads(path.read_text()))
    changed = {name for name in given if name not in MAY_CHANGE and given[name] != before.get(name)}
    if changed:
        name = min(changed)
        raise ValueError(
            f"{name} = {given[name]!r}: the run in {settings.output} has {before.get(name)!r}; take another output"
        )
