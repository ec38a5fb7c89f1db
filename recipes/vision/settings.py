"""How a model of the vision recipes is trained, and the settings.json of a run."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, TypeVar, get_type_hints

from timm.optim import list_optimizers

MAY_CHANGE = ("workers", "monitor_every", "on_alarm", "output", "data_dir")  # when a run goes on


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a model is trained; what is trained, and on what, is a recipe's own."""

    output: Path
    """directory of the run; the same command goes on with it after its last whole epoch"""
    epochs: int
    batch_size: int
    """images of an update, over all processes and accumulated batches"""
    accumulation: int = 1
    """batches of an update in each process"""
    opt: str = "adamw"
    """an optimizer of timm's"""
    lr: float
    lr_base_size: int | None = None
    """lr is for this many images an update, and grows with batch_size; left out: lr is what it is"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of the optimizers that have them"""
    momentum: float = 0.9
    """of the others"""
    weight_decay: float = 0.0
    """of matrices; vectors, gamma among them, are not decayed"""
    weight_decay_end: float | None = None
    """weight decay goes there from weight_decay by a cosine"""
    sched: Literal["cosine", "step"] = "cosine"
    decay_epochs: float | None = None
    """of the step schedule: epochs from one step to the next"""
    decay_rate: float = 0.1
    """of the step schedule"""
    min_lr: float = 0.0
    warmup_epochs: float = 0.0
    warmup_prefix: bool = False
    """the schedule begins after the warm-up, not beside it"""
    clip_grad: float | None = None
    """largest norm of the gradient"""
    ema_decay: float | None = None
    """of a moving average of the weights, which is evaluated too"""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """mixed precision"""
    monitor_every: int = 100
    """updates from one record of the monitor to the next"""
    on_alarm: Literal["warn", "stop", "rescue"] = "warn"
    """when attention entropy collapses: go on, end the run, or bound the queries and keys (stable_monitor.rescue)"""
    workers: int = 0
    """processes that load images"""
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation", "lr", "monitor_every"):
            self._check(name, getattr(self, name) > 0, "numbers above 0")
        for name in ("weight_decay", "weight_decay_end", "min_lr", "workers", "seed"):
            self._check(name, (getattr(self, name) or 0) >= 0, "numbers from 0")
        for name in ("lr_base_size", "decay_epochs", "clip_grad"):
            self._check(name, getattr(self, name) is None or getattr(self, name) > 0, "numbers above 0, or none")
        self._check("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "numbers between 0 and 1, or none")
        self._check(
            "warmup_epochs", 0 <= self.warmup_epochs < self.epochs, f"numbers from 0 to under epochs, {self.epochs}"
        )
        self._check("opt", self.opt in list_optimizers(), "timm's: timm.optim.list_optimizers()")
        self._check(
            "decay_epochs",
            (self.sched == "step") == (self.decay_epochs is not None),
            "for sched = step, and needed there",
        )

    def _check(self, name: str, right: bool, allowed: str) -> None:
        if not right:
            raise ValueError(f"{name} = {getattr(self, name)!r}: allowed are {allowed}")

    @property
    def peak_lr(self) -> float:
        return self.lr * self.batch_size / (self.lr_base_size or self.batch_size)


Kind = TypeVar("Kind", bound=FitSettings)


def claim(settings: FitSettings) -> None:
    """Makes the run's directory, or refuses one that holds another run."""
    path = settings.output / "settings.json"
    given = json.loads(json.dumps(asdict(settings), default=str))
    if path.exists():
        before = json.loads(path.read_text())
        changed = {name for name in given.keys() | before.keys() if given.get(name) != before.get(name)} - {*MAY_CHANGE}
        if changed:
            name = min(changed)
            raise ValueError(
                f"{name} = {given.get(name)!r}: the run in {settings.output} has {before.get(name)!r}; take another output"
            )
    else:
        settings.output.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")  # every later call reads it
        part.write_text(json.dumps(given, indent=1) + "\n")
        part.replace(path)


def read_settings(kind: type[Kind], run: Path) -> Kind:
    """The settings of a finished run of the recipe whose settings are of this kind.

    Raises:
        ValueError: `run` is not the directory of one.
    """
    settings = settings_in(kind, run) if (run / "model.safetensors").is_file() else None
    if settings is None:
        raise ValueError(f"run = {run}: allowed are directories of finished runs of {kind.__module__}")
    return settings


def settings_in(kind: type[Kind], run: Path, **changed: object) -> Kind | None:
    """The settings in the directory of a run, some of them `changed` if it has them; None where they are of another kind."""
    values = json.loads((run / "settings.json").read_text())
    if values.keys() != {field.name for field in fields(kind)}:
        return None
    values |= {name: value for name, value in changed.items() if name in values}
    hints = get_type_hints(kind)
    for name, value in values.items():
        if hints[name] in (Path, Path | None) and value is not None:
            values[name] = Path(value)
        elif isinstance(value, list):
            values[name] = tuple(value)
    return kind(**values)
