"""What Muon and AdamW each get, in the stacks' models, and that σReparam trains and resumes with both."""

import copy
import re

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

import timm_stable  # noqa: F401  registers the models
from hf_stable import StableGPTConfig, StableGPTForCausalLM
from nanogpt_patch.model import GPT, STOCK, GPTConfig
from stable_core import SigmaReparamConfig, muon_param_groups, sigma_reparam

from .models import equal, state

SIZES = {"block_size": 16, "vocab_size": 31, "n_layer": 2, "n_head": 2, "n_embd": 32}
GPT_BLOCKS = r"transformer\.h\.\d\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)"
TIMM_BLOCKS = r"blocks\.\d\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)"
HF_VIT = r"vit\.layers\.\d\.(attention\.(q_proj|k_proj|v_proj|o_proj)|mlp\.fc[12])"


def sigma_gpt2(**config):
    """All of GPT-2's Conv1D."""
    model = GPT2LMHeadModel(GPT2Config(n_positions=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32))
    return sigma_reparam(model, SigmaReparamConfig(**config), lambda module, name: ".h." in name)


def vit(kind=None):
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=2, img_size=32, num_classes=5)
    return model if kind is None else sigma_reparam(model, SigmaReparamConfig(kind=kind))


def names(model: nn.Module, groups: list[dict]) -> list[str]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [by_id[id(p)] for group in groups for p in group["params"]]


@pytest.mark.parametrize(
    "make, blocks, tail, number",
    [
        (lambda: GPT(GPTConfig(**SIZES, **STOCK)), GPT_BLOCKS, "", 8),
        (lambda: GPT(GPTConfig(**SIZES, reparam="sigma")), GPT_BLOCKS, "original", 8),
        (lambda: StableGPTForCausalLM(StableGPTConfig(**SIZES)), GPT_BLOCKS, "", 8),
        (lambda: StableGPTForCausalLM(StableGPTConfig(**SIZES, tie_word_embeddings=False)), GPT_BLOCKS, "", 8),
        (lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32)), GPT_BLOCKS, "", 8),
        (sigma_gpt2, GPT_BLOCKS, "original", 8),
        (lambda: sigma_gpt2(qkv="qk_joint"), GPT_BLOCKS, "original", 8),
        (vit, TIMM_BLOCKS, "", 8),
        (lambda: vit("sigma"), TIMM_BLOCKS, "original", 8),
        (lambda: vit("spectral"), TIMM_BLOCKS, "original", 8),
        (lambda: vit("weight"), TIMM_BLOCKS, "original1", 8),
        (
            lambda: timm.create_model("sigma_vit_small_patch16_224", depth=2, num_classes=5),
            TIMM_BLOCKS,
            "original",
            8,
        ),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)), r"layers\.\d\..*", "", 19),
        (
            lambda: ViTForImageClassification(ViTConfig(num_hidden_layers=2, hidden_size=24, num_attention_heads=2)),
            HF_VIT,
            "",
            12,
        ),
        (lambda: nn.Transformer(8, 2, 1, 2, 16), r"(en|de)coder\.layers\.\d\..*", "", 16),
        (
            lambda: sigma_reparam(nn.Transformer(8, 2, 1, 2, 16), SigmaReparamConfig(qkv="joint")),
            r"(en|de)coder\.layers\.\d\..*",
            "original",
            16,
        ),
    ],
)
def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest(make, blocks, tail, number):
    model = make()
    muon, adamw = muon_param_groups(model, lr=0.1, weight_decay=0.2, gamma_lr_scale=2.0, muon_lr=0.3)
    matrix = r"\.(parametrizations\.)?(in_proj_)?weight" + (rf"\.{tail}" if tail else "")
    taken = names(model, muon)
    assert len(taken) == number and all(re.fullmatch(blocks + matrix, name) for name in taken)
    assert sorted(taken + names(model, adamw)) == sorted(name for name, _ in model.named_parameters())
    gammas = [name for name, _ in model.named_parameters() if name.endswith(".0.gamma")]
    *of_gammas, rest = adamw
    assert names(model, of_gammas) == gammas
    assert all((group["lr"], group["weight_decay"]) == (0.2, 0.0) for group in of_gammas)
    assert (rest["lr"], rest["weight_decay"]) == (0.1, 0.2)
    assert [(group["lr"], group["weight_decay"]) for group in muon] == [(0.3, 0.2)]
    torch.optim.Muon(muon)  # which refuses what is no matrix
    torch.optim.AdamW(adamw)


