"""ViTs with σReparam as timm's own models, against timm's ViT and singular values."""

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

import timm_stable  # noqa: F401  registers the models
from stable_core import fold
from timm_stable.checkpoints import checkpoint_filter_fn

SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 5, "depth": 3}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NAME = "sigma_vit_small_patch16_224"


def small(name: str = NAME, **settings):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **settings})


def test_every_layer_is_reparametrised_and_no_norm_is_left():
    model = small()
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            rows = module.weight.flatten(1).chunk(3 if name.endswith("qkv") else 1)
            gammas = module.parametrizations.weight[0].gamma
            sigmas = torch.stack([torch.linalg.matrix_norm(part, 2) for part in rows])
            torch.testing.assert_close(gammas, sigmas, rtol=2e-3, atol=0)


def test_a_stock_checkpoint_loads_with_its_function(tmp_path):
    stock = timm.create_model("vit_small_patch16_224", **SMALL).eval()
    save_file(stock.state_dict(), tmp_path / "vit.safetensors")
    overlay = {"file": str(tmp_path / "vit.safetensors"), "num_classes": 5}
    ours = small(f"{NAME}_preln", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    torch.testing.assert_close(ours(IMAGES), stock(IMAGES), rtol=1e-4, atol=1e-5)
    folded = fold(copy.deepcopy(ours))
    torch.testing.assert_close(folded(IMAGES), stock(IMAGES), rtol=1e-4, atol=1e-5)
    assert folded.state_dict().keys() == stock.state_dict().keys()

    again = small(f"{NAME}_preln", checkpoint_path=overlay["file"]).eval()  # timm's --initial-checkpoint
    torch.testing.assert_close(again(IMAGES), stock(IMAGES), rtol=1e-4, atol=1e-5)

    other = small(f"{NAME}_preln", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, img_size=64).eval()
    torch.testing.assert_close(other.blocks[1].attn.qkv.weight, stock.blocks[1].attn.qkv.weight, rtol=1e-4, atol=1e-5)
    assert other(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def overlay(model: nn.Module, path, num_classes: int = 5) -> dict:
    save_file(model.state_dict(), path)
    return {"file": str(path), "num_classes": num_classes}


@pytest.mark.parametrize("reparam", ["sigma", "spectral", "weight"])
def test_a_stock_checkpoint_loads_into_the_baselines_too(reparam, tmp_path):
    stock = timm.create_model("vit_small_patch16_224", **SMALL).eval()
    given = overlay(stock, tmp_path / "vit.safetensors")
    ours = small(f"{NAME}_preln", reparam=reparam, pretrained=True, pretrained_cfg_overlay=given).eval()
    torch.testing.assert_close(ours(IMAGES), stock(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_classes", [5, 3])
def test_an_own_checkpoint_is_fine_tuned_with_a_new_head(num_classes, tmp_path):
    model = small(weight_std=0.05).eval()
    given = overlay(model, tmp_path / "own.safetensors", num_classes=-1)  # train.py --pretrained-path: not this head
    settings = {"num_classes": num_classes, "pretrained_cfg_overlay": given}
    again, fresh = small(pretrained=True, **settings).eval(), small(**settings)
    assert torch.equal(again.forward_features(IMAGES), model.forward_features(IMAGES))
    assert torch.equal(again.head.weight, fresh.head.weight)
    W = "parametrizations.weight.original"  # its size is not in the function, but is how fast it learns
    assert torch.equal(again.blocks[1].attn.qkv.get_parameter(W), model.blocks[1].attn.qkv.get_parameter(W))


@pytest.mark.parametrize("qkv", ["separate", "joint"])
def test_an_own_checkpoint_from_before_layouts_is_taken_as_it_is(qkv):
    model, other = small(qkv="joint"), small(qkv=qkv)
    state = {name: x for name, x in model.state_dict().items() if not name.endswith("_extra_state")}
    filtered = checkpoint_filter_fn(state, other)
    if qkv == "joint":
        assert filtered is state
    other.load_state_dict(filtered)
    torch.testing.assert_close(other.eval()(IMAGES), model.eval()(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 4}, "Missing key.*blocks.3.attn.qkv"),
        ({"depth": 2}, "Unexpected key.*blocks.2.attn.qkv"),
        ({"embed_dim": 192, "num_heads": 3}, "size mismatch for blocks.0.attn.qkv.weight"),
        ({"norm": "none"}, "Unexpected key.*blocks.0.norm1.weight"),
    ],
)
def test_checkpoints_of_other_models_are_refused(settings, message, tmp_path):
    stock = timm.create_model("vit_small_patch16_224", **SMALL)
    own = small(norm="layernorm")
    for other in (stock, own):
        given = overlay(other, tmp_path / "other.safetensors")
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            small(**{"norm": "layernorm", **settings}, pretrained=True, pretrained_cfg_overlay=given)


@pytest.mark.parametrize("reparam", ["sigma", "spectral", "weight"])
def test_from_the_meta_device_to_the_same_weights(reparam):
    settings = {"reparam": reparam, "norm": "layernorm"}
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
    with pytest.raises(ValueError, match=r"^reparam = 'sgima': allowed are 'none', 'sigma'"):
        small(reparam="sgima")
    with pytest.raises(ValueError, match=r"weight_std = 0.1: reparam = 'none' and init"):
        small(reparam="none", weight_std=0.1)
    with pytest.raises(ValueError, match="residual = 'deepnorm': it says where the norm is"):
        small(residual="deepnorm")
    with pytest.raises(ValueError, match="norm_layer = 'rmsnorm': norm = 'none' is another"):
        small(norm_layer="rmsnorm")
    with pytest.raises(ValueError, match="attention = 'l2': a ParallelScalingBlock cannot do it"):
        small(attention="l2", block_fn=ParallelScalingBlock)
    for field in ("weight_std", "patch_std"):
        with pytest.raises(ValueError, match=f"{field} = 0.0: allowed are positive numbers"):
            small(**{field: 0.0})
    with pytest.raises(ValueError, match="gamma_init = 'two': allowed are 'one', 'spectral'"):
        small(gamma_init="two")
