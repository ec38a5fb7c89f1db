"""`stable_monitor.verify` on fairseq's models, whose attention is handed weights instead of calling the projections."""

import math

import pytest
import torch
import torch.nn.functional as F

from stable_monitor import verify

from .test_transformer import build, sentence, stock

SMALL = {"encoder_layers": 1, "decoder_layers": 1}
ATTENTIONS = {"encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn"}


def look(model, **settings):
    return verify(model.train(), lambda: model(**sentence()), **settings)


def test_every_layer_and_attention_of_ours_acts():
    model = build("sigma_transformer_18l", **SMALL)
    report = look(model)
    assert report.ok, report
    layers = [name for name, module in model.named_modules() if "Parametrized" in type(module).__name__]
    assert len(layers) == 16 and {row.name for row in report.rows} == {*layers, *ATTENTIONS}


@pytest.mark.parametrize("attention", ["qknorm", "stable"])
def test_the_bounds_of_norms_are_the_papers(attention):
    model = build("preln_transformer_18l", attention=attention, **SMALL)
    bound = math.sqrt(model.encoder.layers[0].self_attn.head_dim) if attention == "qknorm" else 1.618 * math.log2(1024)
    report = look(model)
    assert report.ok and {row.name: row.promised for row in report.rows} == dict.fromkeys(ATTENTIONS, f"<= {bound:.4g}")


def test_nothing_bounds_fairseqs_own():
    report = look(stock())
    assert not report.ok and {row.verdict for row in report.rows} == {"nothing bounds it"} and len(report.rows) == 6


def test_attention_that_reads_a_weight_beside_w_hat_is_named(monkeypatch):
    """As a fused kernel does that was given the learned weights."""
    model = build("sigma_transformer_18l", **SMALL)
    attention, stocks = model.encoder.layers[0].self_attn, F.multi_head_attention_forward
    raw, W_hat = attention.q_proj.parametrizations.weight.original, []

    def fused(*args, **kwargs):
        if kwargs["q_proj_weight"] is W_hat[-1]:
            kwargs["q_proj_weight"] = raw
        return stocks(*args, **kwargs)

    attention.q_proj.parametrizations.weight.register_forward_hook(lambda chain, args, W: W_hat.append(W))
    monkeypatch.setattr(F, "multi_head_attention_forward", fused)
    faults = {row.name: row.verdict for row in look(model).faults}
    assert "bypassed: the output changes with the size of W" in faults["encoder.layers.0.self_attn.q_proj"]
    assert faults.keys() <= {"encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn"}
    with torch.no_grad():
        raw.mul_(100)
    assert "encoder.layers.0.self_attn" in {row.name for row in look(model).faults}
