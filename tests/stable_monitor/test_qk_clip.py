"""QK-clip of models in training: which logits count, on which processes, and that a run's logits stay where they should."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from nanogpt_patch.model import GPT, STOCK, GPTConfig
from stable_core import SigmaReparamConfig, sigma_reparam
from stable_core.layers import find_projections
from stable_core.qk_clip import clip_heads
from stable_core.reference import attention_logits
from stable_monitor import Monitor, QKClip
from tests.stable_core.models import fused
from tests.stable_monitor.models import batch, gpt, train

THRESHOLD = 0.02  # which models that are not trained exceed
TOKENS = torch.arange(24).view(2, 12) % 20


def nanogpt():
    return GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=2, n_head=4, n_embd=32, **STOCK)), (TOKENS,)


def gpt2(attention: str = "sdpa"):
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, attn_pdrop=0.0,
        embd_pdrop=0.0, resid_pdrop=0.0, attn_implementation=attention,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), (TOKENS,)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), (TOKENS,)


def vit():
    settings = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", **settings), (torch.randn(2, 3, 32, 32),)


class Decoder(nn.Module):
    """torch's own attention, of itself and of another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True)

    def forward(self, x, memory):
        return self.layer(x, memory)


def torchs_own():
    return Decoder(), (torch.randn(2, 5, 32), torch.randn(2, 9, 32))


def dense_maxima(model, args, monkeypatch) -> list[torch.Tensor]:
    """The largest logit of each head, from the whole logits, in the order in which attention is called."""
    found, plain = [], F.scaled_dot_product_attention

    def seen(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
        s = q.shape[-1] ** -0.5 if scale is None else scale
        found.append(attention_logits(q, k, scale=s, attn_mask=attn_mask, is_causal=is_causal).amax((0, 2, 3)).float())
        return plain(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", seen)
        model(*args)
    return found


def attentions(model) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if find_projections(module)}


@pytest.mark.parametrize("build", [nanogpt, gpt2, llama, vit, torchs_own], ids=lambda f: f.__name__)
def test_weights_are_clipped_by_the_largest_of_all_logits(build, monkeypatch):
    torch.manual_seed(0)
    model, args = build()
    model.train()
    twin, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    maxima = dense_maxima(twin, args, monkeypatch)
    clip = QKClip(model, THRESHOLD)
    model(*args)
    clipped = clip.step()
    assert list(clipped) == list(attentions(model)) and len(maxima) == len(clipped)
    for S, (name, attention) in zip(maxima, attentions(twin).items(), strict=True):
        for found, s in zip(clipped[name], S.tolist(), strict=True):
            assert found == pytest.approx(s, rel=1e-5) if s > THRESHOLD else found <= THRESHOLD
        clip_heads(attention, S, THRESHOLD, 0.5)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed and not any(
        mark in key for key in changed for mark in ("mlp", "lm_head", "out_proj", "c_proj", "wte")
    )
    clip.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_attention_written_out_is_clipped_as_the_fused_one():
    states = []
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        model, args = gpt2(attention)
        clip = QKClip(model.train(), THRESHOLD, alpha=0.2)
        model(*args)
        clip.step()
        states.append(model.state_dict())
    torch.testing.assert_close(*states)


def without_dropout(model):
    for block in model.h:
        block.attn.dropout = block.mlp[-1].p = 0.0
    return model


def clipped_after(*passes) -> dict[str, float]:
    """The largest logit of what is clipped after forward passes of (batch, training)."""
    model = without_dropout(gpt())
    clip = QKClip(model, THRESHOLD)
    for tokens, training in passes:
        model.train(training)
        model(*tokens)
    return {name: max(S) for name, S in clip.step().items()}


def test_accumulated_batches_count_together_and_evaluation_does_not():
    each = [clipped_after((batch(step), True)) for step in (0, 1)]
    assert each[0] != each[1]
    both = clipped_after((batch(0), True), (batch(5), False), (batch(1), True), (batch(5), False))
    assert both == {name: max(S[name] for S in each) for name in each[0]}
    assert clipped_after((batch(0), True)) == each[0]


def test_checkpointing_changes_nothing():
    def weights(**settings):
        model = gpt(**settings)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        QKClip(model, THRESHOLD, optimizer=optimizer)
        train(model, 2, optimizer=optimizer)
        return model.state_dict()

    torch.testing.assert_close(weights(), weights(checkpoint=True))


def test_every_nth_update_alone_is_watched():
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    clip, changed = QKClip(model, THRESHOLD, every=3, optimizer=optimizer), []
    for step in range(7):
        with torch.no_grad():
            model.h[0].attn.c_attn.weight.mul_(2)  # above the threshold again
        before, hooks = copy.deepcopy(model.state_dict()), bool(model._forward_pre_hooks)
        train(model, 1, optimizer=optimizer, first=step)
        changed.append(not torch.equal(model.h[0].attn.c_attn.weight, before["h.0.attn.c_attn.weight"]))
        assert hooks == changed[-1]
    assert changed == [False, False, True, False, False, True, False] and clip.updates == 7


def test_below_the_threshold_a_run_is_bitwise_what_it_was_without():
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    QKClip(model, 1e3, optimizer=optimizer)
    assert train(model, 4, optimizer=optimizer) == train(gpt(), 4)


def test_the_monitor_and_qk_clip_see_the_same():
    model, records = gpt(), []
    monitor, clip = Monitor(model, 1, writers=[records.append]), QKClip(model, THRESHOLD)
    model(*batch(0))[1].backward()
    monitor.step()
    clipped = {name: max(S) for name, S in clip.step().items()}
    assert clipped == pytest.approx({name: max(x["max_logit"]) for name, x in records[0]["layers"].items()}, rel=1e-5)


def test_a_compiled_model_is_clipped_by_every_batch():
    def weights(compiled: bool):
        model = gpt()
        called = torch.compile(model, backend="eager") if compiled else model
        clip = QKClip(called, THRESHOLD)
        torch.manual_seed(3)
        for step in (0, 1):
            called(*batch(step))
        clip.step()
        return model.state_dict()

    torch.testing.assert_close(weights(True), weights(False))


def test_the_queries_of_padding_do_not_count():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 6, 16)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[:, 4:] = True
    expected = []
    for far in (1, 1000):
        clip = QKClip(model, THRESHOLD, filter_fn=lambda module, name: name == "")
        model(*(torch.where(padding[..., None], far * x, x),) * 3, key_padding_mask=padding, need_weights=False)
        expected.append(clip._largest[""].tolist())
    assert expected[0] == expected[1]


