"""What is trained to put a claim to the test: the models, the learning rates, and how one run of each kind is made and read."""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recipes.number_words.run import NARROW, ROOT, prepare
from recipes.runs import call, last_line, python
from stable_monitor.records import read


@dataclass(frozen=True)
class Model:
    label: str
    color: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    model: str
    lr: float
    seed: int
    length: int  # updates, or epochs of SimCLR

    @property
    def name(self) -> str:
        return f"{self.model}-{self.lr:g}-{self.seed}-{self.length}"


@dataclass(frozen=True)
class Experiment:
    title: str
    models: dict[str, Model]
    lrs: tuple[float, ...]
    length: int
    result: str  # what `train` gives as "result", None where the loss became NaN
    loss: str
    prepare: Callable[[Path], None]  # of a folder
    train: Callable[[Model, Run, Path], dict]


def curves(folder: Path) -> dict:
    """What the monitor recorded: the mean entropy of the layer where it is least, as a share of log(keys); 1 is uniform."""
    records = read(folder)
    least = [min(statistics.fmean(x["entropy"]) / math.log(x["keys"]) for x in r["layers"].values()) for r in records]
    return {
        "recorded": [record["step"] for record in records],
        "entropy": [round(x, 4) for x in least],
        "alarms": sum(len(record["alarms"]) for record in records),
    }


def fairseq_log(folder: Path, metric: str, status: int, output: str) -> dict:
    """Of fairseq's JSON log: loss of updates, nats, and `metric` of the last validation, which nll_loss makes nats too."""
    diverged = "FloatingPointError" in output
    if status and not diverged:
        raise RuntimeError(f"{folder}: {last_line(output)}")
    rows = [json.loads(line) for line in (folder / "train.log").read_text().splitlines() if line.startswith('{"')]
    updates = [row for row in rows if "num_updates" in row]
    valid = [float(row[f"valid_{metric}"]) for row in rows if f"valid_{metric}" in row]
    result = None if diverged else valid[-1] * (math.log(2) if metric == "nll_loss" else 1)
    return {
        "result": result and round(result, 4),
        "steps": [int(row["num_updates"]) for row in updates],
        "losses": [round(float(row["nll_loss"]) * math.log(2), 4) for row in updates],
    }


def every(updates: int, run: Run) -> tuple:
    """fairseq's options for a run that is looked at so often."""
    looks = ("--monitor-every", updates, "--log-interval", updates, "--log-format", "json")
    return "--lr", run.lr, "--max-update", run.length, "--no-save", *looks


def translation(model: Model, run: Run, out: Path) -> dict:
    """The data and width of recipes/number_words, in batches of 24 for depth."""
    folder = out / run.name
    status, output = python(
        *("-m", "fairseq_cli.train", out / "text" / "data", "--user-dir", ROOT / "plugins" / "fairseq_sigma"),
        *(*model.options, *NARROW, "--batch-size", 24, "--warmup-updates", 40, "--num-workers", 0, *every(5, run)),
        *("--seed", run.seed, "--cpu", "--save-dir", folder, "--log-file", folder / "train.log"),
    )
    return {**fairseq_log(folder, "nll_loss", status, output), **curves(folder)}


def speech(model: Model, run: Run, out: Path) -> dict:
    """recipes/librispeech, small, with 8 layers; it names the run's folder."""
    recipe, runs = ROOT / "recipes" / "librispeech", out / run.name
    options = ("--encoder-layers", 8, "--warmup-updates", 50, *every(20, run))
    for command in ((recipe / "prepare.sh",), (recipe / "train.sh", run.model, run.seed, *options)):
        status, output = call("bash", *command, SMALL="1", GPUS="0", RUNS=str(runs))
    folder = next((path for path in (runs / "librispeech_small").glob("*") if path.is_dir()), runs)
    return {**fairseq_log(folder, "uer", status, output), **curves(folder)}


