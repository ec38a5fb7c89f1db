"""The model that stands in for nanoGPT's: against transformers' GPT-2, StableGPT, and upstream's where NANOGPT_DIR is set."""

import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch
import transformers

from hf_stable.convert_nanogpt import from_nanogpt
from nanogpt_patch import launch
from nanogpt_patch.launch import CONFIGS, _assigned
from nanogpt_patch.model import GPT, STOCK, GPTConfig
from stable_core import reference

TINY = {"block_size": 32, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 32}
TOKENS = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(0))
CHECKOUT = os.environ.get("NANOGPT_DIR")
needs_checkout = pytest.mark.skipif(CHECKOUT is None, reason="NANOGPT_DIR does not name a checkout of karpathy/nanoGPT")


def gpt(seed: int = 0, **settings) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**TINY, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that are not 1 and 0
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.rand_like(parameter))
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_stock_settings_are_gpt2(bias):
    ours = gpt(**STOCK, bias=bias)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=61, n_positions=32,
                                     activation_function="gelu", **special)  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    transposed = ("c_attn.weight", "attn.c_proj.weight", "c_fc.weight", "mlp.c_proj.weight")
    state = {k: x.T if k.endswith(transposed) else x for k, x in ours.state_dict().items()}
    assert bias == (state.keys() == theirs.state_dict().keys())
    theirs.load_state_dict({**{k: torch.zeros_like(x) for k, x in theirs.state_dict().items()}, **state})
    torch.testing.assert_close(ours(TOKENS, TOKENS)[0], theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha": 0.25, "tau_scale": 2.0, "norm": "layernorm", "bias": False},
        {"reparam": "sigma", "norm": "none", "attention": "dot"},
        {"reparam": "weight", "norm": "layernorm"},
        {"attention": "qknorm", "norm": "rmsnorm", "init": "xavier"},
        {"attention": "l2"},
        {"attention": "l2_tied", "reparam": "spectral"},
    ],
)
def test_settings_are_those_of_stable_gpt(settings):
    """Which is tested against the equations, in tests/hf_stable/test_stable_gpt.py."""
    ours = gpt(**settings)
    theirs = from_nanogpt({"model": ours.state_dict(), "model_args": vars(ours.config)})
    torch.testing.assert_close(ours(TOKENS, TOKENS)[0], theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(TOKENS)[0], ours(TOKENS, TOKENS)[0][:, -1:])


def test_initialisation():
    wide = {"n_embd": 256, "n_layer": 3, "vocab_size": 4000}
    for init, stds in {
        "stable": (1 / (math.sqrt(256) + math.sqrt(768)), 1 / (math.sqrt(1024) + math.sqrt(256))),
        "stock": (0.02, 0.02 / math.sqrt(6)),
        "xavier": (math.sqrt(2 / (256 + 768)), math.sqrt(2 / (1024 + 256))),
    }.items():
        model = GPT(GPTConfig(**{**TINY, **wide, "init": init}))
        block = model.transformer.h[1]
        for layer, std in zip((block.attn.c_attn, block.mlp.c_proj), stds, strict=True):
            assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
            assert not layer.bias.any()
        assert model.lm_head.weight is model.transformer.wte.weight
        assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("reparam", ["sigma", "weight"])
def test_a_narrow_reparametrised_gpt_starts_with_gpt_2s_spectral_norm(reparam):
    settings = {"n_embd": 192, "n_head": 3, "n_layer": 2, "init": "stock", "reparam": reparam}
    model = GPT(GPTConfig(**{**TINY, **settings}))
    law = 0.02 * (math.sqrt(768) + math.sqrt(3072))
    for layer, expected in ((model.transformer.h[0].mlp.c_fc, law), (model.transformer.h[0].mlp.c_proj, law / 2)):
        W = layer.weight if reparam == "weight" else layer.parametrizations.weight.original
        assert torch.linalg.matrix_norm(W, 2).item() == pytest.approx(expected, rel=0.05)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_loss_is_the_cross_entropy():
    model = gpt()
    targets = torch.roll(TOKENS, -1, 1)
    targets[:, -1] = -1
    logits, loss = model(TOKENS, targets)
    expected = -logits[:, :-1].log_softmax(-1).gather(-1, targets[:, :-1, None]).mean()
    torch.testing.assert_close(loss, expected)


