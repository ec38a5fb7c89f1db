"""StableViT and SigmaViT; that they compute what timm's models do is in test_convert.py."""

import pytest
import torch

from hf_stable import (
    SigmaViTConfig,
    SigmaViTForImageClassification,
    StableViTConfig,
    StableViTForImageClassification,
    StableViTModel,
)

TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "num_labels": 5}  # fmt: skip
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("size", "millions"), [("large", 307), ("huge", 632), ("giant", 1011), ("200", 1439)])
def test_presets_have_the_parameters_of_table_1(size, millions):
    with torch.device("meta"):
        model = StableViTForImageClassification(StableViTConfig.preset(size, num_labels=1000))
    # 1.4 % below the paper's for the 200 blocks, as in timm_stable; see docs/timm.md.
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.015)


def test_presets():
    assert SigmaViTConfig.preset("large").patch_initializer_range == 0.0025  # [σ, App. H]
    assert SigmaViTConfig.preset("large", initializer_range=0.03).initializer_range == 0.03
    assert SigmaViTConfig.preset("base").patch_initializer_range is None
    with pytest.raises(ValueError, match="size = 'tiny': allowed are 'small', 'base', 'large', 'huge', 'giant', '200'"):
        StableViTConfig.preset("tiny")


def test_initialisation_of_sigma_vit_large():
    torch.manual_seed(0)
    model = SigmaViTForImageClassification(SigmaViTConfig.preset("large", num_hidden_layers=1, image_size=32))
    for layer, std in ((model.vit.patch_embed.proj, 0.0025), (model.vit.blocks[0].attn.qkv, 0.01)):
        W = layer.parametrizations.weight.original
        assert W.std().item() == pytest.approx(std, rel=0.01)
        torch.testing.assert_close(layer.weight, W, rtol=1e-4, atol=1e-7)  # gamma = sigma
    assert model.vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("settings", [{}, {"attention": "l2", "norm": "none", "reparam": "sigma"}])
def test_learns_a_batch_by_heart(settings):
    torch.manual_seed(0)
    model = StableViTForImageClassification(StableViTConfig(**TINY, **settings))
    labels, optimizer = torch.tensor([0, 1, 2, 3]), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        outputs = model(IMAGES, labels=labels)
        expected = torch.nn.functional.cross_entropy(outputs.logits, labels)
        torch.testing.assert_close(outputs.loss, expected)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert outputs.loss < 0.1


def test_another_head_on_a_trained_body(tmp_path):
    torch.manual_seed(0)
    old = SigmaViTForImageClassification(SigmaViTConfig(**TINY))
    old.classifier.parametrizations.weight[0].gamma.data.fill_(7.0)
    old.save_pretrained(tmp_path)
    new = SigmaViTForImageClassification.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    torch.testing.assert_close(new.vit(IMAGES).last_hidden_state, old.eval().vit(IMAGES).last_hidden_state)
    chain = new.classifier.parametrizations.weight  # gamma, u and v are the new head's
    torch.testing.assert_close(chain[0].gamma[0], torch.linalg.matrix_norm(chain.original, 2), rtol=1e-3, atol=0)


def test_wrong_input():
    model = StableViTModel(StableViTConfig(**TINY))
    for shape in ((1, 3, 32, 32), (1, 1, 16, 16)):
        with pytest.raises(ValueError, match=r"num_channels and image_size allow \(batch, 3, 16, 16\)"):
            model(torch.zeros(shape))
    for settings, error in (
        ({"num_attention_heads": 5}, "num_attention_heads = 5: allowed are divisors of hidden_size = 32"),
        ({"patch_size": 17}, "patch_size = 17: allowed are sizes up to image_size = 16"),
        ({"patch_initializer_range": -1.0}, "patch_initializer_range = -1.0: allowed are positive numbers"),
        ({"norm": "batch"}, "norm = 'batch': allowed are"),
    ):
        with pytest.raises(ValueError, match=error):
            StableViTConfig(**{**TINY, **settings})
