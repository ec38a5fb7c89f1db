"""ViTs with σReparam as timm's own models, against timm's ViT and singular values."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.utils import parametrize

import timm_stable  # noqa: F401  registers the models
from stable_core import fold

SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 5, "depth": 3}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NAME = "sigma_vit_small_patch16_224"


def small(name: str = NAME, **settings):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **settings})


def test_registered_in_sizes_that_are_timms():
    assert len(timm.list_models("sigma_vit_*")) == 8
    for ours, theirs in ((NAME, "vit_small_patch16_224"), ("sigma_vit_huge_patch14_224", "vit_huge_patch14_224")):
        a, b = (timm.create_model(name, num_classes=10, device="meta") for name in (f"{ours}_preln", theirs))
        reparametrised = sum(parametrize.is_parametrized(m) for m in a.modules())
        gammas = sum(p.numel() for n, p in a.named_parameters() if n.endswith(".gamma"))
        assert sum(p.numel() for p in a.parameters()) - gammas == sum(p.numel() for p in b.parameters())
        assert reparametrised == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in b.modules())


def test_every_layer_is_reparametrised_and_no_norm_is_left():
    model = small()
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            rows = module.weight.flatten(1).chunk(3 if name.endswith("qkv") else 1)
            gammas = module.parametrizations.weight[0].gamma
            sigmas = torch.stack([torch.linalg.matrix_norm(part, 2) for part in rows])
            torch.testing.assert_close(gammas, sigmas, rtol=2e-3, atol=0)
    assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    large = small("sigma_vit_large_patch16_224", embed_dim=256, num_heads=4)
    assert large.patch_embed.proj.weight.std().item() == pytest.approx(0.0025, rel=0.05)
    assert large.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_every_parameter_has_a_gradient_and_checkpointing_changes_nothing():
    model = small()
    results = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        model(IMAGES).square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for (name, _), a, b in zip(model.named_parameters(), *results, strict=True):
        torch.testing.assert_close(a, b)
        assert a.any(), name


def test_a_stock_checkpoint_loads_with_its_function(tmp_path):
    stock = timm.create_model("vit_small_patch16_224", **SMALL).eval()
    save_file(stock.state_dict(), tmp_path / "vit.safetensors")
    overlay = {"file": str(tmp_path / "vit.safetensors"), "num_classes": 5}
    ours = small(f"{NAME}_preln", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    torch.testing.assert_close(ours(IMAGES), stock(IMAGES), rtol=1e-4, atol=1e-5)
    folded = fold(copy.deepcopy(ours))
    torch.testing.assert_close(folded(IMAGES), stock(IMAGES), rtol=1e-4, atol=1e-5)
    assert folded.state_dict().keys() == stock.state_dict().keys()

    other = small(f"{NAME}_preln", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, img_size=64).eval()
    torch.testing.assert_close(other.blocks[1].attn.qkv.weight, stock.blocks[1].attn.qkv.weight, rtol=1e-4, atol=1e-5)
    assert other(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_own_checkpoints_and_what_timm_does_with_a_model(tmp_path):
    model = small().eval()
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    again = small(weight_std=0.1).eval()
    again.load_state_dict(load_file(tmp_path / "own.safetensors"))
    assert torch.equal(again(IMAGES), model(IMAGES))
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
    _, intermediates = model.forward_intermediates(IMAGES)
    features = timm.create_model(NAME, features_only=True, **SMALL)
    assert [x.shape for x in features(IMAGES)] == [x.shape for x in intermediates]
    model.reset_classifier(3)
    assert parametrize.is_parametrized(model.head) and model(IMAGES).shape == (2, 3)
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    assert all(p.ndim > 1 for p in groups[1]["params"])  # gamma is not decayed


@pytest.mark.parametrize("reparam", ["sigma", "spectral", "weight"])
def test_from_the_meta_device_to_the_same_weights(reparam):
    settings = {"reparam": reparam, "layer_norm": True}
    model = small(**settings, device="meta").to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(torch.nan)
    torch.manual_seed(0)
    model.init_weights()
    direct = small(**settings)
    torch.manual_seed(0)
    direct.init_weights()
    for (name, a), b in zip(model.state_dict().items(), direct.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert model(IMAGES).isfinite().all()


def test_bad_settings():
    with pytest.raises(ValueError, match="kind = 'sgima': allowed are 'sigma', 'spectral', 'weight'"):
        small(reparam="sgima")
    with pytest.raises(ValueError, match="gamma_init = 'two': allowed are 'one', 'spectral'"):
        small(gamma_init="two")
