"""Training step time of the residual and reparametrisation choices, side by side: `python -m benchmarks.step_time`.

One process, one batch, one model after the other in every round, so that a machine that slows down slows all of them down.
Prints the median over rounds and the median of the ratios to the pre-LN and the post-LN model of the same round. torch's
`spectral_norm` is on the post-LN model, as is σReparam + post-LN.
"""

import argparse
import platform
import statistics
import time
from argparse import Namespace
from pathlib import Path

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import fairseq_sigma  # noqa: F401  registers the archs

MODELS = {
    "pre-LN": ("preln_transformer_6l", {}),
    "post-LN": ("postln_transformer_6l", {}),
    "σReparam, no LayerNorm": ("sigma_postln_transformer_6l", {"residual": "none"}),
    "σReparam + post-LN": ("sigma_postln_transformer_6l", {}),
    "torch spectral_norm + post-LN": ("postln_transformer_6l", {}),
}


class Task:
    source_dictionary = target_dictionary = Dictionary()


def build(label: str, layers: int, width: int, device: torch.device) -> nn.Module:
    arch, overrides = MODELS[label]
    args = Namespace(
        encoder_embed_dim=width,
        encoder_ffn_embed_dim=4 * width,
        encoder_layers=layers,
        decoder_layers=layers,
        **overrides,
    )
    ARCH_CONFIG_REGISTRY[arch](args)
    torch.manual_seed(0)
    model = ARCH_MODEL_REGISTRY[arch].build_model(args, Task)
    if label.startswith("torch"):
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and ".layers." in name:
                spectral_norm(module)
    return model.to(device).train()


class Step:
    """One update with torch's Adam on a fixed batch."""

    def __init__(self, model: nn.Module, sentences: int, length: int, device: torch.device) -> None:
        self.model, self.device = model, device
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(4, len(Task.source_dictionary), (3, sentences, length), generator=generator).to(device)
        self.source, self.previous, self.target = tokens
        self.lengths = torch.full((sentences,), length, device=device)

    def __call__(self) -> float:
        """Seconds."""
        self._wait()
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(self.logits().flatten(0, -2), self.target.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._wait()
        return time.perf_counter() - start

    def logits(self) -> torch.Tensor:
        return self.model(self.source, self.lengths, self.previous)[0]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def chip(device: torch.device) -> str:
    """What it ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def save(console: Console, out: Path | None) -> None:
    """Appends what the console, which records, has shown."""
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(console.export_text())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6, help="encoder and decoder layers (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[400, 1600], help="target tokens a step (default: 400 1600)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append the table to this file too")
    args = parser.parse_args()
    device = torch.device(args.device)
    for i in range(8000 - len(Task.source_dictionary)):
        Task.source_dictionary.add_symbol(str(i))
    console = Console(record=True, width=120)
    for tokens in args.tokens:
        steps = {
            label: Step(build(label, args.layers, args.width, device), max(1, tokens // 25), 25, device)
            for label in MODELS
        }
        for step in steps.values():
            step()
        times = {label: [] for label in MODELS}
        for _ in track(range(args.rounds), f"{tokens} tokens", console=Console(stderr=True)):
            for label, step in steps.items():
                times[label].append(step())
        table = Table("", "ms a step", "/ pre-LN", "/ post-LN", "min and max of / post-LN")
        shape = f"{args.layers}L-{args.layers}L, width {args.width}, {tokens} tokens"
        table.title = f"{shape}; torch {torch.__version__}, {chip(device)}"
        for label, own in times.items():
            ratios = {base: [a / b for a, b in zip(own, times[base], strict=True)] for base in ("pre-LN", "post-LN")}
            spread = f"{min(ratios['post-LN']):.2f} - {max(ratios['post-LN']):.2f}"
            medians = (f"{statistics.median(r):.2f}" for r in ratios.values())
            table.add_row(label, f"{1000 * statistics.median(own):.0f}", *medians, spread)
        console.print(table)
    save(console, args.out)


if __name__ == "__main__":
    main()
