"""Trains an 18L-18L translation model five ways, side by side, on the CPU: `python -m recipes.number_words.run`.

English number words to German number words, letter by letter: "forty two" -> "z w e i u n d v i e r z i g". Post-LN at this
depth never leaves the unigram level; with σReparam, DeepNorm or both it trains. The runs share data, seed and all but the
arch, the learning rate and, in the last one, gamma's first value; a monitor looks on. An interrupted command goes on where it
stopped.
"""

import argparse
import json
import math
import random
import re
import subprocess
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import matplotlib
from num2words import num2words
from rich.console import Console
from rich.table import Table

from stable_monitor.report import report

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from recipes.command import command
from recipes.side_by_side import Job, Progressed, children, side_by_side, start

ROOT = Path(__file__).resolve().parents[2]
LOG_INTERVAL = 5
MONITOR_EVERY = 10
SIZES = {"train": 12_000, "valid": 200, "test": 200}
NARROW = (  # of a narrow model, as the paper trains the wide ones but for dropout
    "--encoder-embed-dim", 64, "--encoder-ffn-embed-dim", 128, "--dropout", 0,
    "--encoder-attention-heads", 4, "--decoder-attention-heads", 4,
    "--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", 0,
    "--lr-scheduler", "inverse_sqrt", "--warmup-init-lr", 1e-7,
    "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    label: str
    arch: str
    lr: float  # the better of 2e-3 and 5e-3, see README.md
    color: str
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.arch}_sigma" if self.flags else self.arch


RUNS = (
    Run("post-LN", "postln_transformer_18l", 2e-3, "tab:red"),
    Run("post-LN + σReparam", "sigma_postln_transformer_18l", 5e-3, "tab:green"),
    Run("DeepNorm", "deepnorm_transformer_18l", 5e-3, "tab:orange"),
    Run("DeepNorm + σReparam", "sigma_transformer_18l", 5e-3, "tab:blue"),
    Run("DeepNorm + σReparam, gamma = sigma", "deepnorm_transformer_18l", 5e-3, "tab:purple", ("--reparam", "sigma")),
)


def fairseq(tool: str, *args) -> subprocess.Popen:
    """One fairseq command."""
    return start("-m", f"fairseq_cli.{tool}", *args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, what: str) -> str:
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{what} failed: {output.strip().splitlines()[-1]}")
    return output


def prepare(out: Path) -> Path:
    """Writes the parallel text and has fairseq binarise it; returns the folder of the binarised data."""
    text, data = out / "text", out / "data"
    if not (data / "test.en-de.de.idx").exists():  # the last file that fairseq-preprocess writes
        text.mkdir(parents=True, exist_ok=True)
        numbers = random.Random(0).sample(range(1_000_000), sum(SIZES.values()))
        for split, size in SIZES.items():
            part, numbers = numbers[:size], numbers[size:]
            english = (re.sub("[-,]", " ", num2words(n, lang="en")) for n in part)
            german = (" ".join(num2words(n, lang="de")) for n in part)
            (text / f"{split}.en").write_text(
                "".join(f"{' '.join(line.split())}\n" for line in english), encoding="utf-8"
            )
            (text / f"{split}.de").write_text("".join(f"{line}\n" for line in german), encoding="utf-8")
        prefixes = [arg for split in SIZES for arg in (f"--{split}pref", text / split)]
        with children.workers(1):  # in which Ctrl-C ends it
            finish(fairseq("preprocess", "-s", "en", "-t", "de", *prefixes, "--destdir", data), "fairseq-preprocess")
    return data


def losses(log: Path) -> dict[int, float]:
    """Training loss in nats per letter, by update; fairseq logs it in bits."""
    curve = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        if line.startswith("{") and '"num_updates"' in line:
            stats = json.loads(line)
            curve[int(stats["num_updates"])] = float(stats["loss"]) * math.log(2)
    return curve


def train(run: Run, data: Path, out: Path, steps: int, seed: int, progressed: Progressed) -> dict[int, float]:
    folder = out / f"{run.name}-{seed}"
    log = folder / "train.log"
    if max(losses(log), default=0) > steps:
        raise RuntimeError(f"{folder} holds a longer run: give another --out for one of {steps} updates")
    folder.mkdir(parents=True, exist_ok=True)
    process = fairseq(  # which goes on from its last checkpoint, and finds at once that a finished run is finished
        "train", data, "--user-dir", ROOT / "plugins/fairseq_sigma", "--arch", run.arch, *run.flags, "--seed", seed, "--cpu",
        *NARROW, "--lr", run.lr, "--warmup-updates", 60, "--batch-size", 48,
        "--max-update", steps, "--num-workers", 0, "--disable-validation",
        "--monitor-every", MONITOR_EVERY,
        "--save-dir", folder, "--save-interval-updates", 50, "--keep-interval-updates", 1, "--no-epoch-checkpoints",
        "--log-format", "json", "--log-interval", LOG_INTERVAL, "--log-file", log,
    )  # fmt: skip
    tail = ""
    for line in process.stdout:
        tail = line.strip() or tail
        if "| train_inner | {" in line and (curve := losses(log)):
            progressed(max(curve), f"loss {curve[max(curve)]:.2f}")
    if process.wait():
        raise RuntimeError(f"{run.label}: training failed: {tail}")
    return losses(log)


@dataclass(frozen=True)
class Translations:
    bleu: float
    pairs: list[tuple[str, str, str]]  # source, reference, translation

    @property
    def exact(self) -> float:
        return sum(reference == translation for _, reference, translation in self.pairs) / len(self.pairs)