# ---------------------------------------------------------------------------- a run


def diverging(clip: float | None, sigma: bool = False) -> tuple[list[float], list[float]]:
    """The largest logits, and the losses, of a run whose rate is far too large for it; Muon steps what has two dimensions."""
    torch.manual_seed(0)
    model, _ = nanogpt()
    if sigma:
        sigma_reparam(model, SigmaReparamConfig(gamma_init="one"))
    flat = [p for p in model.parameters() if p.ndim < 2 or p is model.transformer.wte.weight]
    square = [p for p in model.parameters() if not any(p is other for other in flat)]
    optimizers = [torch.optim.Muon(square, lr=0.3), torch.optim.AdamW(flat, lr=1e-2)]
    if clip is not None:
        QKClip(model, clip, optimizer=optimizers)
    records, losses = [], []
    monitor = Monitor(model, 1, writers=[records.append])
    for step in range(20):
        tokens = torch.randint(20, (4, 17), generator=torch.Generator().manual_seed(step)) % 7
        loss = model(tokens[:, :-1], tokens[:, 1:].contiguous())[1]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        monitor.step(loss)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(loss.item())
    return [max(max(x["max_logit"]) for x in record["layers"].values()) for record in records], losses


@pytest.mark.parametrize("threshold, sigma", [(10.0, False), (0.5, True)])
def test_logits_that_would_grow_are_held_near_the_threshold(threshold, sigma):
    free, _ = diverging(None, sigma)
    held, losses = diverging(threshold, sigma)
    assert max(free) > 2 * threshold and losses[-1] < losses[0]
    assert max(held[2:]) < 1.5 * threshold  # it grows for one update before it is clipped


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"threshold": 0.0}, "threshold = 0.0: allowed are positive numbers"),
        ({"threshold": math.inf}, "threshold = inf"),
        ({"threshold": "100"}, "threshold = '100'"),
        ({"alpha": 1.5}, "alpha = 1.5: allowed are numbers from 0 to 1"),
        ({"every": 0}, "every = 0: allowed are whole numbers from 1"),
        ({"optimizer": "adam"}, "optimizer = 'adam'"),
        ({"filter_fn": "attn"}, "filter_fn = 'attn'"),
    ],
)
def test_settings_that_are_not_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        QKClip(gpt(), **settings)
    with pytest.raises(ValueError, match="model = 'gpt'"):
        QKClip("gpt")


