"""The temperature context against attention whose scale is changed by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from stable_monitor import Monitor, attention_temperature
from tests.stable_monitor.models import batch, gpt, train


def colder_by_weights(model, tau):
    """The same model with its queries divided by tau: the same logits / tau, with no change to attention."""
    colder = copy.deepcopy(model)
    with torch.no_grad():
        for block in colder.h:
            block.attn.c_attn.weight[:32] /= tau
            block.attn.c_attn.bias[:32] /= tau
    return colder


@pytest.mark.parametrize("settings", [{}, {"flash": False}, {"checkpoint": True}])
@pytest.mark.parametrize("tau", [0.1, 3.0])
def test_logits_are_divided_by_tau_forward_and_backward(settings, tau):
    model = gpt(**settings)
    expected = colder_by_weights(model, tau)
    with attention_temperature(model, tau):
        torch.manual_seed(0)
        _, loss = model(*batch(0))
        loss.backward()
    torch.manual_seed(0)
    _, loss_expected = expected(*batch(0))
    loss_expected.backward()
    torch.testing.assert_close(loss, loss_expected)
    scale = torch.ones(96, 1).index_fill(0, torch.arange(32), 1 / tau)  # of the queries' gradients
    for block, block_expected in zip(model.h, expected.h, strict=True):
        torch.testing.assert_close(
            block.attn.c_attn.weight.grad, block_expected.attn.c_attn.weight.grad * scale, rtol=1e-3, atol=1e-6
        )
    torch.testing.assert_close(model.wte.weight.grad, expected.wte.weight.grad, rtol=1e-3, atol=1e-6)


def test_it_can_change_within_the_context_and_ends_with_it():
    model = gpt().eval()
    plain = model(*batch(0))[0]
    with attention_temperature(model) as temperature:
        assert torch.equal(model(*batch(0))[0], plain)
        temperature.tau = 0.1
        assert (model(*batch(0))[0] - plain).abs().max() > 1e-3
        temperature.tau = 1.0
        assert torch.equal(model(*batch(0))[0], plain)
        temperature.tau = 0.1
    assert torch.equal(model(*batch(0))[0], plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("monitor_first", [True, False])
def test_the_monitor_sees_attention_at_its_temperature(monitor_first):
    def record(model, monitor):
        torch.manual_seed(0)
        model(*batch(0))
        return {name: layer["entropy"] for name, layer in monitor.step()["layers"].items()}

    model = gpt()
    colder = colder_by_weights(model, 0.1)
    expected = record(colder, Monitor(colder, 1))
    monitor = Monitor(model, 1) if monitor_first else None
    with attention_temperature(model, 0.1):
        got = record(model, monitor or Monitor(model, 1))
    for name in expected:
        assert got[name] == pytest.approx(expected[name], abs=1e-4)


def test_packed_attention_of_torch_with_masks():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    bias = torch.randn(5, 5)
    with attention_temperature(layer, 0.5):
        fused = layer(x, x, x, key_padding_mask=padding, attn_mask=bias, need_weights=False)[0]
        written_out, weights = layer(x, x, x, key_padding_mask=padding, attn_mask=bias, average_attn_weights=False)
    q, k, _ = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in F.linear(x, layer.in_proj_weight).chunk(3, -1))
    logits = (q @ k.mT / 8**0.5 + bias).masked_fill(padding[:, None, None], -torch.inf)
    torch.testing.assert_close(weights, (logits / 0.5).softmax(-1))
    torch.testing.assert_close(fused, written_out)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_with_padding_that_hides_whole_rows(implementation):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        attn_implementation=implementation,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    colder = copy.deepcopy(model)
    colder.model.layers[0].self_attn.q_proj.weight.data *= 10
    tokens, seen = torch.randint(60, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    seen[0, :3] = 0  # padding on the left: its queries see no key
    with attention_temperature(model, 0.1):
        logits = model(input_ids=tokens, attention_mask=seen).logits
    assert logits.isfinite().all()
    expected = colder(input_ids=tokens, attention_mask=seen).logits
    torch.testing.assert_close(logits[seen.bool()], expected[seen.bool()], rtol=1e-3, atol=1e-5)


def test_compiled_models():
    model = gpt().eval()
    with attention_temperature(model, 0.1):
        expected = model(*batch(0))[0]
    compiled = torch.compile(model, backend="aot_eager")
    plain = compiled(*batch(0))[0]
    with attention_temperature(compiled, 0.1):
        torch.testing.assert_close(compiled(*batch(0))[0], expected)
    torch.testing.assert_close(compiled(*batch(0))[0], plain)


def test_losses_part_at_the_intervention_and_not_before():
    model = gpt()
    losses = train(model, 6)
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with attention_temperature(model) as temperature:
        assert train(model, 3, optimizer=optimizer) == losses[:3]
        temperature.tau = 0.05
        assert train(model, 3, optimizer=optimizer, first=3)[0] != losses[3]


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperatures(tau):
    with pytest.raises(ValueError, match=f"tau = {tau}: allowed are positive numbers"):
        attention_temperature(gpt(), tau)