def simclr(model: Model, run: Run, out: Path) -> dict:
    """recipes/simclr, small, with another learning rate."""
    command = ("bash", ROOT / "recipes/simclr/run.sh", run.model, run.seed, "--lr", run.lr)
    status, output = call(*command, SMALL="1", RUNS=str(out / run.name), EPOCHS=str(run.length))
    folder = out / run.name / "simclr_small" / f"{run.model}-{run.length}-3-{run.seed}"
    rows, probe = (
        [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()] if path.exists() else []
        for path in (folder, folder / "probe")
    )
    diverged = bool(rows) and "stopped" in rows[-1]
    if status and not diverged:
        raise RuntimeError(f"{run.name}: {last_line(output)}")
    return {
        "result": None if diverged else probe[-1]["top1"],
        "steps": [row["updates"] for row in rows if "updates" in row],
        "losses": [round(row["train_loss"], 4) for row in rows if "updates" in row],
        **curves(folder),
    }


def numbers(out: Path) -> None:
    prepare(out / "text")


def arch(name: str, *options: str) -> tuple[str, ...]:
    return "--arch", name, *options


EXPERIMENTS = {
    "translation": Experiment(
        title="18L-18L translation of number words",
        models={
            "preln": Model("pre-LN", "tab:red", arch("preln_transformer_18l")),
            "deepnorm": Model("DeepNorm", "tab:orange", arch("deepnorm_transformer_18l")),
            "sn": Model(
                "DeepNorm + spectral norm", "tab:brown", arch("sigma_transformer_18l", "--reparam", "spectral")
            ),
            "wn": Model("DeepNorm + weight norm", "tab:olive", arch("sigma_transformer_18l", "--reparam", "weight")),
            "sigma": Model("DeepNorm + σReparam", "tab:blue", arch("sigma_transformer_18l")),
        },
        lrs=(5e-3, 2e-2),
        length=120,
        result="validation loss, nats a letter",
        loss="training loss, nats a letter",
        prepare=numbers,
        train=translation,
    ),
    "depth": Experiment(
        title="100L-100L translation of number words",
        models={
            "postln": Model("post-LN", "tab:red", arch("postln_transformer_100l")),
            "sigma_postln": Model("post-LN + σReparam", "tab:green", arch("sigma_postln_transformer_100l")),
            "deepnorm": Model("DeepNorm", "tab:orange", arch("deepnorm_transformer_100l")),
            "sigma": Model("DeepNorm + σReparam", "tab:blue", arch("sigma_transformer_100l")),
        },
        # The paper's, of plain models and with σReparam; and one at which DeepNorm diverges.
        lrs=(1.4e-3, 4.5e-3, 2e-2),
        length=60,
        result="validation loss, nats a letter",
        loss="training loss, nats a letter",
        prepare=numbers,
        train=translation,
    ),
    "speech": Experiment(
        title="speech, 8 layers, Adagrad",
        models={  # names are those of recipes/librispeech/train.sh
            "preln": Model("pre-LN", "tab:red"),
            "postln": Model("post-LN", "tab:orange"),
            "sn_postln": Model("post-LN + spectral norm", "tab:brown"),
            "wn_postln": Model("post-LN + weight norm", "tab:olive"),
            "sigma_postln": Model("post-LN + σReparam", "tab:green"),
            "sigma": Model("σReparam, no LayerNorm", "tab:blue"),
        },
        lrs=(0.1,),
        length=600,
        result="letters wrong in validation, %",
        loss="training loss, nats a letter",
        prepare=lambda out: None,
        train=speech,
    ),
    "simclr": Experiment(
        title="SimCLR on digits, five times the learning rate of recipes/simclr",
        models={  # names are those of recipes/simclr/run.sh
            "baseline": Model("ViT", "tab:red"),
            "frozen_patcher": Model("frozen patch embedding", "tab:orange"),
            "sigma": Model("σReparam, no LayerNorm", "tab:blue"),
            "sigma_preln": Model("σReparam, pre-LN", "tab:purple"),
        },
        lrs=(6e-2,),
        length=20,
        result="linear probe, %",
        loss="training loss, nats",
        prepare=lambda out: None,
        train=simclr,
    ),
}