def test_an_optimizer_that_steps_other_weights():
    model = gpt()
    with pytest.raises(ValueError, match=r"does not step h\.0\.attn's queries and keys"):
        QKClip(model, optimizer=torch.optim.SGD(gpt().parameters(), 0.1))
    for block in model.h:
        block.attn.requires_grad_(False)  # nothing to clip
    QKClip(model, optimizer=torch.optim.SGD(model.lm_head.parameters(), 0.1)).close()


def qwen3():
    config = transformers.Qwen3Config(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config)


def test_qk_norm_is_refused_by_name_and_can_be_left_out(caplog):
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn: QK-norm \(q_norm, k_norm\)"):
        QKClip(qwen3())
    model = qwen3().train()
    clip = QKClip(model, THRESHOLD, filter_fn=lambda module, name: "self_attn" not in name)
    model(TOKENS)
    assert clip.step() == {} and not caplog.records


@pytest.mark.parametrize("kind", ["l2", "l2_tied"])
def test_l2_attention_is_refused_when_it_is_seen(kind):
    model = GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=1, n_head=4, n_embd=32, **{**STOCK, "attention": kind}))
    QKClip(model)
    with pytest.raises(ValueError, match=r"^transformer\.h\.0\.attn: attention with 4 heads of 9 features"):
        model(TOKENS)


class Strange(nn.Module):
    """Attention under names that nobody knows; or of cosines, which no name tells."""

    def __init__(self, names: str = "abc") -> None:
        super().__init__()
        self.names, self.num_heads = names.split() if " " in names else list(names), 2
        for name in self.names:
            self.add_module(name, nn.Linear(16, 16))

    def forward(self, x):
        q, k, v = (getattr(self, name)(x).unflatten(-1, (2, 8)).transpose(1, 2) for name in self.names)
        return F.scaled_dot_product_attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, scale=40.0)


def t5(attention: str):
    config = transformers.T5Config(
        vocab_size=20,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        attn_implementation=attention,
    )
    model = fused(transformers.T5EncoderModel)(config).train()
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    nn.init.normal_(bias.weight, 500.0, 50.0)
    return model


def test_biases_of_position_do_not_count_or_are_refused(monkeypatch):
    torch.manual_seed(0)
    model, called, plain = t5("sdpa"), [], F.scaled_dot_product_attention
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: called.append((*a[:2], k)) or plain(*a, **k))
        model(TOKENS)
    q, k, settings = called[0]
    clip = QKClip(model, THRESHOLD)
    model(TOKENS)
    (S,) = clip.step().values()
    expected = attention_logits(q, k, scale=settings["scale"]).amax((0, 2, 3))
    assert settings["attn_mask"].max() > 300 > 30 > max(S)
    assert [s for s in S if s > THRESHOLD] == pytest.approx(expected[expected > THRESHOLD].tolist(), rel=1e-5)
    eager = t5("eager")
    QKClip(eager, THRESHOLD)
    with pytest.raises(
        ValueError, match=r"SelfAttention: it adds a bias \(relative_attention_bias.*implementation='sdpa'"
    ):
        eager(TOKENS)


def test_attention_that_is_not_known_is_refused_when_it_is_seen():
    model = Strange()
    QKClip(model)
    with pytest.raises(ValueError, match="no known names"):
        model(torch.randn(1, 4, 16))


def test_clipping_in_vain_is_said_once(caplog):
    model = Strange("q_proj k_proj v_proj")
    clip = QKClip(model, 10.0)
    for _ in range(8):
        model(torch.randn(1, 4, 16))
        clip.step()
    assert caplog.text.count("does not fall though it is clipped") == 1


def test_a_model_without_attention_is_said_once(caplog):
    model = nn.Linear(4, 4)
    clip = QKClip(model)
    for _ in range(2):
        model(torch.randn(1, 4))
        clip.step()
    assert caplog.text.count("no attention was seen") == 1
