"""Compiled models: what is recorded is what the uncompiled model records, and nothing is compiled or broken up for it."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from stable_monitor import Monitor, QKClip, prepare_to_resume, rescue

from .models import batch, gpt, train

WHOLE = {"backend": "eager", "fullgraph": True}


def forget() -> None:
    """Forgets what was compiled and counted."""
    torch.compiler.reset()
    counters.clear()


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    forget()
    yield
    forget()


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_place(model):
    model.compile(**WHOLE)
    return model


def forward(model):
    model.forward = torch.compile(model.forward, **WHOLE)
    return model


def each_block(compile):
    def compiled(model):
        for i, block in enumerate(model.h):
            model.h[i] = compile(block)
        return model

    return compiled


whole = functools.partial(torch.compile, **WHOLE)
WAYS = {
    "torch.compile(model)": whole,
    "model.compile()": in_place,
    "model.forward": forward,
    "torch.compile(block)": each_block(whole),
    "block.compile()": each_block(in_place),
}
DISTRIBUTED = {
    "DDP(torch.compile(model))": lambda model: DistributedDataParallel(whole(model)),
    "DDP of compiled blocks": lambda model: DistributedDataParallel(WAYS["torch.compile(block)"](model)),
    # DistributedDataParallel itself is not compiled in one graph.
    "torch.compile(DDP(model))": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
}


def graphs() -> tuple[int, int]:
    """Graphs and breaks so far."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def without_dropout(model):
    """Random numbers are others in compiled activation checkpointing, and in a second pass."""
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.0
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    return model


def build(checkpoint: bool = False):
    """A GPT that counts its forward passes."""

    def count(module, *_):
        module.count.add_(1)

    model = gpt(checkpoint=checkpoint)
    if checkpoint:
        without_dropout(model)
    model.register_buffer("count", torch.zeros(()))
    model.register_forward_hook(count)
    return model


def watch(model, called, every: int = 2):
    """(losses, records) of a watched run."""
    records = []
    return train(model, 3, lambda c, _: Monitor(c, every, writers=[records.append]), called=called), records


@functools.cache
def plain_records(**settings):
    model = build(**settings)
    return watch(model, model)[1]


def compare(records, plain) -> None:
    assert [record["step"] for record in records] == [record["step"] for record in plain]
    for a, b in zip(records, plain, strict=True):
        assert a["layers"].keys() == b["layers"].keys()
        for name, layer in b["layers"].items():
            assert a["layers"][name]["entropy"] == pytest.approx(layer["entropy"], abs=1e-3)


def check(way, **settings) -> None:
    model = build(**settings)
    losses = train(model, 3, called=way(model))
    expected = graphs()
    assert expected[0] > 0
    forget()
    model = build(**settings)
    with torch._dynamo.config.patch(error_on_recompile=True):
        watched, records = watch(model, way(model))
    assert (watched, graphs(), model.count.item()) == (losses, expected, 3)
    compare(records, plain_records(**settings))


@pytest.mark.parametrize("way", WAYS)
def test_a_record_compiles_nothing_and_leaves_the_model_as_it_is(way):
    check(WAYS[way])


def test_activation_checkpointing():
    check(WAYS["block.compile()"], checkpoint=True)


@pytest.mark.parametrize("way", DISTRIBUTED)
def test_in_distributed_data_parallel(way, one_process):
    check(DISTRIBUTED[way])


def test_accumulated_batches_of_which_the_first_is_recorded():
    way = WAYS["torch.compile(block)"]

    def run(called, every: int | None):
        records, losses = [], []
        monitor = every and Monitor(called, every, writers=[records.append])
        optimizer = torch.optim.AdamW(called.parameters(), lr=1e-2)
        for step in range(3):
            for part in (0, 1):
                torch.manual_seed(2 * step + part)
                loss = called(*batch(2 * step + part))[1]
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            if monitor:
                monitor.step(loss)
            optimizer.zero_grad()
        return losses, records

    losses, _ = run(way(gpt()), None)
    expected = graphs()
    forget()
    watched, records = run(way(gpt()), 1)
    assert (watched, graphs()) == (losses, expected)
    compare(records, run(gpt(), 1)[1])


