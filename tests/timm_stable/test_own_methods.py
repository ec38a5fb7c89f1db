"""Methods that a user registered, by name in timm's Vision Transformer."""

import timm
import torch

import timm_stable  # noqa: F401  registers the models
from tests.timm_stable.test_combinations import SMALL, three_updates


def test_they_train(my_methods):
    torch.manual_seed(0)
    model = timm.create_model("sigma_vit_small_patch16_224", **SMALL, norm="tanh", attention="shifted")
    assert isinstance(model.blocks[1].norm2, my_methods.Tanh)
    attn, x = model.blocks[0].attn, torch.randn(2, 5, 48)
    q, k, v = attn.qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    A = ((q + 1) @ (k - 1).mT / 4).softmax(-1)
    torch.testing.assert_close(attn(x), attn.proj((A @ v).transpose(1, 2).flatten(2)))
    losses = three_updates(model)
    assert losses[3] < losses[0]