def translate(run: Run, data: Path, out: Path, seed: int) -> Translations:
    checkpoint = out / f"{run.name}-{seed}" / "checkpoint_last.pt"
    output = finish(
        fairseq("generate", data, "--user-dir", ROOT / "plugins/fairseq_sigma", "--path", checkpoint, "--cpu",
                "--gen-subset", "test", "--beam", 5, "--batch-size", 50, "--max-len-b", 90, "--no-progress-bar"),
        f"{run.label}: fairseq-generate",
    )  # fmt: skip
    lines = {kind: dict(re.findall(rf"^{kind}-(\d+)\t(.*)$", output, re.M)) for kind in "STH"}
    pairs = [
        (lines["S"][i], lines["T"][i].replace(" ", ""), lines["H"][i].split("\t")[-1].replace(" ", ""))
        for i in sorted(lines["S"], key=int)
    ]
    if len(pairs) != SIZES["test"]:
        raise RuntimeError(f"{run.label}: {len(pairs)} of {SIZES['test']} sentences came out of fairseq-generate")
    return Translations(float(re.search(r"BLEU4? = ([\d.]+)", output)[1]), pairs)


Result = tuple[dict[int, float], Translations]  # loss by update, and the test set


def plot(results: dict[tuple[Run, int], Result], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    first = min(seed for _, seed in results)
    for (run, seed), (curve, _) in results.items():
        label = f"{run.label}, lr {run.lr:g}" if seed == first else None
        axes.plot(curve.keys(), curve.values(), label=label, color=run.color, linewidth=1.2)
    axes.set(xlabel="update", ylabel="training loss, nats per letter", ylim=(0, 3.6))
    axes.set_title("18L-18L translation of number words", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


@dataclass(frozen=True)
class Outcome:
    """What is left of a run: a line of outcomes.jsonl."""

    run: str
    seed: int
    loss: float
    bleu: float
    exact: float


def outcomes(results: dict[tuple[Run, int], Result]) -> list[Outcome]:
    return [
        Outcome(run.name, seed, curve[max(curve)], translations.bleu, translations.exact)
        for (run, seed), (curve, translations) in results.items()
    ]


def table(outcomes: list[Outcome]) -> Table:
    seeds = sorted({each.seed for each in outcomes})
    table = Table("", "learning rate", "training loss", "BLEU (letters)", "numbers right")
    table.title = f"{SIZES['test']} held-out numbers, beam 5" + (
        f", seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    )
    for run in RUNS:
        of_seeds = sorted((each for each in outcomes if each.run == run.name), key=lambda each: each.seed)
        table.add_row(
            run.label,
            f"{run.lr:g}",
            " / ".join(f"{each.loss:.2f}" for each in of_seeds),
            " / ".join(f"{each.bleu:.1f}" for each in of_seeds),
            " / ".join(f"{each.exact:.0%}" for each in of_seeds),
        )
    return table


def show_translations(run: Run, translations: Translations, console: Console) -> None:
    console.print(f"Ten translations by {run.label}:")
    for source, reference, translation in translations.pairs[:10]:
        if translation == reference:
            console.print(f"  [green]✓[/] {source} -> {translation}", highlight=False)
        else:
            console.print(f"  [red]✗[/] {source} -> {translation} ({reference})", highlight=False)


def run_all(args: argparse.Namespace, data: Path, console: Console) -> dict[tuple[Run, int], Result]:
    """Trains and translates."""

    def one(run: Run, seed: int, progressed: Progressed) -> Result:
        curve = train(run, data, args.out, args.steps, seed, progressed)
        loss = f"loss {curve[max(curve)]:.2f}"
        progressed(max(curve), f"{loss}, translating")
        translations = translate(run, data, args.out, seed)
        progressed(max(curve), f"{loss}, BLEU {translations.bleu:.1f}")
        return curve, translations

    jobs = {
        (run, seed): Job(f"{run.label}, seed {seed}", args.steps, partial(one, run, seed))
        for seed in args.seeds
        for run in RUNS
    }
    return side_by_side(jobs, console)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m recipes.number_words.run")
    parser.add_argument("--steps", type=int, default=240, help="updates of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="(default: 1; README.md's figure: 1 2 3)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "number_words", help="(default: runs/number_words)")
    args = parser.parse_args()
    if args.steps < LOG_INTERVAL:
        parser.error(f"--steps {args.steps}: allowed are whole numbers from {LOG_INTERVAL}")
    console = Console()
    console.print(f"[bold]18L-18L, {args.steps} updates[/]; everything goes to {args.out}")
    results = run_all(args, prepare(args.out), console)
    ended = outcomes(results)
    (args.out / "outcomes.jsonl").write_text("".join(json.dumps(asdict(each)) + "\n" for each in ended))
    console.print(table(ended))
    best = max(RUNS, key=lambda run: results[run, args.seeds[0]][1].bleu)
    show_translations(best, results[best, args.seeds[0]][1], console)
    picture = args.out / "number_words.png"
    plot(results, picture)
    page = args.out / "report.html"
    report([args.out / f"{run.name}-{args.seeds[0]}" for run in RUNS], page)
    console.print(
        f"\nThe curves: {picture}\nAttention entropy, spectral norms and gradients of every layer, seed {args.seeds[0]}: {page}"
        "\nNext: recipes/wmt17_en_de/README.md trains on sentences, README.md on your own model."
    )
    return 0


if __name__ == "__main__":
    command(main, "; the same command goes on from the last checkpoint", (RuntimeError,))
