"""Attention in kernels that torch does not dispatch: against logits and softmax written out in float64."""

import gc
import pickle
import sys
import types
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from stable_monitor import Monitor, QKClip, attention_temperature
from tests.stable_monitor import stand_ins
from tests.stable_monitor.models import gpt, train
from tests.stable_monitor.stand_ins import (
    BlockDiagonalCausalMask,
    LowerTriangularMask,
    ToTheRight,
    band,
    dense,
    distances,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    memory_efficient_attention,
    numbers,
)

HEADS, DIM, TOKENS = 4, 8, 10


class Attention(nn.Module):
    """Projections with names of their own; `core` gets q, k and v as (batch, tokens, heads, dim), and returns such."""

    def __init__(self, core, key_heads: int = HEADS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.asks, self.out = nn.Linear(32, HEADS * DIM), nn.Linear(HEADS * DIM, 32)
        self.has, self.gives = nn.Linear(32, key_heads * DIM), nn.Linear(32, key_heads * DIM)
        self.core = core
        with torch.no_grad():
            self.asks.weight.mul_(4), self.has.weight.mul_(4)  # for entropies that differ

    def qkv(self, x):
        return [p(x).unflatten(-1, (-1, DIM)) for p in (self.asks, self.has, self.gives)]

    def forward(self, x):
        return self.out(self.core(*self.qkv(x)).flatten(2))


def x(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, TOKENS, 32, generator=torch.Generator().manual_seed(1))


def record(model, *args, **settings) -> dict:
    """The layers of one record."""
    with Monitor(model.train(), 1, **settings) as monitor:
        model(*args)
        return monitor.step()["layers"]


def check(model: Attention, given, heads_first: bool = True, kind: str = "encoder", **how) -> None:
    """Compares a record, and the output at another temperature, with `dense` of the same logits."""
    q, k, v = (z.transpose(1, 2) for z in model.qkv(given))
    layer = record(model, given)[""]
    assert layer["kind"] == kind
    for name, expected in numbers(dense(q, k, **how)).items():
        assert layer[name] == pytest.approx(expected, abs=2e-4)
    with attention_temperature(model, 0.5):
        colder = model(given)
    v = v.repeat_interleave(HEADS // v.shape[1], dim=1)
    expected = model.out((dense(q, k, tau=0.5, **how)[1].float() @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(colder, expected, rtol=1e-3, atol=1e-4)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
FLASH = [
    ({}, {}, "encoder"),
    ({"causal": True, "softmax_scale": 0.7}, {"scale": 0.7, "visible": band(TOKENS, TOKENS, True)}, "decoder"),
    ({"causal": True, "window_size": (3, 0)}, {"visible": band(TOKENS, TOKENS, True, (3, 0))}, "decoder"),
    ({"window_size": (2, 4)}, {"visible": band(TOKENS, TOKENS, False, (2, 4))}, "encoder"),
    ({"softcap": 3.0, "causal": True}, {"cap": 3.0, "visible": band(TOKENS, TOKENS, True)}, "decoder"),
    ({"alibi_slopes": SLOPES}, {"bias": -SLOPES.view(-1, 1, 1) * distances(TOKENS, TOKENS)}, "encoder"),
]


@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("options, how, kind", FLASH)
def test_flash_attn(options, how, kind, key_heads):
    check(Attention(lambda q, k, v: flash_attn_func(q, k, v, **options), key_heads), x(), kind=kind, **how)


def test_flash_attn_of_packed_queries_keys_and_values_and_of_more_keys_than_queries():
    packed = Attention(lambda q, k, v: flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), 0.0, None, True))
    check(packed, x(), kind="decoder", visible=band(TOKENS, TOKENS, True))
    model = Attention(lambda q, k, v: flash_attn_func(q[:, 6:], k, v, causal=True))
    q, k, _ = (z.transpose(1, 2) for z in model.qkv(x()))
    expected = numbers(dense(q[:, :, 6:], k, visible=band(4, TOKENS, True)))
    layer = record(model, x())[""]
    assert {name: layer[name] for name in expected} == {
        name: pytest.approx(e, abs=2e-4) for name, e in expected.items()
    }


def sequences(q, k, v):
    """One batch of three sequences, of 5, 9 and 6 tokens."""
    starts = torch.tensor([0, 5, 14, 20], dtype=torch.int32)
    q, k, v = (z.flatten(0, 1) for z in (q, k, v))
    return flash_attn_varlen_func(q, k, v, starts, starts, 9, 9, causal=True).unflatten(0, (2, TOKENS))


def block_diagonal(q, k, v):
    q, k, v = (z.flatten(0, 1)[None] for z in (q, k, v))
    return memory_efficient_attention(q, k, v, BlockDiagonalCausalMask([0, 5, 14, 20]))[0].unflatten(0, (2, TOKENS))


def nested(layout, q, k, v):
    q, k, v = (torch.nested.as_nested_tensor(list(z.flatten(0, 1).split([5, 9, 6])), layout=layout) for z in (q, k, v))
    q, k, v = (z.transpose(1, 2) if layout == torch.jagged else z.transpose(1, 2).contiguous() for z in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return torch.cat(out.transpose(1, 2).unbind()).unflatten(0, (2, TOKENS))


@pytest.mark.parametrize(
    "core, causal",
    [
        (sequences, True),
        (block_diagonal, True),
        (partial(nested, torch.jagged), False),  # torch has no causal ones on a CPU
        (partial(nested, torch.strided), False),
    ],
    ids=["varlen", "xformers", "jagged", "strided"],
)
def test_sequences_of_their_own_lengths(core, causal):
    model = Attention(core)
    q, k, v = (z.flatten(0, 1).transpose(0, 1)[None].split([5, 9, 6], dim=2) for z in model.qkv(x()))
    how = [{"visible": band(n, n, causal)} for n in (5, 9, 6)]
    layer = record(model, x())[""]
    for name, expected in numbers(*(dense(*qk, **one) for *qk, one in zip(q, k, how, strict=True))).items():
        assert layer[name] == pytest.approx(expected, abs=2e-4)
    assert layer["kind"] == ("decoder" if causal else "encoder")
    keys = torch.cat([torch.arange(1.0, n + 1) if causal else torch.full((n,), float(n)) for n in (5, 9, 6)])
    assert layer["keys"] == pytest.approx(keys.log().mean().exp().item(), rel=1e-4)
    with attention_temperature(model, 0.5):
        colder = model(x())
    parts = [dense(a, b, tau=0.5, **one)[1].float() @ c for a, b, c, one in zip(q, k, v, how, strict=True)]
    expected = model.out(torch.cat(parts, 2)[0].transpose(0, 1).unflatten(0, (2, TOKENS)).flatten(2))
    torch.testing.assert_close(colder, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "bias, how, kind",
    [
        (None, {}, "encoder"),
        (LowerTriangularMask(), {"visible": band(TOKENS, TOKENS, True)}, "decoder"),
        (
            0.1 * distances(TOKENS, TOKENS).expand(2, HEADS, -1, -1),
            {"bias": 0.1 * distances(TOKENS, TOKENS)},
            "encoder",
        ),
    ],
)
def test_xformers(bias, how, kind):
    check(
        Attention(lambda q, k, v: memory_efficient_attention(q, k, v, bias, scale=0.4)),
        x(),
        kind=kind,
        scale=0.4,
        **how,
    )


def test_xformers_with_grouped_keys_and_a_mask_of_a_kind_that_is_not_known():
    def core(q, k, v):  # (batch, tokens, key heads, queries of each, dim)
        return memory_efficient_attention(q.unflatten(2, (2, 2)), *(z[:, :, :, None] for z in (k, v)), ToTheRight())

    model = Attention(core, key_heads=2)
    q, k, _ = (z.transpose(1, 2) for z in model.qkv(x()))
    layer = record(model, x())[""]
    for name, expected in numbers(dense(q, k, bias=0.3 * torch.arange(TOKENS))).items():
        assert layer[name] == pytest.approx(expected, abs=2e-4)
    with pytest.raises(ValueError, match="attn_bias = ToTheRight: its values"), attention_temperature(model, 0.5):
        model(x())


def documents(key_heads: int = HEADS):
    """FlexAttention over two documents, causal, with a relative bias by head in score_mod."""
    document = torch.tensor([[0] * 4 + [1] * 6, [0] * 7 + [1] * 3])

    def mask(b, h, i, j):
        return (i >= j) & (document[b, i] == document[b, j])

    def bias(score, b, h, i, j):
        return score - 0.1 * (h + 1) * (i - j)

    blocks = create_block_mask(mask, 2, None, TOKENS, TOKENS, device="cpu")
    visible = band(TOKENS, TOKENS, True) & (document[:, None, :, None] == document[:, None, None])
    signed = torch.tensor([[float(i - j) for j in range(TOKENS)] for i in range(TOKENS)])
    return bias, blocks, {"visible": visible, "bias": -0.1 * torch.arange(1, HEADS + 1).view(-1, 1, 1) * signed}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_flex_attention(key_heads):
    bias, blocks, how = documents()

    def core(q, k, v):
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        return flex_attention(q, k, v, score_mod=bias, block_mask=blocks, enable_gqa=key_heads < HEADS).transpose(1, 2)

    model = Attention(core, key_heads).requires_grad_(False)  # it has no gradient on a CPU
    check(model, x(), kind="decoder", **how)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_blocks_that_a_block_mask_does_not_list_are_not_seen():
    def everything(b, h, i, j):
        return i >= 0

    listed = create_block_mask(lambda b, h, i, j: j // 16 <= i // 16, None, None, 48, 48, device="cpu", BLOCK_SIZE=16)
    listed.mask_mod = everything
    model = Attention(lambda q, k, v: flex_attention(*(z.transpose(1, 2) for z in (q, k, v)), block_mask=listed).mT)
    model.requires_grad_(False)
    model.out = nn.Identity()
    given = torch.randn(1, 48, 32)
    q, k, _ = (z.transpose(1, 2) for z in model.qkv(given))
    visible = torch.ones(3, 3, dtype=torch.bool).tril().repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert record(model, given)[""]["entropy"] == pytest.approx(
        numbers(dense(q, k, visible=visible))["entropy"], abs=2e-4
    )


class Compiled(Attention):
    """As in torchtitan: the compiled function is an attribute of the class."""

    graphs = 0

    @classmethod
    def count(cls, graph, inputs):
        cls.graphs += 1
        return graph

    def __init__(self) -> None:
        super().__init__(lambda q, k, v: Compiled.attend(*(z.transpose(1, 2) for z in (q, k, v))).transpose(1, 2))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_compiled_flex_attention_is_seen_and_not_compiled_anew():
    Compiled.attend = torch.compile(flex_attention, backend=Compiled.count)
    model = Compiled().requires_grad_(False)
    plain = model(x())
    once = Compiled.graphs
    q, k, _ = (z.transpose(1, 2) for z in model.qkv(x()))
    with Monitor(model, 1) as monitor:
        assert torch.equal(model(x()), plain)
        entropy = monitor.step()["layers"][""]["entropy"]
    assert Compiled.graphs == once > 0
    assert entropy == pytest.approx(numbers(dense(q, k))["entropy"], abs=2e-4)
    assert isinstance(Compiled.__dict__["attend"], types.FunctionType)


@pytest.mark.parametrize("fused", [True, False])
def test_timm(fused):
    timm.layers.set_fused_attn(fused)
    try:
        vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    finally:
        timm.layers.set_fused_attn(True)
    attention, inputs = vit.blocks[0].attn, []
    assert attention.fused_attn == fused
    attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    layer = record(vit, torch.randn(2, 3, 32, 32))["blocks.0.attn"]
    q, k, _ = attention.qkv(inputs[0]).unflatten(-1, (3, 3, 64)).permute(2, 0, 3, 1, 4)
    for name, expected in numbers(dense(q, k)).items():
        assert layer[name] == pytest.approx(expected, abs=2e-4)


def test_what_of_a_kernel_is_not_read_is_said(caplog):
    model = Attention(lambda q, k, v: flash_attn_func(q, k, v, qv=q))
    assert record(model, x()) == {}
    assert "not recorded: ValueError: qv is given, which is not read" in caplog.text


class Clipped(Attention):
    """With names that QK-clip knows."""

    def __init__(self) -> None:
        super().__init__(lambda q, k, v: flash_attn_func(q, k, v, softcap=20.0, causal=True))
        self.q_proj, self.k_proj = self.asks, self.has
        self.v_proj, self.num_heads = self.gives, HEADS
        del self.asks, self.has, self.gives
        with torch.no_grad():
            self.q_proj.weight.mul_(6)

    def qkv(self, x):
        return [p(x).unflatten(-1, (-1, DIM)) for p in (self.q_proj, self.k_proj, self.v_proj)]


def test_qk_clip_reads_q_k_before_the_soft_cap():
    model = Clipped()
    q, k, _ = (z.transpose(1, 2) for z in model.qkv(x()))
    expected = numbers(dense(q, k, visible=band(TOKENS, TOKENS, True)))["max_logit"]
    clip = QKClip(model, threshold=30.0)
    model(x())
    assert max(expected) > 30
    found = clip.step()[""]
    assert [s for s in found if s > 30] == pytest.approx([s for s in expected if s > 30], rel=1e-4)
    clip.close()


def test_every_reference_is_put_back_and_a_watched_model_can_be_pickled():
    model = Attention(flash_attn_func)  # kept by the model itself
    here, there = sys.modules[__name__], stand_ins
    with attention_temperature(model, 0.5), attention_temperature(model, 0.5):
        assert model.core is here.flash_attn_func is there.flash_attn_func
        assert type(model.core).__name__ == "StandIn"
        copied = pickle.loads(pickle.dumps(model))
    assert type(copied(x())) is torch.Tensor
    for function in (model.core, here.flash_attn_func, there.flash_attn_func):
        assert isinstance(function, types.FunctionType)
    torch.testing.assert_close(model(x()), copied(x()))


def test_a_monitor_that_nobody_closed_is_collected_while_another_model_is_compiled():
    def watch_and_forget():
        model = Attention(lambda q, k, v: v).train()  # no attention is seen, and so it goes on looking
        model.monitor = Monitor(model, 1)
        model(x())

    def collect(graph, inputs):
        gc.collect()
        return graph

    gc.collect()
    gc.disable()
    try:
        watch_and_forget()
        assert type(stand_ins.flash_attn_func).__name__ == "StandIn"
        other = Attention(lambda q, k, v: stand_ins.flash_attn_func(q, k, v))
        plain = other(x())
        torch.testing.assert_close(torch.compile(other, backend=collect)(x()), plain)
    finally:
        gc.enable()
    record(other, x())  # the next one puts the function back
    assert isinstance(stand_ins.flash_attn_func, types.FunctionType)


def test_losses_are_bitwise_those_without_it():
    def losses(monitored):
        model = Attention(lambda q, k, v: flash_attn_func(q, k, v, causal=True))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        monitor = Monitor(model, 2, optimizer=optimizer) if monitored else None
        found = []
        for step in range(4):
            loss = model(x() + step).square().mean()
            loss.backward()
            optimizer.step()
            if monitor:
                monitor.step(loss)
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    assert losses(True) == losses(False)


# ------------------------------------------------------------------------------------------ what the user has to name


def written_out(q, k, v):
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    return ((q @ k.mT / DIM**0.5).softmax(-1) @ v).transpose(1, 2)


class Unknown(torch.autograd.Function):
    """A kernel that nothing shows."""

    @staticmethod
    def forward(ctx, q, k, v):
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        return (dense(q, k)[1].float() @ v).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad, grad


def two(core) -> nn.Module:
    return nn.ModuleDict({"mix": Attention(core), "known": nn.MultiheadAttention(32, 4, batch_first=True)})


class Two(nn.Module):
    """A module that is seen, and one that is not."""

    def __init__(self, core) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([two(core)])

    def forward(self, x):
        mix, known = self.blocks[0]["mix"], self.blocks[0]["known"]
        x = mix(x)
        return known(x, x, x, need_weights=False)[0]


def read(module, args, kwargs):
    q, k, _ = (z.transpose(1, 2) for z in module.qkv(args[0]))
    return q, k, DIM**-0.5, None


@pytest.mark.parametrize("core, how", [(written_out, "softmax"), (Unknown.apply, read), (written_out, read)])
def test_attention_that_the_user_names(core, how, caplog):
    model = Two(core)
    layers = record(model, x(), attention={"blocks.*.mix": how})
    assert list(layers) == ["blocks.0.mix", "blocks.0.known"]
    q, k, _ = (z.transpose(1, 2) for z in model.blocks[0]["mix"].qkv(x()))
    for name, expected in numbers(dense(q, k)).items():
        assert layers["blocks.0.mix"][name] == pytest.approx(expected, abs=2e-4)
    assert "no attention was seen" not in caplog.text


def test_what_looks_like_attention_and_is_not_seen_is_named_once(caplog):
    model = Two(Unknown.apply)
    with Monitor(model, 1) as monitor:
        for _ in range(2):
            model(x())
            assert list(monitor.step()["layers"]) == ["blocks.0.known"]
    assert caplog.text.count("no attention was seen in blocks.0.mix: if it is softmax attention, name it") == 1
    caplog.clear()
    train(gpt(), 1, lambda called, _: Monitor(called, 1))
    assert "no attention was seen" not in caplog.text


def test_the_temperature_of_named_attention():
    model = Two(written_out)
    colder = Two(written_out)
    with torch.no_grad():
        colder.blocks[0]["mix"].asks.weight.mul_(2), colder.blocks[0]["mix"].asks.bias.mul_(2)
        colder.blocks[0]["known"].load_state_dict(model.blocks[0]["known"].state_dict())
        colder.blocks[0]["known"].in_proj_weight[:32].mul_(2)
    with attention_temperature(model, 0.5, attention={"*.mix": "softmax"}):
        torch.testing.assert_close(model(x()), colder(x()), rtol=1e-4, atol=1e-5)
    with (
        pytest.raises(ValueError, match="read by a function"),
        attention_temperature(model, 0.5, attention={"*mix": read}),
    ):
        model(x())


@pytest.mark.parametrize(
    "attention, message",
    [
        ("softmax", r"attention = 'softmax': allowed is a dictionary"),
        ({"h.0.attn": "sigmoid"}, r"attention = \{'h.0.attn': 'sigmoid'\}: allowed is a dictionary"),
        ({"h.7": "softmax"}, r"attention = \{'h.7': ...\}: no module has that name; there are wte, wpe, h, h.0,"),
    ],
)
def test_bad_settings(attention, message):
    with pytest.raises(ValueError, match=message):
        Monitor(gpt(), attention=attention)


def test_a_function_that_returns_something_else_is_named(caplog):
    layers = record(Two(Unknown.apply), x(), attention={"blocks.0.mix": lambda module, args, kwargs: args[0]})
    assert list(layers) == ["blocks.0.known"]
    assert "blocks.0.mix not recorded: ValueError: the function given for it in attention must return" in caplog.text
