"""The registry's methods in all three models, methods of a user's own, and checkpoints that say it in yesterday's words."""

import copy
import io
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from fairseq import checkpoint_utils
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.sequence_generator import EnsembleModel

from fairseq_sigma.attention import QueryKeyAttention
from stable_core import StableNorm, fold, registry
from stable_core.attentions import stable_tau
from tests.combinations import combined, label

from . import test_language_model, test_speech, test_transformer


def classify(run):
    """A loss for a model: the cross-entropy of its outputs and made-up classes."""

    def loss(model) -> torch.Tensor:
        logits = run(model).flatten(0, 1)
        return F.cross_entropy(logits, torch.arange(len(logits)) % 8)

    return loss


def translation(settings: dict):
    """A model, what it computes, and its loss."""
    model = test_transformer.build("preln_transformer_6l", encoder_layers=1, decoder_layers=2, **settings)

    def run(model):
        return model(**test_transformer.sentence())[0]

    return model, run, classify(run)


def language(settings: dict):
    model, batch = test_language_model.build(test_language_model.PRE_LN, **settings), test_language_model.sample()
    criterion = AdaptiveLoss(test_language_model.TASK, sentence_avg=False)
    return (
        model,
        lambda model: test_language_model.log_probs(model, batch),
        lambda model: criterion(model, batch)[0],
    )


def speech(settings: dict):
    still = {"dropout": 0.0, "layer_drop": 0.0, "cape_global_shift": 0.0, "cape_local_shift": 0.0, "cape_scale": 1.0}
    model = test_speech.build(**still, **settings)
    features = torch.randn(2, 30, 40, generator=torch.Generator().manual_seed(0))
    features[1, 21:] = 0

    def run(model):
        return model(features, torch.tensor([30, 21]))["encoder_out"]

    return model, run, classify(run)


@pytest.mark.parametrize("settings", combined(), ids=label)
@pytest.mark.parametrize("make", [translation, language, speech])
def test_it_builds_trains_saves_loads_and_folds(make, settings):
    model, run, loss_of = make(settings)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-3), []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(loss_of(model))
        losses[-1].backward()
        optimizer.step()
    assert loss_of(model) < losses[0]
    stayed = {name for name, p in model.named_parameters() if name in parameters and torch.equal(p, parameters[name])}
    assert not stayed  # DistributedDataParallel waits for the gradient of each
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = make(settings)[0].eval()
    loaded.load_state_dict(torch.load(file))
    with torch.no_grad():
        expected = run(model.eval())
        assert torch.equal(run(loaded), expected)
        if settings["reparam"] != "none":
            torch.testing.assert_close(run(fold(loaded)), expected, rtol=1e-4, atol=1e-4)
            assert not any("parametrizations" in key for key in loaded.state_dict())


@pytest.mark.parametrize("residual", ["pre-ln", "post-ln"])
def test_a_stable_layer_follows_its_equations(residual):
    """x + f(SN(x)), or SN(x + f(x)), with SN(x) = d^alpha x / |x| [ST, eq. 2]; the attention has tests of its own."""
    settings = {"norm": "stable", "alpha": 0.3, "attention": "stable", "residual": residual}
    model, *_ = translation(settings)
    layer, x = model.encoder.layers[0], torch.randn(5, 2, 16)

    def norm(x):
        return 16**0.3 * x / (x.square().sum(-1, keepdim=True) + 1e-5).sqrt()

    expected = x
    for f in (lambda x: layer.self_attn(x, x, x)[0], lambda x: layer.fc2(layer.fc1(x).relu())):
        expected = expected + f(norm(expected)) if residual == "pre-ln" else norm(expected + f(expected))
    torch.testing.assert_close(layer(x, None), expected)
    for side in (model.encoder, model.decoder):
        assert side.layer_norm is None if residual == "post-ln" else isinstance(side.layer_norm, StableNorm)


def test_tau_is_that_of_the_longest_input():
    """tau = scale d1^(2 alpha - 1/2), in the norm of q: of the source, of the target, of a block of text, of 10 s of speech."""

    def taus(model) -> list[float]:
        found = [m.q_norm for m in model.modules() if isinstance(m, QueryKeyAttention)]
        return [norm.scale * norm.dim ** (2 * norm.alpha - 0.5) for norm in found]

    translating, *_ = translation({"attention": "stable", "max_source_positions": 64, "max_target_positions": 32})
    text, *_ = language({"attention": "stable", "tokens_per_sample": 8, "tau_scale": 2.0})
    heard, *_ = speech({"attention": "stable", "tau_seconds": 9.6})
    assert taus(translating) == pytest.approx([1.618 * x for x in (6, 5, 6, 5, 6)])  # encoder, then two of each
    assert taus(text) == pytest.approx([2 * 1.618 * 3] * 2)
    assert taus(heard) == pytest.approx([stable_tau(320)] * 2)  # a token for 30 ms