def test_generate():
    model = gpt()
    ids = TOKENS[:, :4]
    greedy = ids
    for _ in range(40):  # past block_size, of which the model sees the last 32
        greedy = torch.cat([greedy, model(greedy[:, -32:])[0].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, 40, top_k=1), greedy)
    torch.manual_seed(0)
    drawn = model.generate(TOKENS[:1, :4].expand(4000, -1), 1, temperature=0.5, top_k=5)[:, -1]
    logits = model(TOKENS[:1, :4])[0][0, 0] / 0.5
    top = logits.topk(5)
    share = torch.stack([(drawn == token).float().mean() for token in top.indices])
    torch.testing.assert_close(share, top.values.softmax(-1), rtol=0, atol=0.03)
    assert set(drawn.tolist()) <= set(top.indices.tolist())


def test_crop_block_size_keeps_the_function():
    model = gpt()
    before = model(TOKENS)[0]
    model.crop_block_size(20)
    assert torch.equal(model(TOKENS)[0], before)
    rebuilt = GPT(model.config).eval()  # as a checkpoint's is
    rebuilt.load_state_dict(model.state_dict())
    torch.testing.assert_close(rebuilt(TOKENS)[0], before, rtol=1e-5, atol=1e-6)
    assert model.config.block_size == 20 and model.transformer.wpe.weight.shape == (20, 32)
    with pytest.raises(ValueError, match="a sequence of 21 tokens: block_size = 20 is the longest"):
        model(torch.zeros(1, 21, dtype=torch.long))
    with pytest.raises(ValueError, match="block_size = 64: allowed are sizes up to 20"):
        model.crop_block_size(64)


