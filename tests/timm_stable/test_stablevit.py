"""StableViT as one of timm's own models, against timm's ViT and the papers' formulas."""

import math

import pytest
import timm
import torch
from torch import nn

import timm_stable  # noqa: F401  registers the models
from stable_monitor import Monitor

SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 5, "depth": 3}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small(**settings):
    torch.manual_seed(0)
    return timm.create_model("stablevit_small", **{**SMALL, **settings})


@pytest.mark.parametrize(
    ("name", "millions"), [("large", 307), ("huge", 632), ("giant", 1011)]  # [ST, Table 1]
)  # fmt: skip
def test_parameter_counts_are_the_papers(name, millions):
    model = timm.create_model(f"stablevit_{name}", device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_with_stock_settings_it_is_timms_vit():
    stock = timm.create_model("vit_small_patch16_224", **SMALL).eval()
    ours = small(norm="layernorm", attention="dot", init="stock").eval()
    ours.load_state_dict(stock.state_dict())
    assert torch.equal(ours(IMAGES), stock(IMAGES))
    torch.manual_seed(0)
    stock = timm.create_model("vit_small_patch16_224", **SMALL)
    for a, b in zip(
        small(norm="layernorm", attention="dot", init="stock").parameters(), stock.parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_logits_are_within_tau_whatever_the_weights():
    model = small(alpha=0.25)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(1000)
            block.attn.qkv.weight[:384] = block.attn.qkv.weight[384:768]  # each token's own key is along its query
    monitor = Monitor(model, 1)
    model(IMAGES).sum().backward()
    layers = monitor.step()["layers"].values()
    tau = 1.618 * math.log2(17)  # 16 patches and the class token
    assert all(layer["max_logit"] == pytest.approx([tau] * 6, rel=1e-4) for layer in layers)
    monitor.close()


@pytest.mark.parametrize("attention", ["l2", "l2_tied"])
def test_l2_attention_against_distances(attention):
    attn = small(attention=attention, scale_attn_norm=True).blocks[0].attn.eval()
    x = torch.randn(2, 17, 384, generator=torch.Generator().manual_seed(1))
    q, k, v = attn.qkv(x).unflatten(-1, (3, 6, 64)).permute(2, 0, 3, 1, 4)
    squared = torch.cdist(q, q if attention == "l2_tied" else k).square()
    expected = attn.proj(attn.norm(((-squared / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)))
    torch.testing.assert_close(attn(x), expected, rtol=1e-4, atol=1e-5)


def test_initialisations():
    std = 1 / (math.sqrt(384) + math.sqrt(1536))
    assert small().blocks[1].mlp.fc1.weight.std().item() == pytest.approx(std, rel=0.02)
    patch = 1 / (math.sqrt(3 * 64) + math.sqrt(384))
    assert small().patch_embed.proj.weight.std().item() == pytest.approx(patch, rel=0.03)
    xavier = math.sqrt(2 / (384 + 1536))
    assert small(init="xavier").blocks[1].mlp.fc1.weight.std().item() == pytest.approx(xavier, rel=0.02)
    model = small()
    model.reset_classifier(200)
    assert model.head.weight.std().item() == pytest.approx(1 / (math.sqrt(384) + math.sqrt(200)), rel=0.02)


def test_from_the_meta_device_to_the_same_weights():
    model = small(device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    torch.manual_seed(0)
    direct = small()
    torch.manual_seed(0)
    direct.init_weights()
    for (name, a), b in zip(model.named_parameters(), direct.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "stabel"}, "attention = 'stabel': allowed are 'dot', 'qknorm', 'stable', 'l2', 'l2_tied'"),
        ({"alpha": 0.7}, "alpha = 0.7: allowed are numbers from 0 to 0.5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)
    with pytest.raises(TypeError, match="apha"):
        small(apha=0.5)
