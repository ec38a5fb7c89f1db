"""How σReparam ViTs begin: every parameter as timm draws it, though not drawn as timm draws it."""

import math

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from timm.layers import Attention
from torch import nn

import timm_stable  # noqa: F401  registers the models
from stable_core import fold

SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 50, "depth": 3}
OURS, THEIRS = "sigma_vit_small_patch16_224_preln", "vit_small_patch16_224"
TIMMS = {"weight_std": 0.02, "patch_std": 0.02}


@pytest.fixture(autouse=True)
def undrawn_is_nan():
    """torch.empty then gives NaN, and not what an earlier model left there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class LowRankAttention(Attention):
    """With parameters of its own, which are no Linear layer's: they too are drawn by kaiming_uniform_."""

    def __init__(self, dim, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.down = nn.Parameter(torch.empty(8, dim))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.conv = nn.Conv1d(dim, 16, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init_values": 0.1, "qk_norm": True, "scale_mlp_norm": True, "reg_tokens": 4, "pre_norm": True},
        {"class_token": False, "global_pool": "avg", "qkv_bias": False, "pos_embed": "none", "fix_init": True},
        {"global_pool": "map", "no_embed_class": True, "num_classes": 0},
        {"attn_layer": LowRankAttention},
        {"weight_init": "skip"},
        {"weight_init": "reset"},
        {"weight_init": "jax", "num_classes": 0, "attn_layer": LowRankAttention},  # a head would be zero: no sigma
        {"weight_init": "moco"},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_distributions_are_timms(settings):
    torch.manual_seed(0)
    theirs = timm.create_model(THEIRS, **{**SMALL, **settings}).state_dict()
    ours = fold(timm.create_model(OURS, **{**SMALL, **TIMMS, **settings})).state_dict()
    assert ours.keys() == theirs.keys()
    skipped = settings.get("weight_init") == "skip"
    for name, x in ours.items():
        y, n = theirs[name], x.numel()
        assert x.dtype == y.dtype
        if skipped and name in ("cls_token", "pos_embed"):
            continue  # undrawn in timm's too
        if name == "patch_embed.proj.weight" and not skipped:  # theirs is uniform, ours normal
            assert x.std().item() == pytest.approx(0.02, rel=5 / n**0.5)
        elif (y == y.flatten()[0]).all():  # a constant
            torch.testing.assert_close(x, y)
        else:
            scale = y.std().item()
            assert x.std().item() == pytest.approx(scale, rel=6 / n**0.5), name
            assert x.mean().item() == pytest.approx(y.mean().item(), abs=6 * scale / n**0.5), name
            uniform = y.abs().max() < 2 * y.std()
            assert (x.abs().max() < 2 * x.std()) == uniform, name


def test_weight_std_is_that_of_linear_layers():
    model = fold(timm.create_model(OURS, **SMALL, weight_std=0.005, patch_std=0.1))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            std = 0.1 if name == "patch_embed.proj" else 0.005
            assert module.weight.std().item() == pytest.approx(std, rel=0.05), name
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("mode", ["jax", "moco", "reset"])
def test_other_modes_of_timms_keep_their_own(mode):
    settings = {**SMALL, "depth": 1, "embed_dim": 192, "num_heads": 3, "num_classes": 0, "weight_init": mode}
    theirs, ours = timm.create_model(THEIRS, **settings), fold(timm.create_model(OURS, **settings))
    std = theirs.blocks[0].mlp.fc1.weight.std().item()
    assert ours.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize(
    ("size", "weights", "patches"),
    [("base_patch16", 0.02, 0.02), ("large_patch16", 0.01, 0.0025), ("huge_patch14", 0.01, 0.0025)],
)  # [σ, Tables 13, 14, App. I]
def test_the_papers_sizes_draw_the_papers_numbers(size, weights, patches):
    states = []
    for settings in ({}, {"weight_std": weights, "patch_std": patches}):
        torch.manual_seed(0)
        states.append(timm.create_model(f"sigma_vit_{size}_224", depth=1, **settings).state_dict())
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    W = states[0]["blocks.0.mlp.fc1.parametrizations.weight.original"]
    assert W.std().item() == pytest.approx(weights, rel=0.01)
    assert states[0]["patch_embed.proj.parametrizations.weight.original"].std().item() == pytest.approx(
        patches, rel=0.01
    )


def test_other_sizes_have_their_spectral_norm():
    model = timm.create_model(OURS, img_size=8, patch_size=2, embed_dim=96, num_heads=3, depth=2)
    for block in model.blocks:
        for layer in (block.mlp.fc1, block.mlp.fc2):
            norm = torch.linalg.matrix_norm(layer.weight, 2).item()
            assert norm == pytest.approx(0.02 * (math.sqrt(768) + math.sqrt(3072)), rel=0.05)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(0.02 * 8, rel=0.1)  # patches an eighth as wide


@pytest.mark.parametrize("name", [OURS, OURS.removesuffix("_preln")])
def test_a_narrow_model_learns_digits(name):
    """Where 0.02 whatever the width stays at log(10) = 2.30 nats."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None], torch.tensor(digits.target)

    def loss_after_training(**settings) -> float:
        torch.manual_seed(0)
        size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 96, "depth": 2, "num_heads": 4}
        model = timm.create_model(name, num_classes=10, **size, **settings)
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for step in range(80):
            batch = torch.arange(32 * step, 32 * (step + 1)) % len(labels)
            losses.append(nn.functional.cross_entropy(model(images[batch]), labels[batch]))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        return torch.stack(losses[-10:]).mean().item()

    assert loss_after_training() < 2.1 < 2.25 < loss_after_training(**TIMMS)


def test_a_seed_gives_one_model():
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(timm.create_model(OURS, **SMALL).state_dict())
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