def test_optimizer_decays_matrices_alone():
    model = gpt(reparam="sigma", norm="layernorm")
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        matrix = name.endswith((".original", "wte.weight", "wpe.weight"))
        assert decay[id(parameter)] == (0.1 if matrix else 0.0), name
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_flops_of_gpt2():
    """nanoGPT prints 123.69M without positions, of 50,304 x 768, 12 x (12 x 768^2 + 13 x 768) and 2 x 768 parameters."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**STOCK, vocab_size=50304))
    assert model.get_num_params() == 123_689_472 and model.get_num_params(non_embedding=False) == 124_475_904
    flops = 6 * 123_689_472 + 12 * 12 * 768 * 1024
    assert model.estimate_mfu(2, 0.5) == pytest.approx(flops * 1024 * 2 / 0.5 / 312e12)


def test_z_loss_is_trained_on_and_not_evaluated():
    targets = TOKENS.clone()
    targets[0, 3:] = -1
    model = gpt(z_loss=0.1)
    logits, evaluated = model(TOKENS, targets)
    expected = reference.z_loss(logits[targets != -1], 0.1)
    torch.testing.assert_close(model.train()(TOKENS, targets)[1] - evaluated, expected)
    assert torch.equal(evaluated, gpt()(TOKENS, targets)[1])


def test_z_loss_with_openais_weights(monkeypatch):
    variables = {"z_loss": 1e-4}
    monkeypatch.setattr(GPT, "from_pretrained", classmethod(lambda cls, name: cls(GPTConfig(**TINY, **STOCK))))
    monkeypatch.setattr(launch, "_variables", lambda: variables)
    assert launch._MonitoredGPT.from_pretrained("gpt2").config.z_loss == 1e-4
    assert variables["model_args"] == {**STOCK, "z_loss": 1e-4}


def test_from_pretrained(monkeypatch):
    special = {"bos_token_id": 0, "eos_token_id": 0}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(activation_function="gelu", **special)).eval()
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", lambda name: theirs)
    ours = GPT.from_pretrained("gpt2", {"dropout": 0.1}).eval()
    ids = TOKENS[:1, :8]
    torch.testing.assert_close(ours(ids, ids)[0], theirs(ids).logits, rtol=1e-3, atol=1e-4)
    assert ours.config.dropout == 0.1
    with pytest.raises(ValueError, match="model_type = 'gpt3': allowed are 'gpt2', 'gpt2-medium'"):
        GPT.from_pretrained("gpt3")
    with pytest.raises(ValueError, match="allowed is dropout"):
        GPT.from_pretrained("gpt2", {"n_layer": 2})


@pytest.mark.parametrize(("size", "millions"), [("small", 124), ("medium", 350), ("large", 774), ("200", 1457)])
def test_configs_have_the_parameters_of_table_2(size, millions):
    for kind in ("stablegpt", "gpt2"):
        settings = {}
        for config in ("train_gpt", *([size] if size != "small" else []), *(["stock"] if kind == "gpt2" else [])):
            settings |= _assigned((CONFIGS / f"{config}.py").read_text())
        fields = {k: v for k, v in settings.items() if k in GPTConfig.__dataclass_fields__}
        with torch.device("meta"):
            model = GPT(GPTConfig(**fields, bias=False))
        assert model.get_num_params() / 1e6 == pytest.approx(millions, rel=0.015)
        assert settings["batch_size"] * settings["gradient_accumulation_steps"] == 480  # x 1,024 tokens
        rates = {"small": (6e-4, 6e-5), "medium": (3e-4, 3e-5), "large": (2.5e-4, 2.5e-5), "200": (2.5e-4, 2.5e-5)}
        assert (settings["learning_rate"], settings["min_lr"]) == rates[size]
        assert (settings["max_iters"], settings["warmup_iters"], settings["weight_decay"]) == (600_000, 2_000, 0.1)
        stock = {k: settings[k] for k in ("norm", "attention", "init")}
        assert stock == ({k: STOCK[k] for k in stock} if kind == "gpt2" else dict.fromkeys(stock, "stable"))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"norm": "batch"}, "norm = 'batch': allowed are 'layernorm', 'rmsnorm', 'stable', 'none'"),
        ({"alpha": 0.6}, "alpha = 0.6: allowed are numbers from 0 to 0.5"),
        ({"n_head": 5}, "n_head = 5: allowed are divisors of n_embd = 32"),
        ({"vocab_size": None}, "vocab_size = None: allowed are whole numbers from 1"),
        ({"tau_scale": 0.0}, "tau_scale = 0.0: allowed are positive numbers"),
        ({"z_loss": -1.0}, "z_loss = -1.0: allowed are finite numbers from 0, which is off"),
        ({"dropout": 1.0}, "dropout = 1.0: allowed are numbers from 0 to below 1"),
    ],
)
def test_wrong_settings(settings, error):
    with pytest.raises(ValueError) as raised:
        GPTConfig(**{**TINY, **settings})
    assert str(raised.value) == error


@needs_checkout
@pytest.mark.parametrize("bias", [True, False])
def test_stock_settings_are_upstreams_model_bitwise(bias):
    spec = importlib.util.spec_from_file_location("nanogpt_upstream", Path(CHECKOUT, "model.py"))
    upstream = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(upstream)
    torch.manual_seed(7)
    theirs = upstream.GPT(upstream.GPTConfig(**TINY, bias=bias, dropout=0.1))
    torch.manual_seed(7)
    ours = GPT(GPTConfig(**TINY, **STOCK, bias=bias, dropout=0.1))
    states = theirs.state_dict(), ours.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(3)  # the same dropout
        logits, loss = model(TOKENS, TOKENS)
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        outputs.append([logits, loss, *gradients, model.eval().generate(TOKENS, 20, top_k=5)])
        assert model.estimate_mfu(3, 0.1) == theirs.estimate_mfu(3, 0.1)
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