# ------------------------------------------------------------------------------------------------ compiled functions


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


compiled_attend = torch.compile(attend, **WHOLE)


def attention_by(function):
    def forward(self, x):
        q, k, v = (y.unflatten(2, (4, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, dim=2))
        return self.c_proj(function(q, k, v).transpose(1, 2).flatten(2))

    return forward


def forward_by_name(self, x):
    q, k, v = (y.unflatten(2, (4, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, dim=2))
    return self.c_proj(compiled_attend(q, k, v).transpose(1, 2).flatten(2))


def with_attention(forward):
    """A GPT whose attention is of another class."""
    model = gpt()
    for block in model.h:
        block.attn.__class__ = type("Attention", (type(block.attn),), {"forward": forward})
    return model


def test_a_function_that_a_class_calls_by_its_name():
    losses, expected = train(with_attention(forward_by_name), 3), graphs()
    forget()
    model = with_attention(forward_by_name)
    with torch._dynamo.config.patch(error_on_recompile=True):
        watched, records = watch(model, model, 1)
    assert (watched, graphs()) == (losses, expected)
    plain = with_attention(attention_by(attend))
    compare(records, watch(plain, plain, 1)[1])


def test_a_function_that_is_known_only_when_it_has_run():
    """It is compiled once more, with the first record, which is complete."""

    def build_it():
        return with_attention(attention_by(torch.compile(attend, **WHOLE)))

    losses, (compiled, breaks) = train(build_it(), 3), graphs()
    forget()
    model = build_it()
    watched, records = watch(model, model, 1)
    assert (watched, graphs()) == (losses, (compiled + 1, breaks))
    plain = with_attention(attention_by(attend))
    _, expected = watch(plain, plain, 1)
    compare(records[1:], expected[1:])
    # The probe of the first update comes after the pass, and has other random numbers for dropout.
    for name, layer in expected[0]["layers"].items():
        assert records[0]["layers"][name]["entropy"] == pytest.approx(layer["entropy"], abs=0.1)


def test_clipping_where_a_function_is_compiled():
    def weights(function):
        model = without_dropout(with_attention(attention_by(function)))
        clip = QKClip(model, 0.05)
        for step in (0, 1):
            model(*batch(step))
            assert clip.step()
        return model.state_dict()

    torch.testing.assert_close(weights(torch.compile(attend, **WHOLE)), weights(attend))


# ------------------------------------------------------------------------------------------------------------ rescue


@pytest.mark.parametrize("way", ["DDP(torch.compile(model))", "torch.compile(block)"])
def test_a_rescued_model_is_compiled_anew_and_trains_its_gammas(way, one_process):
    """As the model that is not compiled; and a run that is compiled, or not, resumes from it."""

    def run(way):
        model = gpt()
        attention, called = model.h[1].attn, way(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)  # the keys' bias has no gradient but noise
        losses = train(model, 2, optimizer=optimizer, called=called)
        with torch.no_grad():
            attention.c_attn.weight[:64] *= 60
        (done,) = rescue(called, optimizer, lambda: called(*batch(5)))
        assert done.layer == "h.1.attn"
        before = {name: p.clone() for name, p in model.named_parameters() if "gamma" in name}
        losses += train(model, 2, optimizer=optimizer, called=called, first=2)
        parameters = dict(model.named_parameters())
        assert before and not any(torch.equal(parameters[name], gamma) for name, gamma in before.items())
        return model, optimizer.state_dict(), losses

    plain, _, expected = run(lambda model: model)
    model, saved, losses = run({**WAYS, **DISTRIBUTED}[way])
    assert losses == pytest.approx(expected, abs=1e-4)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

    for way in (lambda model: model, WAYS["torch.compile(block)"]):
        again = way(gpt())
        optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
        assert prepare_to_resume(again, optimizer, saved) == ["h.1.attn.c_attn"]
        optimizer.load_state_dict(saved)
        moments = [optimizer.state[p]["exp_avg"] for p in again.parameters()]
        assert [m.shape for m in moments] == [p.shape for p in again.parameters()]
