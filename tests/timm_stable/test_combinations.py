"""Every two methods that go together, in timm's Vision Transformer: it trains, is saved, loads, and folds."""

import io

import pytest
import timm
import torch
import torch.nn.functional as F

import timm_stable  # noqa: F401  registers the models
from stable_core import deepnorm_scales, fold
from tests.combinations import combined, label

SMALL = {"img_size": 16, "patch_size": 8, "num_classes": 5, "depth": 2, "embed_dim": 48, "num_heads": 3}
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 2, 3])


def build(**settings):
    torch.manual_seed(0)
    return timm.create_model("stablevit_small", **SMALL, **settings)


def three_updates(model):
    """The losses before each, and after the last."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        losses.append(F.cross_entropy(model(IMAGES), CLASSES))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return [*losses, F.cross_entropy(model(IMAGES), CLASSES)]


@pytest.mark.parametrize("settings", combined(), ids=label)
def test_it_trains_is_saved_and_folds(settings):
    model = build(**settings)
    losses = three_updates(model)
    assert losses[3] < losses[0]
    torch.save(model.state_dict(), file := io.BytesIO())
    file.seek(0)
    again = build(**settings)
    again.load_state_dict(torch.load(file))
    expected = model.eval()(IMAGES)
    assert torch.equal(again.eval()(IMAGES), expected)
    if settings["reparam"] != "none":
        torch.testing.assert_close(fold(again)(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_deepnorm_by_hand():
    """LayerNorm(alpha x + f(x)), no norm after the last block, and v, proj and the MLP drawn smaller by beta."""
    stock = {"norm": "layernorm", "attention": "dot", "init": "stock"}
    model, plain = build(**stock, residual="deepnorm").eval(), build(**stock)
    alpha, beta = deepnorm_scales(2, 0).encoder
    width = SMALL["embed_dim"]
    for block, other in zip(model.blocks, plain.blocks, strict=True):
        for name, W in block.named_parameters():
            expected = other.get_parameter(name).clone()
            if name == "attn.qkv.weight":
                expected[2 * width :] *= beta
            elif name in ("attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"):
                expected *= beta
            torch.testing.assert_close(W, expected)
    x = model.patch_embed(IMAGES)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1) + model.pos_embed
    for block in model.blocks:
        x = F.layer_norm(alpha * x + block.attn(x), (width,), eps=1e-6)
        x = F.layer_norm(alpha * x + block.mlp(x), (width,), eps=1e-6)
    torch.testing.assert_close(model(IMAGES), model.head(x[:, 0]))
