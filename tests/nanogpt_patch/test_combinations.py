"""Every two methods that go together, in nanoGPT's GPT: it trains, is saved, loads, and folds; and methods of a user's own."""

import io

import pytest
import torch
import torch.nn.functional as F

from nanogpt_patch.model import GPT, GPTConfig
from stable_core import deepnorm_scales, fold
from tests.combinations import combined, label

SMALL = {"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 16}
TEXT = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))
STOCK = {"norm": "layernorm", "attention": "dot", "init": "stock"}


def build(**settings):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL, **settings))


def three_updates(model):
    """The losses before each, and after the last."""
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    losses = []
    for _ in range(3):
        losses.append(model(TEXT[:, :-1], TEXT[:, 1:])[1])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return [*losses, model(TEXT[:, :-1], TEXT[:, 1:])[1]]


@pytest.mark.parametrize("settings", combined(), ids=label)
def test_it_trains_is_saved_and_folds(settings):
    model = build(**settings)
    losses = three_updates(model)
    assert losses[3] < losses[0]
    torch.save(model.state_dict(), file := io.BytesIO())
    file.seek(0)
    again = build(**settings)
    again.load_state_dict(torch.load(file))
    expected = model.eval()(TEXT[:, :-1])[0]
    assert torch.equal(again.eval()(TEXT[:, :-1])[0], expected)
    if settings["reparam"] != "none":
        torch.testing.assert_close(fold(again)(TEXT[:, :-1])[0], expected, rtol=1e-4, atol=1e-5)


def test_deepnorm_by_hand():
    """LayerNorm(alpha x + f(x)), no norm after the last block, and all but the weights of q and k drawn smaller by beta."""
    model, plain = build(**STOCK, residual="deepnorm", bias=False), build(**STOCK, bias=False)
    alpha, beta = deepnorm_scales(0, 2).decoder
    for name, W in model.transformer.h.named_parameters():
        expected = plain.transformer.h.get_parameter(name).clone()
        if name.endswith("c_attn.weight"):
            expected[32:] *= beta
        elif "ln_" not in name:
            expected *= beta
        torch.testing.assert_close(W, expected)
    x = model.transformer.wte(TEXT[:, :8]) + model.transformer.wpe(torch.arange(8))
    for block in model.transformer.h:
        x = F.layer_norm(alpha * x + block.attn(x), (16,))
        x = F.layer_norm(alpha * x + block.mlp(x), (16,))
    torch.testing.assert_close(model(TEXT[:, :8])[0], model.lm_head(x[:, [-1]]))


def test_methods_of_a_users_own(my_methods):
    model = build(norm="tanh", attention="shifted", init="stock")
    assert isinstance(model.transformer.ln_f, my_methods.Tanh)
    losses = three_updates(model)
    assert losses[3] < losses[0]
    with pytest.raises(ValueError, match=r"norm = 'tan': allowed are .*, 'tanh'"):
        GPTConfig(norm="tan")
