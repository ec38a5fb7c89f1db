"""Tiny models of every plugin, the batches they train on, and the one training loop that every engine runs.

Every sigma is of more than 64 rows and columns but the classifier's: up to 64 an exact decomposition finds its start. 131,
99 and 11 outputs do not divide by two, so that shards differ in size.
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import hf_stable
import timm_stable  # noqa: F401  registers the models
from hf_stable import StableGPTConfig, StableGPTForCausalLM
from nanogpt_patch.model import GPT, GPTConfig
from stable_core.sigma_reparam import SigmaReparam

STEPS, BATCH, VOCABULARY, CLASSES = 5, 8, 99, 11
VIT = {"img_size": 32, "patch_size": 8, "num_classes": CLASSES, "embed_dim": 96, "depth": 2, "num_heads": 2,
       "mlp_ratio": 131 / 96}  # fmt: skip
SIZE = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 2, "n_embd": 96}


def sigma_vit() -> nn.Module:
    """Its weights are large, else any two outputs are close."""
    return timm.create_model("sigma_vit_small_patch16_224", weight_std=0.06, patch_std=0.06, **VIT)


def stablevit() -> nn.Module:
    return timm.create_model("stablevit_small", **VIT)


def stable_gpt(**settings) -> nn.Module:
    return StableGPTForCausalLM(StableGPTConfig(**SIZE, block_size=32, n_inner=131, bias=True, **settings))


def sigma_gpt() -> nn.Module:
    return stable_gpt(reparam="sigma", qkv="qk_joint")


def gpt2() -> nn.Module:
    """transformers' own, whose Conv1D layers have their weights transposed."""
    special = {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf_stable.sigma_reparam(GPT2LMHeadModel(GPT2Config(**SIZE, n_positions=32, n_inner=131, **special)))


def nanogpt() -> nn.Module:
    return GPT(GPTConfig(**SIZE, block_size=32, reparam="sigma", gamma_init="one"))


KINDS = {make.__name__: make for make in (sigma_vit, stablevit, stable_gpt, sigma_gpt, gpt2, nanogpt)}
REPARAMETRISED = [kind for kind in KINDS if not kind.startswith("stable")]


def build(kind: str, seed: int = 0) -> nn.Module:
    """Norms, biases and gammas are not the 1 and 0 they start from, so that none can be left out unnoticed."""
    torch.manual_seed(seed)
    model = KINDS[kind]().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.rand_like(parameter))
    return model


def blocks(model: nn.Module) -> nn.Module:
    return model.blocks if hasattr(model, "blocks") else model.transformer.h


def reparametrised(model: nn.Module) -> list[SigmaReparam]:
    return [module for module in model.modules() if isinstance(module, SigmaReparam)]


def checkpoint_activations(model: nn.Module) -> nn.Module:
    """As each stack does it: its blocks run a second time in the backward pass."""
    (model.set_grad_checkpointing if hasattr(model, "blocks") else model.gradient_checkpointing_enable)()
    return model


def batch(kind: str, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    if "vit" in kind:
        images = torch.randn(BATCH, 3, 32, 32, generator=generator)
        return images, torch.randint(CLASSES, (BATCH,), generator=generator)
    tokens = torch.randint(VOCABULARY, (BATCH, 17), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def arguments(kind: str, inputs: Tensor) -> tuple[tuple, dict]:
    """Positional and named ones, for the logits of every position."""
    if kind == "nanogpt":
        return (inputs, inputs), {}  # without targets it gives the last position's alone
    return (inputs,), {} if "vit" in kind else {"use_cache": False}


def logits(kind: str, called: Callable, inputs: Tensor) -> Tensor:
    args, kwargs = arguments(kind, inputs)
    output = called(*args, **kwargs)
    return output if isinstance(output, Tensor) else output[0]


def mean_loss(kind: str, called: Callable, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits(kind, called, inputs).flatten(0, -2).float(), targets.flatten())


def losses(
    kind: str, called: Callable, step: int, part: tuple[int, int] = (0, 1), micro_batches: int = 1
) -> Iterator[Tensor]:
    """The losses of the micro-batches of a step, whose sum is the mean loss of `part`, (rank, world size), of the batch.

    Each forward pass runs when its loss is asked for.
    """
    rank, world = part
    shares = [tensor.chunk(world)[rank].chunk(micro_batches) for tensor in batch(kind, step)]
    for inputs, targets in zip(*shares, strict=True):
        yield mean_loss(kind, called, inputs, targets) / micro_batches


def together(losses: Iterator[Tensor]) -> None:
    """All forward passes, then one backward pass."""
    sum(losses).backward()


def accumulated(losses: Iterator[Tensor]) -> None:
    """After each forward pass its backward pass."""
    for loss in losses:
        loss.backward()


def train(
    kind: str,
    called: Callable,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int] = range(STEPS),
    part: tuple[int, int] = (0, 1),
    micro_batches: int = 1,
    backward: Callable[[Iterator[Tensor]], None] = together,
) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(losses(kind, called, step, part, micro_batches))
        optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Not Adam, to which gradients that are twice too large would look right."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@functools.cache
def alone(kind: str, steps: tuple[int, ...] = tuple(range(STEPS))) -> dict[str, Tensor]:
    """The state dict that one process trains on whole batches, without any engine."""
    model = build(kind)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(kind, model, sgd(model), steps)
    state = model.state_dict()
    for name, tensor in state.items():
        moved = name.endswith("_extra_state") or (tensor - start[name]).abs().max() > 1e-4  # a layout is not trained
        assert moved, f"{name} hardly moved: a comparison would say little"
    return state


def assert_same_run(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Sums in another order round otherwise; in u the more, the closer the first two singular values are."""
    directions = [{name: x for name, x in some.items() if name.endswith(".u")} for some in (state, expected)]
    rest = [{name: x for name, x in some.items() if not name.endswith(".u")} for some in (state, expected)]
    torch.testing.assert_close(*rest, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(*directions, rtol=1e-5, atol=1e-5)
