"""The monitor's numbers against ones computed by hand, and that it changes nothing."""

import copy
import importlib.util
import math
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from stable_core import SigmaReparamConfig, sigma_layers, sigma_reparam
from stable_core.reference import attention_probabilities, entropy
from stable_core.sigma_reparam import SigmaReparam
from stable_monitor import Monitor
from stable_monitor.summary import gradient_norms
from tests.stable_monitor.models import batch, gpt, train


def monitored(model, every: int = 1, **settings):
    """The records of three updates."""
    records = []
    train(model, 3, lambda called, optimizer: Monitor(called, every, writers=[records.append], **settings))
    return records


@pytest.mark.parametrize("flash", [True, False])
def test_numbers_are_those_of_the_layer(flash):
    model = gpt(flash=flash)
    inputs = {}
    for name in ("h.0.attn", "h.1.attn"):
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    monitor = Monitor(model, 1)
    _, loss = model(*batch(0))
    loss.backward()
    record = monitor.step(loss, lr=0.25)
    monitor.close()

    assert (record["step"], record["lr"], record["loss"]) == (0, 0.25, pytest.approx(loss.item(), rel=1e-5))
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert record["grad_l2"] == pytest.approx(gradients.norm().item(), rel=1e-5)
    assert record["grad_linf"] == pytest.approx(gradients.abs().max().item(), rel=1e-5)
    assert list(record["layers"]) == ["h.0.attn", "h.1.attn"]
    for name, layer in record["layers"].items():
        attention = model.get_submodule(name)
        q, k, _ = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in attention.c_attn(inputs[name]).chunk(3, -1))
        expected = entropy(attention_probabilities(q, k, scale=8**-0.5, is_causal=True))
        logits = (q @ k.mT / 8**0.5).masked_fill(~torch.ones(16, 16, dtype=torch.bool).tril(), -torch.inf)
        assert layer["kind"] == "decoder"
        assert layer["entropy"] == pytest.approx(expected.mean((0, 2)).tolist(), abs=1e-5)
        assert layer["entropy_min"] == pytest.approx(
            expected[:, :, 1:].amin((0, 2)).tolist(), abs=1e-5
        )  # 0 has one key
        assert layer["max_logit"] == pytest.approx(logits.amax((0, 2, 3)).tolist(), rel=1e-4)
        assert math.log(layer["keys"]) == pytest.approx(sum(math.log(i) for i in range(1, 17)) / 16, rel=1e-4)
        assert all(low <= mean + 1e-5 for low, mean in zip(layer["bound"], layer["entropy"], strict=True))
        sigmas = torch.linalg.svdvals(attention.c_attn.weight.unflatten(0, (3, 32)))[:, 0].tolist()
        sigmas.append(torch.linalg.svdvals(attention.c_proj.weight)[0].item())
        assert list(layer["sigma"]) == ["q", "k", "v", "out"]
        assert list(layer["sigma"].values()) == pytest.approx(sigmas, rel=1e-3)
        gradients = torch.cat([p.grad.flatten() for p in attention.parameters()])
        assert layer["grad_l2"] == pytest.approx(gradients.norm().item(), rel=1e-5)
        assert layer["grad_linf"] == pytest.approx(gradients.abs().max().item(), rel=1e-5)


