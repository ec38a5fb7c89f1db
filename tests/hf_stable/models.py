"""Small models, and what is done to them before they are compared with anything."""

import subprocess

import torch
from torch import nn

from hf_stable import StableGPTConfig, StableGPTForCausalLM
from tests.warm import PYTHON

GPT = {"vocab_size": 99, "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64}
OURS = ("stable_core", "stable_monitor", "hf_stable", "timm_stable", "fairseq_sigma", "timm", "fairseq")


def stable_gpt(**settings) -> StableGPTForCausalLM:
    torch.manual_seed(0)
    model = disturbed(StableGPTForCausalLM(StableGPTConfig(**{**GPT, **settings})).eval())
    nn.init.normal_(model.transformer.wpe.weight)  # else it says one token over and over, whatever its cache holds
    return model


@torch.no_grad()
def disturbed(model: nn.Module) -> nn.Module:
    """Norms and biases that are not 1 and 0, so that none can be left out unnoticed."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "gamma" in name:
            parameter.add_(0.2 * torch.rand_like(parameter))
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(seed))


def run_without_package(script: str) -> str:
    """What `script` prints in a process that can import nothing of this project, nor what its plugins are for."""
    block = f"""
import sys
for name in [*sys.modules, *{OURS!r}]:
    if name.split(".")[0] in {OURS!r}:
        sys.modules[name] = None
"""
    done = subprocess.run([PYTHON, "-c", block + script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
