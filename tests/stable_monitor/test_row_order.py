"""Packed projections in other orders than their names stand for: told from the pass, and never bounded in the wrong rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stable_core import sigma_reparam
from stable_monitor import QKClip, rescue, verify

HEADS, DIM, TOKENS = 4, 16, 12
WIDTH = HEADS * DIM


class Attention(nn.Module):
    """`cut(rows of a token)` gives q, k and v, (..., heads, dim) each; q is scaled, and q and k are rotated."""

    def __init__(self, cut) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_heads, self.cut = HEADS, cut
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (part.transpose(1, 2) for part in self.cut(self.qkv(x)))
        angles = torch.outer(torch.arange(x.shape[1]), torch.rand(DIM // 2, generator=torch.Generator().manual_seed(1)))
        turned = []
        for part in (q, k):
            a, b = part.chunk(2, -1)
            turned.append(torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1))
        y = F.scaled_dot_product_attention(turned[0] * DIM**-0.5, turned[1], v, scale=1.0)
        return self.proj(y.transpose(1, 2).flatten(2))


def by_part(order: str):
    return lambda rows: [rows.unflatten(-1, (3, HEADS, DIM))[..., order.index(role), :, :] for role in "qkv"]


def by_head(order: str):
    return lambda rows: [rows.unflatten(-1, (HEADS, 3, DIM))[..., order.index(role), :] for role in "qkv"]


def rescued(attention: nn.Module):
    model, x = nn.Sequential(attention), torch.randn(3, TOKENS, WIDTH)
    return rescue(model, torch.optim.AdamW(model.parameters()), lambda: model(x), layers="0")


@pytest.mark.parametrize(
    "cut, error",
    [
        (by_head("qkv"), r"0: its packed rows are \(heads, q k v, head_dim\); say so, module.head_first = True"),
        (
            by_head("kvq"),
            r"0: its packed rows are \(heads, three, head_dim\) of k, v, q; give q, k and v layers of their own",
        ),
        (by_part("vqk"), r"0: its packed rows are \(three, heads, head_dim\) of v, q, k"),
    ],
)
def test_another_order_is_refused_and_nothing_changes(cut, error):
    attention = Attention(cut)
    before = {name: x.clone() for name, x in attention.state_dict().items()}
    with pytest.raises(ValueError, match=error):
        rescued(attention)
    after = attention.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], x) for name, x in before.items())


@pytest.mark.parametrize("head_first", [False, True])
def test_the_rows_of_queries_and_keys_are_bounded(head_first):
    attention = Attention(by_head("qkv") if head_first else by_part("qkv"))
    attention.head_first = head_first
    with torch.no_grad():
        attention.qkv.weight *= 30
    before = [part.clone() for part in attention.cut(attention.qkv.weight.detach().T)]
    (done,) = rescued(attention)
    after = attention.cut(attention.qkv.weight.detach().T)
    norms = [torch.linalg.matrix_norm(part.flatten(1), 2).item() for part in before]
    assert (done.queries[0], done.keys[0]) == pytest.approx(tuple(norms[:2]), rel=1e-3)
    for part, old, norm, new in zip(after, before, norms, (done.queries[1], done.keys[1], norms[2]), strict=True):
        torch.testing.assert_close(part, old * new / norm, rtol=1e-3, atol=1e-5)


def test_what_fits_no_order_is_taken_for_what_its_name_says():
    """As where queries are normed: rows and queries are then of other sizes in any order."""
    attention = Attention(
        lambda rows: [F.normalize(part, dim=-1) * torch.rand(HEADS, 1) for part in by_part("qkv")(rows)]
    )
    assert len(rescued(attention)) == 1


def test_verify_names_another_order():
    for cut, ok in ((by_part("qkv"), True), (by_head("qkv"), False)):
        model, x = nn.Sequential(Attention(cut)), torch.randn(3, TOKENS, WIDTH)
        sigma_reparam(model)
        report = verify(model, lambda model=model, x=x: model(x))
        assert report.ok == ok, report
        assert ok or "its packed rows are (heads, q k v, head_dim)" in str(report)


@pytest.mark.parametrize("compiled", [False, True])
def test_qk_clip_refuses_another_order_in_the_first_pass(compiled):
    model, x = nn.Sequential(Attention(by_head("qkv"))), torch.randn(3, TOKENS, WIDTH)
    called = torch.compile(model, backend="eager") if compiled else model
    QKClip(called, 1e-3, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(
        ValueError, match=r"0: its packed rows are \(heads, q k v, head_dim\); say so, module.head_first = True"
    ):
        called(x)


def test_qk_clip_refuses_a_layer_that_a_later_pass_is_the_first_to_use():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.both = Attention(by_part("qkv")), Attention(by_head("qkv")), False

        def forward(self, x):
            x = self.first(x)
            return self.second(x) if self.both else x

    model, x = Sometimes(), torch.randn(3, TOKENS, WIDTH)
    clip = QKClip(model, 1e-3)
    model(x)
    assert list(clip.step()) == ["first"]
    model.both = True
    with pytest.raises(ValueError, match=r"second: its packed rows are \(heads, q k v, head_dim\)"):
        model(x)


@pytest.mark.parametrize("head_first", [False, True])
def test_qk_clip_clips_the_rows_of_queries_and_keys_and_looks_at_their_order_once(head_first):
    attention = Attention(by_head("qkv") if head_first else by_part("qkv"))
    attention.head_first = head_first
    model, x = nn.Sequential(attention), torch.randn(3, TOKENS, WIDTH)
    clip = QKClip(model, 1e-3)
    before = [part.clone() for part in attention.cut(attention.qkv.weight.detach().T)]
    for _ in range(2):
        model(x)
        assert list(clip.step()) == ["0"]
        assert not clip._interception.rows._squares  # nothing is looked at twice
    q, k, v = (
        (new.norm(dim=(0, 2)) / old.norm(dim=(0, 2)))
        for new, old in zip(attention.cut(attention.qkv.weight.detach().T), before, strict=True)
    )
    assert max(q.max(), k.max()) < 0.5 and torch.equal(v, torch.ones(HEADS))