STABLE = ("--norm", "stable", "--attention", "stable", "--init", "stable", "--residual", "deepnorm", "--lr", 0.02)


def test_beam_search_finds_what_it_finds_without_a_cache(train, generate, monkeypatch):
    train("stable", "sigma_transformer_6l", 15, *STABLE)
    cached = generate("stable")
    monkeypatch.setattr(EnsembleModel, "has_incremental_states", lambda self: False)
    assert generate("stable") == cached
    assert len(cached) == 43 and len(set(cached)) > 5


@torch.no_grad()
def outputs(folder) -> torch.Tensor:
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(folder / "checkpoint_last.pt")])
    return model.eval()(**test_transformer.sentence())[0]


def test_a_checkpoint_of_yesterday_generates(train, generate, tmp_path):
    """--residual none said that there is no norm; nothing spoke of attention or of initialisation."""
    checkpoint = train("today", "sigma_transformer_6l", 2, "--norm", "none", "--residual", "pre-ln")
    expected = outputs(tmp_path / "today")
    args = checkpoint["cfg"]["model"]
    for name in ("norm", "alpha", "attention", "tau_scale", "init", "methods"):
        delattr(args, name)
    args.residual = "none"
    path = tmp_path / "yesterday" / "checkpoint_last.pt"
    path.parent.mkdir()
    torch.save(checkpoint, path)
    assert torch.equal(outputs(path.parent), expected) and len(generate("yesterday", "--beam", 1)) == 43
    args.residual = "post-ln"  # which had its LayerNorms, also of an arch that has none by default
    del args.arch, args.encoder_normalize_before, args.decoder_normalize_before
    test_language_model.ARCH_CONFIG_REGISTRY[test_language_model.SIGMA](args)
    assert (args.norm, args.residual) == ("layernorm", "post-ln")


MINE = """
    import torch
    from torch import nn
    from torch.nn.utils.parametrizations import weight_norm
    from stable_core.attentions import QueryKey
    from stable_core.registry import *
    from stable_core.residuals import Residual

    class Bounded(nn.Module):
        def forward(self, x):
            return x / (1 + x.norm(dim=-1, keepdim=True))

    register_norm("bounded")(lambda dim, options, **made: Bounded())
    register_attention("moved")(lambda dim, options, **made: QueryKey(Bounded(), nn.Identity(), lambda q, k: (q, k + 1)))
    register_residual("twice")(lambda encoder, decoder: (Residual(False, 2.0, 0.5), Residual(False, 3.0)))
    register_init("small")(lambda weight: nn.init.normal_(weight, std=0.05))

    @register_reparam("rows")
    def rows(model, options, filter_fn):
        for module in list(model.modules()):
            if isinstance(module, nn.Linear):
                weight_norm(module)
"""
CHOSEN = {"norm": "bounded", "attention": "moved", "residual": "twice", "init": "small", "reparam": "rows"}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """methods_of_mine.py in the current directory; mine() forgets that it was imported, as a new process does."""
    (tmp_path / "methods_of_mine.py").write_text(textwrap.dedent(MINE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = copy.deepcopy(registry._METHODS)

    def forget() -> None:
        sys.modules.pop("methods_of_mine", None)
        for slot, methods in before.items():
            registry._METHODS[slot].clear()
            registry._METHODS[slot].update(methods)

    yield forget
    forget()


def test_methods_of_a_users_own_train_and_generate_by_name(train, generate, mine, tmp_path):
    flags = [word for slot, name in CHOSEN.items() for word in (f"--{slot}", name)]
    train("mine", "preln_transformer_6l", 2, "--methods", "methods_of_mine", *flags)
    mine()
    assert len(generate("mine", "--beam", 1)) == 43
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "mine" / "checkpoint_last.pt")])
    layer, x = model.eval().encoder.layers[0], torch.randn(5, 2, 16)

    def norm(x):
        return x / (1 + x.norm(dim=-1, keepdim=True))

    heads = [
        p(x).unflatten(-1, (2, 8)) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    ]
    weights = torch.einsum("ibhd,jbhd->bhij", norm(heads[0]), heads[1] + 1).div(8**0.5).softmax(-1)
    attended = layer.self_attn.out_proj(torch.einsum("bhij,jbhd->ibhd", weights, heads[2]).flatten(2))
    y = norm(2 * x + attended)
    torch.testing.assert_close(layer(x, None), norm(2 * y + layer.fc2(layer.fc1(y).relu())))
    assert model.decoder.layers[0].alpha == 3 and "parametrizations" in " ".join(model.state_dict())


@pytest.mark.parametrize("make", [language, speech])
def test_they_are_there_for_language_models_and_speech(make, mine):
    model, run, _ = make({"methods": "methods_of_mine", **CHOSEN})
    assert run(model).isfinite().all()
    assert {type(module).__name__ for module in model.modules()} >= {"Bounded", "QueryKeyAttention", "_WeightNorm"}
