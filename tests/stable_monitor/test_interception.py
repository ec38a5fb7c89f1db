"""Attention as other people write it: which kind it is, whose it is, and how its heads and masks lie."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from stable_core.power_iteration import top_singular_vectors
from stable_core.reference import attention_probabilities, entropy
from stable_monitor import Monitor, attention_temperature
from stable_monitor.records import read
from tests.stable_monitor.models import batch, gpt, train


def record(model, *args, **kwargs) -> dict:
    """The layers of one record."""
    monitor = Monitor(model.train(), 1)
    model(*args, **kwargs)
    layers = monitor.step()["layers"]
    monitor.close()
    return layers


class Attention(nn.Module):
    """Self- or cross-attention with separate projections; `core` says how it is written."""

    def __init__(self, core, heads: int = 4) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(32, 32) for _ in range(4))
        self.num_heads, self.core = heads, core

    def forward(self, x, y=None, mask=None):
        source = x if y is None else y
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        q, k, v = (z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in (q, k, v))
        return self.out_proj(self.core(q, k, v, mask).transpose(1, 2).flatten(2))

    def expected(self, x, y=None, mask=None) -> list[float]:
        q, k = (p(z).unflatten(-1, (4, -1)).transpose(1, 2) for p, z in ((self.q_proj, x), (self.k_proj, x)))
        return entropy(attention_probabilities(q, k, scale=8**-0.5, attn_mask=mask)).mean((0, 2)).tolist()


class Core(nn.Module):
    """A module of its own around the kernel, as in torchtitan."""

    def forward(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask)


def windows(q, k, v, mask):
    """Five dimensions, heads before windows."""
    q, k, v = (z.unflatten(2, (2, -1)) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).flatten(2, 3)


def folded(q, k, v, mask):
    """Heads folded into the batch."""
    return F.scaled_dot_product_attention(*(z.flatten(0, 1) for z in (q, k, v))).unflatten(0, q.shape[:2])


def written_out(fill: float):
    def core(q, k, v, mask):
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        return logits.masked_fill(~mask, fill).softmax(-1) @ v

    return core


def test_the_attention_around_a_kernel_is_its_owner():
    x = torch.randn(2, 6, 32)
    model = nn.Sequential(Attention(Core()))
    layers = record(model, x)
    assert list(layers) == ["0"] and layers["0"]["kind"] == "encoder"
    assert list(layers["0"]["sigma"]) == ["q", "k", "v", "out"]
    assert layers["0"]["entropy"] == pytest.approx(model[0].expected(x), abs=1e-4)


@pytest.mark.parametrize("core", [windows, folded])
def test_heads_are_found_wherever_they_lie(core):
    x = torch.randn(3, 8, 32)
    model = nn.Sequential(Attention(core))
    layer = record(model, x)["0"]
    assert len(layer["entropy"]) == 4
    if core is folded:
        assert layer["entropy"] == pytest.approx(model[0].expected(x), abs=1e-4)
    else:
        halves = [model[0].expected(half) for half in x.split(4, dim=1)]
        assert layer["entropy"] == pytest.approx(np.mean(halves, axis=0).tolist(), abs=1e-4)


def windowed(heads: int, windows: int, contiguous: bool, grouped: int = 1):
    """(batch, windows, heads, tokens, features), as in Swin and window attention of video; keys may be of fewer heads."""

    def core(q, k, v, mask):
        q, k, v = (z.unflatten(2, (windows, -1)).transpose(1, 2) for z in (q, k, v))
        k, v = (z[:, :, ::grouped] for z in (k, v))
        if contiguous:
            q, k, v = (z.contiguous() for z in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped > 1)
        return out.transpose(1, 2).flatten(2, 3)

    return core


def means_of_windows(attention, x, windows: int, grouped: int = 1) -> list[float]:
    """By head, from attention written out window by window."""
    rows = []
    for part in x.chunk(windows, dim=1):
        q, k = (p(part).unflatten(-1, (4, -1)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
        k = k[:, ::grouped].repeat_interleave(grouped, dim=1)
        rows.append(entropy(attention_probabilities(q, k, scale=8**-0.5)))
    return torch.cat(rows, dim=-1).mean((0, 2)).tolist()


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize(
    "batch_size, windows, grouped", [(3, 2, 1), (3, 4, 1), (4, 2, 1), (4, 4, 1), (3, 2, 2), (4, 4, 2)]
)
def test_heads_are_told_from_windows(batch_size, windows, grouped, contiguous):
    """Also where there are as many windows, or a batch as large, as there are heads, of which there are four."""
    torch.manual_seed(0)
    x = 3 * torch.randn(batch_size, 12 * windows // 2, 32)
    attention = Attention(windowed(4, windows, contiguous, grouped))
    layer = record(attention, x)[""]
    assert layer["entropy"] == pytest.approx(means_of_windows(attention, x, windows, grouped), abs=1e-4)


@pytest.mark.parametrize("windows", [2, 4])
def test_windows_within_the_batch_and_within_heads(windows):
    """(batch * windows, heads, ...), and (batch, heads, windows, ...) as a view of what the projections gave."""
    torch.manual_seed(0)
    x = 3 * torch.randn(2, 6 * windows, 32)

    def in_batch(q, k, v, mask):
        q, k, v = (z.unflatten(2, (windows, -1)).transpose(1, 2).flatten(0, 1) for z in (q, k, v))
        out = (q @ k.mT / 8**0.5).softmax(-1) @ v
        return out.unflatten(0, (-1, windows)).transpose(1, 2).flatten(2, 3)

    def after_heads(q, k, v, mask):
        q, k, v = (z.unflatten(2, (windows, -1)) for z in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).flatten(2, 3)

    for core in (in_batch, after_heads):
        attention = Attention(core)
        expected = means_of_windows(attention, x, windows)
        assert record(attention, x)[""]["entropy"] == pytest.approx(expected, abs=1e-4)


def test_heads_in_two_dimensions_and_some_of_the_heads():
    """(batch, key heads, queries of each, ...), and, as under tensor parallelism, fewer heads than the module says."""
    torch.manual_seed(0)
    x = 3 * torch.randn(2, 6, 32)

    def grouped(q, k, v, mask):
        q = q.unflatten(1, (2, 2))
        return F.scaled_dot_product_attention(q, k[:, ::2, None], v[:, ::2, None]).flatten(1, 2)

    attention = Attention(grouped)
    assert record(attention, x)[""]["entropy"] == pytest.approx(means_of_windows(attention, x, 1, 2), abs=1e-4)
    attention = Attention(
        lambda q, k, v, mask: F.scaled_dot_product_attention(q[:, :2], k[:, :2], v[:, :2]).repeat(1, 2, 1, 1)
    )
    assert record(attention, x)[""]["entropy"] == pytest.approx(means_of_windows(attention, x, 1)[:2], abs=1e-4)


@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.float32).min, -1e9, -3e4])
def test_masks_of_attention_written_out(fill):
    x = torch.randn(2, 6, 32)
    mask = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6).clone()
    mask[1, :, :, 4:] = False  # padding
    attention = Attention(written_out(fill))
    layer = record(attention, x, None, mask)[""]
    assert layer["kind"] == "decoder"
    rows = torch.tensor([*range(1, 7), *range(1, 5)], dtype=torch.float64)  # keys of each query that is not padding
    assert math.log(layer["keys"]) == pytest.approx(rows.log().mean().item(), abs=1e-4)
    q, k = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    expected = entropy(attention_probabilities(q, k, scale=8**-0.5, attn_mask=mask))
    means = torch.cat([expected[0], expected[1, :, :4]], dim=1).mean(1)
    assert layer["entropy"] == pytest.approx(means.tolist(), abs=1e-4)
    assert all(0 < bound <= mean for bound, mean in zip(layer["bound"], layer["entropy"], strict=True))


@pytest.mark.parametrize(("length", "kind"), [(6, "encoder"), (9, "cross")])
def test_keys_of_another_sequence_are_cross_attention(length, kind):
    x = torch.randn(2, 6, 32)
    y = x if length == 6 else torch.randn(2, length, 32)
    assert record(Attention(Core()), x, y)[""]["kind"] == kind


def test_bias_key_and_casts_do_not_make_cross_attention():
    x = torch.randn(2, 6, 16)
    attention = nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True)
    assert record(attention, x, x.clone(), x, need_weights=False)[""]["kind"] == "encoder"
    assert record(attention, x, x + 1, x, need_weights=False)[""]["kind"] == "cross"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bloom_and_swin(implementation):
    if implementation == "eager":  # BLOOM has no other
        config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)
        layers = record(transformers.BloomForCausalLM(config), torch.randint(50, (2, 9)))
        assert {layer["kind"] for layer in layers.values()} == {"decoder"} and len(layers) == 2
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4, attn_implementation=implementation
    )  # fmt: skip
    layers = record(transformers.SwinModel(config), torch.randn(2, 3, 32, 32))
    assert [(layer["kind"], len(layer["entropy"])) for layer in layers.values()] == [("encoder", 2)] * 2


def test_packed_weights_that_lie_head_by_head_are_not_told_apart():
    class HeadFirst(nn.Module):
        num_heads, head_first = 2, True

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (2, 3, 8)).permute(3, 0, 2, 1, 4)
            return F.scaled_dot_product_attention(q, k, v)

    model = HeadFirst()
    sigma = record(model, torch.randn(2, 5, 16))[""]["sigma"]
    assert sigma == {"qkv": pytest.approx(torch.linalg.matrix_norm(model.qkv.weight, 2).item(), rel=1e-3)}


def test_weights_that_count_their_uses_are_not_used():
    def build():
        model = gpt()
        for block in model.h:
            spectral_norm(block.attn.c_attn)
            spectral_norm(block.attn.c_proj)
        return model

    losses = train(build(), 4)
    records = []
    assert train(build(), 4, lambda called, _: Monitor(called, 1, writers=[records.append])) == losses
    assert records[-1]["layers"]["h.0.attn"]["sigma"]["out"] == pytest.approx(1.0, abs=0.2)


def test_the_top_singular_vectors_are_found_though_another_pair_was_on_top():
    W = torch.randn(2, 200, 200, generator=torch.Generator().manual_seed(0))
    (U, _), (V, _) = (torch.linalg.qr(x) for x in W)
    S = torch.linspace(0.4, 0.1, 200)
    S[0], S[1] = 1.0, 0.5
    _, v = top_singular_vectors(U * S @ V.T)
    S[1] = 5.0
    W = U * S @ V.T
    u, v = top_singular_vectors(W, v)
    assert (u @ W @ v).item() == pytest.approx(5.0, rel=1e-3)


def test_the_temperature_says_that_it_changed_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(RuntimeError, match="no attention was seen"), attention_temperature(model, 0.1):
        model(torch.randn(2, 4))
    with attention_temperature(model, 0.1):  # not run
        pass


def test_buffers_that_a_forward_pass_replaces_are_put_back_after_the_probe():
    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gpt()
            self.register_buffer("average", torch.zeros(()))

        def forward(self, tokens, targets):
            logits, loss = self.inner(tokens, targets)
            self.average = 0.9 * self.average + loss.detach()
            return logits, loss + self.average

    def losses(monitor=None):
        model = Averaging()
        return train(model, 3, monitor, called=torch.compile(model, backend="aot_eager"))

    assert losses(lambda called, _: Monitor(called, 1)) == losses()


def test_what_cannot_be_measured_or_written_does_not_end_the_run(tmp_path, caplog):
    def broken(record):
        raise OSError("disk full")

    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.zeros(16))

        def forward(self, query, key):
            return F.scaled_dot_product_attention(self.query.expand(2, 1, 16), key, key) + query

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(16, 16))
    parts = {"pool": Pooling(), "scripted": scripted, "attention": nn.MultiheadAttention(16, 2)}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict(parts)

        def forward(self, x):
            empty = F.scaled_dot_product_attention(*(x.new_zeros(0, 2, 4, 8),) * 3).sum()
            x = self.parts["scripted"](self.parts["pool"](self.parts["pool"].query, x))
            return self.parts["attention"](x, x, x)[0].sum() + empty

    (tmp_path / "monitor.jsonl").write_text("\n\nno record\n\n{}\n")
    monitor = Monitor(Model(), 1, path=tmp_path, step=5, writers=[broken])
    for loss in (np.float32(3.0), torch.ones(1)):
        monitor._model(torch.randn(2, 5, 16)).backward()
        assert "parts.attention" in monitor.step(loss)["layers"]
    assert "disk full" in caplog.text and "the alarm's history" in caplog.text
    assert [record["step"] for record in read(tmp_path)] == [5, 6]


def test_exact_numbers_of_keys():
    x = torch.randn(1, 730, 32)
    assert record(Attention(Core()), x)[""]["keys"] == 730.0
    model = gpt()
    assert record(model, *batch(0))["h.0.attn"]["keys"] == pytest.approx(math.factorial(16) ** (1 / 16), rel=1e-4)