def test_what_does_not_learn_is_in_no_group():
    model = GPT(GPTConfig(**SIZES))
    frozen = [model.transformer.wpe.weight, model.transformer.h[0].mlp.c_fc.weight]
    for parameter in frozen:
        parameter.requires_grad_(False)
    muon, adamw = muon_param_groups(model, 0.1, 0.0)
    kept = {id(p) for group in (*muon, *adamw) for p in group["params"]}
    assert kept == {id(p) for p in model.parameters()} - {id(p) for p in frozen}


def test_heads_and_embeddings_are_known_inside_of_lists_too():
    block = nn.ModuleDict(
        {"fc": nn.Linear(4, 4), "patch_embed": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4))}
    )
    model = nn.Sequential(nn.Embedding(5, 4), block, nn.Linear(4, 5))
    assert names(model, muon_param_groups(model, 0.1, 0.0)[0]) == ["1.fc.weight"]
    picked = muon_param_groups(model, 0.1, 0.0, filter_fn=lambda module, name: name in ("2", "1.head.0"))
    assert names(model, picked[0]) == ["1.head.0.weight", "2.weight"]


def test_a_head_with_a_parametrization_is_a_head():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4)})]), "out": nn.Linear(4, 4)})
    spectral_norm(model["out"])
    assert names(model, muon_param_groups(model, 0.1, 0.0)[0]) == ["blocks.0.fc.weight"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"lr": 0}, "lr = 0: allowed are positive numbers"),
        ({"muon_lr": -0.1}, "muon_lr = -0.1: allowed are positive numbers"),
        ({"weight_decay": -1}, "weight_decay = -1: allowed are numbers from 0"),
        ({"filter_fn": lambda m, n: False}, r"GPT: filter_fn matches nothing; its linear layers: transformer\.h\.0"),
        ({"filter_fn": lambda m, n: True}, "lm_head: transformer.wte has the same weight; leave it out with filter_fn"),
        ({"filter_fn": lambda m: True}, r"filter_fn = <.*>: allowed are functions filter_fn\(module, name\) -> bool"),
    ],
)
def test_wrong_values_are_named(wrong, message):
    model = GPT(GPTConfig(**SIZES))
    with pytest.raises(ValueError, match=message):
        muon_param_groups(model, **{"lr": 0.1, "weight_decay": 0.1, **wrong})


def test_a_model_without_blocks_says_so():
    with pytest.raises(ValueError, match=r"Sequential: no linear layer inside of a block, .* its linear layers: 0, 1"):
        muon_param_groups(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0.1, 0.1)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    muon, adamw = muon_param_groups(model, lr=1e-2, weight_decay=0.1)
    return [torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(adamw)]


def update(model: nn.Module, both: list[torch.optim.Optimizer], steps: range) -> list[float]:
    losses = []
    for step in steps:
        batch = torch.randint(31, (4, 17), generator=torch.Generator().manual_seed(step))
        loss = model(batch[:, :-1], batch[:, 1:].contiguous())[1]
        loss.backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_u_follows_the_weights_of_each_optimizer():
    """One power iteration, written out, for each step of the optimizer that has the weight; the head is AdamW's."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(48, 48)}) for _ in range(2))
    model = sigma_reparam(nn.ModuleDict({"blocks": blocks, "head": nn.Linear(48, 48)}))
    muon, adamw = optimizers(model)
    layers = [blocks[0]["fc"], blocks[1]["fc"], model["head"]]
    for optimizer, moved in [(muon, (True, True, False)), (adamw, (False, False, True))] * 5:
        x = torch.randn(32, 48)
        (layers[2](layers[1](layers[0](x).tanh())) - x).square().mean().backward()
        before = state(model)
        optimizer.step()
        model.zero_grad()
        for layer, u, advanced, moves in zip(layers, before, state(model), moved, strict=True):
            W = layer.parametrizations.weight.original.detach()
            torch.testing.assert_close(advanced, nn.functional.normalize(W @ (W.T @ u), dim=0) if moves else u)


@pytest.mark.parametrize("reparam", ["none", "sigma"])
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(reparam):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, reparam=reparam))
    both = optimizers(model)
    first = update(model, both, range(4))
    saved = copy.deepcopy([model.state_dict(), *(optimizer.state_dict() for optimizer in both)])
    never_stopped = update(model, both, range(4, 8))
    resumed = GPT(GPTConfig(**SIZES, reparam=reparam))
    resumed.load_state_dict(saved[0])
    again = optimizers(resumed)
    for optimizer, held in zip(again, saved[1:], strict=True):
        optimizer.load_state_dict(held)
    assert update(resumed, again, range(4, 8)) == never_stopped
    assert equal(list(resumed.state_dict().values()), list(model.state_dict().values()))
    assert min(never_stopped) < min(first)