@pytest.mark.parametrize("reparam", [False, True])
def test_sigma_follows_the_effective_weights_as_they_train(reparam):
    model = gpt(seed=1, width=128)  # too large for an exact SVD
    attention = model.h[0].attn
    if reparam:
        sigma_reparam(model, filter_fn=lambda module, name: ".attn" in name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    expected = []

    def by_hand(*_):
        W_hat = attention.c_attn.weight.detach().unflatten(0, (3, 128))
        expected.append(torch.linalg.svdvals(W_hat)[:, 0].tolist())

    optimizer.register_step_pre_hook(by_hand)
    records = []
    train(model, 31, lambda called, _: Monitor(called, 10, writers=[records.append]), optimizer)
    for record in records:
        sigma = record["layers"]["h.0.attn"]["sigma"]
        assert [sigma[role] for role in "qkv"] == pytest.approx(expected[record["step"]], rel=1e-3)
    assert records[0]["layers"]["h.0.attn"]["sigma"] != records[-1]["layers"]["h.0.attn"]["sigma"]


class Separate(nn.Module):
    """Attention with a layer for each projection, in no order of theirs."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.num_heads = 4
        self.out_proj, self.v_proj, self.q_proj, self.k_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def stale(matrices: list, gammas: list, blocks: list[list[int]]):
    """True norms of W_hat, and 1 - estimate / sigma of each block of weights that share a sigma, from singular values."""
    sigmas, lags = [torch.linalg.svdvals(W)[0].item() for W in matrices], {}
    for gamma, block in zip(gammas, blocks, strict=True):
        whole = torch.linalg.svdvals(torch.cat([matrices[i] for i in block]))[0].item()
        lags |= dict.fromkeys(block, 1 - gamma / whole)
    return sigmas, [lags[i] for i in range(len(matrices))]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("qkv", "blocks"),
    [("separate", [[0], [1], [2]]), ("joint", [[0, 1, 2]]), ("qk_joint", [[0, 1], [2]])],
)
def test_sigma_and_its_lag_where_the_running_estimate_is_behind(packed, qkv, blocks):
    """As it is at high rates: u is half way to other weights, and nobody knows what sigma should be."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(64, 4, batch_first=True) if packed else Separate()
    sigma_reparam(model, SigmaReparamConfig(gamma_init="one", qkv=qkv))
    with torch.no_grad():
        for _, sigma in sigma_layers(model):
            for u in sigma.u.split(sigma.rows):
                u.add_(nn.functional.normalize(torch.randn_like(u), dim=0)).div_(u.norm())
            sigma.watch.forget()
    x = torch.randn(2, 5, 64)
    monitor = Monitor(model, 1)
    model(*[x, x, x] if packed else [x])
    layer = monitor.step()["layers"][""]
    if packed:
        weights = list(model.in_proj_weight.detach().chunk(3))
    else:
        weights = [getattr(model, f"{role}_proj").weight.detach() for role in "qkv"]
    sigmas, lags = stale(weights, [1.0] * len(blocks), blocks)  # gamma is 1
    assert [layer["sigma"][role] for role in "qkv"] == pytest.approx(sigmas, rel=1e-3)
    assert [layer["lag"][role] for role in "qkv"] == pytest.approx(lags, abs=2e-3)
    assert max(lags) > 0.1
    assert layer["lag"]["out"] == pytest.approx(1 - 1 / layer["sigma"]["out"], abs=2e-3)


def test_what_sigma_reparam_did_not_make_has_no_lag():
    model = gpt()
    nn.utils.parametrizations.weight_norm(model.h[0].attn.c_proj)
    assert {str(layer["lag"]) for layer in monitored(model)[0]["layers"].values()} == {"{}"}


def test_sigma_reparam_of_a_models_own_source_is_known():
    """As transformers loads it with trust_remote_code: other classes of the same code."""
    own = {}
    for name in ("layers", "targets", "sigma_reparam"):
        spec = importlib.util.find_spec(f"stable_core.{name}")
        own[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(own[name])
    model = own["sigma_reparam"].sigma_reparam(gpt())
    reparam = model.h[0].attn.c_proj.parametrizations.weight[0]
    assert type(reparam) is not SigmaReparam
    with torch.no_grad():
        reparam.gamma.fill_(2.5)
    layer = monitored(model)[0]["layers"]["h.0.attn"]
    assert layer["sigma"]["out"] == pytest.approx(2.5, rel=1e-3)
    assert list(layer["lag"]) == ["q", "k", "v", "out"]


HF = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
      "max_position_embeddings": 32}  # fmt: skip


def hf(kind: str, implementation: str):
    torch.manual_seed(0)
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**HF, attn_implementation=implementation))
    if kind == "llama":  # two query heads share a key head
        config = transformers.LlamaConfig(**HF, num_key_value_heads=2, attn_implementation=implementation)
        return transformers.LlamaForCausalLM(config)
    config = transformers.BartConfig(
        vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32,
        attn_implementation=implementation,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["bert", "llama", "bart"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_models_against_their_own_attention_weights(kind, implementation):
    tokens = torch.randint(5, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(tokens)
    seen[1, 8:] = 0  # padding on the right
    model = hf(kind, implementation).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    with torch.no_grad():  # weights of some size, for entropies that differ
        for p in model.parameters():
            p.mul_(6 if p.ndim > 1 else 1)
    monitor = Monitor(model, 1)
    out = model(input_ids=tokens, attention_mask=seen, labels=tokens)
    out.loss.backward()
    record = monitor.step()
    monitor.close()
    assert record["loss"] == pytest.approx(out.loss.item(), rel=1e-5)

    if kind == "bert":  # whose output projection is another module's
        out = torch.linalg.matrix_norm(model.bert.encoder.layer[1].attention.output.dense.weight, 2).item()
        assert record["layers"]["bert.encoder.layer.1.attention.self"]["sigma"]["out"] == pytest.approx(out, rel=1e-3)

    eager = hf(kind, "eager").eval()
    eager.load_state_dict(model.state_dict())
    weights = eager(input_ids=tokens, attention_mask=seen, labels=tokens, output_attentions=True)
    if kind == "bart":
        expected = {
            "model.encoder.layers.0.self_attn": ("encoder", weights.encoder_attentions[0], True),
            "model.decoder.layers.0.self_attn": ("decoder", weights.decoder_attentions[0], False),
            "model.decoder.layers.0.encoder_attn": ("cross", weights.cross_attentions[0], False),
        }
    else:
        name = {"bert": "bert.encoder.layer.{}.attention.self", "llama": "model.layers.{}.self_attn"}[kind]
        causal = "encoder" if kind == "bert" else "decoder"
        expected = {name.format(i): (causal, weights.attentions[i], True) for i in range(2)}
    assert {name: layer["kind"] for name, layer in record["layers"].items()} == {
        name: kind for name, (kind, _, _) in expected.items()
    }
    for name, (_, probabilities, padded) in expected.items():
        rows = entropy(probabilities.detach().double())
        real = (seen if padded else torch.ones_like(seen)).bool()[:, None].expand(rows.shape[:3])
        mean = [rows[:, head][real[:, head]].mean().item() for head in range(4)]
        choice = real & ((probabilities > 0).sum(-1) > 1)
        least = [rows[:, head][choice[:, head]].min().item() for head in range(4)]
        assert record["layers"][name]["entropy"] == pytest.approx(mean, abs=1e-4)
        assert record["layers"][name]["entropy_min"] == pytest.approx(least, abs=1e-4)


def test_timm_and_torch_models_are_named_by_their_own_modules():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    monitor = Monitor(vit, 1)
    vit(torch.randn(2, 3, 32, 32)).sum().backward()
    layers = monitor.step()["layers"]
    assert {name: (layer["kind"], layer["keys"]) for name, layer in layers.items()} == {
        "blocks.0.attn": ("encoder", 5.0), "blocks.1.attn": ("encoder", 5.0)
    }  # fmt: skip

    pair = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)
    monitor = Monitor(pair, 1)
    source = torch.randn(2, 7, 32)
    pair(source, source, tgt_mask=pair.generate_square_subsequent_mask(7)).sum().backward()
    layers = monitor.step()["layers"]
    assert {name: layer["kind"] for name, layer in layers.items()} == {
        "encoder.layers.0.self_attn": "encoder",
        "decoder.layers.0.self_attn": "decoder",
        "decoder.layers.0.multihead_attn": "cross",
    }
    sigma = torch.linalg.svdvals(pair.decoder.layers[0].multihead_attn.in_proj_weight.unflatten(0, (3, 32)))[0, 0]
    assert layers["decoder.layers.0.multihead_attn"]["sigma"]["q"] == pytest.approx(sigma.item(), rel=1e-3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("settings", [{}, {"flash": False}, {"checkpoint": True}])
def test_losses_are_bitwise_those_without_it(settings):
    without = gpt(**settings)
    losses = train(without, 6)
    model, records = gpt(**settings), []
    assert losses == train(model, 6, lambda called, _: Monitor(called, 2, writers=[records.append]))
    assert [record["step"] for record in records] == [0, 2, 4]
    assert all(torch.equal(a, b) for a, b in zip(without.parameters(), model.parameters(), strict=True))


def hooks(model) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_no_hook_is_left_between_records_and_after_an_error():
    model = gpt()
    monitor = Monitor(model, 3)
    model.eval()(*batch(0))
    model.train()
    assert hooks(model) == 1  # which waits for training
    with pytest.raises(IndexError):
        model(torch.full((1, 4), 99), torch.zeros(1, 4, dtype=torch.long))
    assert torch.overrides._get_current_function_mode_stack() == []
    _, loss = model(*batch(0))
    assert hooks(model) == 0  # seen already
    loss.backward()
    assert monitor.step(loss)["layers"]
    for _ in range(2):
        assert hooks(model) == 0
        assert monitor.step() is None
    assert hooks(model) == 1
    monitor.close()
    assert hooks(model) == 0
    assert monitor.step() is None and hooks(model) == 0


def test_a_model_copied_or_pickled_while_it_is_watched_is_free_of_the_monitor(tmp_path):
    model = gpt()
    monitor = Monitor(model, 1, path=tmp_path)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.train()(*batch(0))[0].isfinite().all()
    assert monitor._seen == {}
    model(*batch(0))
    assert len(monitor.step()["layers"]) == 2


def test_gradients_in_half_precision():
    layer = nn.Linear(64, 64, bias=False).half()
    layer.weight.grad = torch.full((64, 64), 2000.0).half()
    assert gradient_norms({"": layer})[""].tolist() == [128000.0, 2000.0]


def test_validation_and_further_micro_batches_are_not_looked_at():
    model = gpt()
    monitor = Monitor(model, 1)
    model.eval()
    model(*batch(7))
    model.train()
    _, loss = model(*batch(0))
    loss.backward()
    first = {name: numbers.clone() for name, (_, numbers, _) in monitor._seen.items()}
    _, loss = model(*batch(1))
    loss.backward()
    record = monitor.step(loss)
    for name, numbers in first.items():
        assert record["layers"][name]["entropy"] == pytest.approx(numbers[0].tolist(), rel=1e-5)
    alone = Monitor(model, 1)
    model(*batch(0))
    assert alone.step()["layers"]["h.0.attn"]["entropy"] == pytest.approx(
        record["layers"]["h.0.attn"]["entropy"], rel=1e-5
    )


def test_gradients_can_be_read_before_they_are_clipped():
    model = gpt()
    monitor = Monitor(model, 1)
    _, loss = model(*batch(0))
    (1024 * loss).backward()
    monitor.read_gradients(scale=1024)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3) / 1024
    assert monitor.step(loss)["grad_l2"] == pytest.approx(norm.item(), rel=1e-5)


def test_a_model_without_attention_is_said_to_have_none(caplog):
    monitor = Monitor(nn.Linear(3, 3), 1)
    record = monitor.step(1.0)
    assert record["layers"] == {} and "no attention was seen" in caplog.text


def test_gradients_that_are_cleared_too_early_are_missed_aloud(caplog):
    model = gpt()
    monitor = Monitor(model, 1)
    for update in range(2):
        _, loss = model(*batch(update))
        loss.backward()
        model.zero_grad()
        record = monitor.step(loss)
        assert record["grad_l2"] is None and record["nonfinite"] == [] and record["verdict"] == "healthy"
    assert caplog.text.count("no gradient was seen: call step after backward") == 1


def test_a_frozen_layer_has_no_norm_and_an_explicit_read_that_finds_none_is_no_warning(caplog):
    model = gpt()
    model.h[0].attn.requires_grad_(False)
    monitor = Monitor(model, 1)
    _, loss = model(*batch(0))
    loss.backward()
    record = monitor.step(loss)
    assert record["layers"]["h.0.attn"]["grad_l2"] is None and record["grad_l2"] > 0 and record["nonfinite"] == []
    model(*batch(1))
    model.zero_grad()
    monitor.read_gradients()
    assert monitor.step(loss)["grad_l2"] is None and "no gradient" not in caplog.text


def test_attention_that_cannot_be_measured_does_not_end_the_run(caplog, monkeypatch):
    def fail(call):
        raise RuntimeError("odd shape")

    losses = train(gpt(), 4)
    monkeypatch.setattr("stable_monitor.monitor.by_head", fail)
    assert train(gpt(), 4, lambda called, _: Monitor(called, 1)) == losses
    assert caplog.text.count("h.0.attn not recorded: RuntimeError: odd shape") == 1


def test_numbers_that_are_not_finite_are_null():
    model = gpt()
    monitor = Monitor(model, 1)
    with torch.no_grad():
        model.h[0].attn.c_attn.weight[0, 0] = torch.nan
    _, loss = model(*batch(0))
    loss.backward()
    record = monitor.step(loss)
    assert record["loss"] is None and record["layers"]["h.0.attn"]["entropy"][0] is None


@pytest.mark.parametrize(("name", "value"), [("every", 0), ("every", 2.5), ("step", -1)])
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=f"{name} = {value}: allowed are whole numbers from"):
        Monitor(gpt(), **{name: value})
