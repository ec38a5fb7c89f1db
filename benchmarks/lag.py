"""How far sigma lags behind the norm in training, and what a second power iteration gives: `python -m benchmarks.lag`.

A small GPT (4 layers, width 128, bytes of Python's own documentation) with σReparam and LayerNorm, without warm-up, AdamW or,
with `--muon`, Muon for the matrices and AdamW for the rest.
The lag of a weight is 1 - sigma / |W|, by an SVD at every second update; |W_hat| is then 1 / (1 - lag) gammas.
"""

import argparse
import pydoc_data.topics

import torch

from nanogpt_patch.model import GPT, STOCK, GPTConfig
from stable_core import SigmaReparamConfig, muon_param_groups, sigma_layers, sigma_reparam

STAGES = ((0, 20), (20, 100), (100, 200))  # updates


def lags(model: torch.nn.Module) -> list[float]:
    found = []
    for _, sigma in sigma_layers(model):
        blocks = sigma._stacked().split(sigma.rows)
        norms = torch.stack([torch.linalg.svdvals(W)[0] for W in blocks])
        found += (1 - sigma.sigma() / norms).tolist()
    return found


def build_optimizers(model: torch.nn.Module, lr: float, muon: bool) -> list[torch.optim.Optimizer]:
    if not muon:
        return [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)]
    matrices, rest = muon_param_groups(model, lr, weight_decay=0.1)
    return [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(rest)]


def run(lr: float, n: int, updates: int, muon: bool) -> list[list[float]]:
    """The lags of all sigmas, at every second update."""
    torch.manual_seed(0)
    text = torch.tensor(list("".join(pydoc_data.topics.topics.values()).encode()))
    plain = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=4, n_head=4, n_embd=128, **STOCK))
    model = sigma_reparam(plain, SigmaReparamConfig(gamma_init="spectral", n_power_iterations=n))
    optimizers, found = build_optimizers(model, lr, muon), []
    for update in range(updates):
        start = torch.randint(len(text) - 65, (8, 1)) + torch.arange(65)
        loss = model(text[start][:, :-1], text[start][:, 1:].contiguous())[1]
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if update % 2:
            found.append(lags(model))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lag", description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=STAGES[-1][1], help="(default: %(default)s)")
    parser.add_argument("--muon", action="store_true", help="for the matrices of the blocks (default: AdamW for all)")
    args = parser.parse_args()
    print("lag in %: median, 90th percentile, worst of all sigmas and records; by updates")
    for lr in (1e-3, 1e-2, 1e-1):
        for n in (1, 2):
            found = run(lr, n, args.updates, args.muon)
            cells = []
            for first, last in STAGES:
                some = torch.tensor(found[first // 2 : last // 2]).flatten()
                if len(some):
                    middle, high = torch.quantile(some, torch.tensor([0.5, 0.9])).tolist()
                    cells.append(f"{first}-{last}: {100 * middle:.2f} {100 * high:.2f} {100 * some.max().item():.1f}")
            print(f"lr {lr:g}, {n} iteration{'s' * (n > 1)} | {' | '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
