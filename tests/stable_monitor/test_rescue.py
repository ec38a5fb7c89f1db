"""Rescue: which layers, what of the run it touches, and that the run goes on and comes back."""

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from stable_core import fold, sigma_layers
from stable_core.bounding import LIMIT
from stable_core.unfolding import reparametrised_in
from stable_monitor import Alarm, Monitor, QKClip, Rescue, prepare_to_resume, report, rescue
from stable_monitor.records import Run, load
from stable_monitor.resume import reparametrise_named

from .models import batch, gpt, train


def collapsed(*layers: int, times: float = 60.0):
    """A GPT whose queries and keys were blown up in some layers, and its optimizer with moments."""
    model = gpt()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    train(model, 2, optimizer=optimizer)
    with torch.no_grad():
        for i in layers:
            model.h[i].attn.c_attn.weight[:64] *= times
    return model, optimizer


def groups(model: nn.Module) -> list[dict]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": matrices}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]


def forward_of(model):
    return lambda: model(*batch(5))


def entropies(model) -> list[float]:
    monitor = Monitor(model, every=1)
    model(*batch(5))[1].backward()
    record = monitor.step()
    monitor.close()
    model.zero_grad()
    return [sum(layer["entropy"]) / 4 for layer in record["layers"].values()]


def test_the_collapsed_layer_is_bounded_and_nothing_else_changes():
    model, optimizer = collapsed(1)
    low = entropies(model)[1]
    old = copy.deepcopy(model.h[1].attn)
    parameters = {p: (p.clone(), copy.deepcopy(optimizer.state[p])) for p in model.parameters()}
    inside = set(model.h[1].attn.c_attn.parameters())
    logits = model.eval()(*batch(5))[0]
    model.train()
    random = torch.get_rng_state()
    (done,) = rescue(model, optimizer, forward_of(model))
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert done.layer == "h.1.attn" and max(low, done.entropy[0]) < 0.01 and done.entropy[1] > 0.3 * done.uniform
    assert done.queries[1] == pytest.approx(LIMIT, rel=1e-3)
    for parameter, (value, moments) in parameters.items():
        if parameter not in inside:
            assert torch.equal(parameter, value)
            state = optimizer.state[parameter]
            assert state.keys() == moments.keys() and all(torch.equal(state[key], moments[key]) for key in moments)
        else:
            assert parameter not in optimizer.state
    new = [p for p in model.parameters() if p not in parameters]
    assert len(new) == 1 and new[0] is model.h[1].attn.c_attn.parametrizations.weight[0].gamma
    assert optimizer.param_groups[1]["params"][-1] is new[0]  # in the group without weight decay
    model.h[1].attn = old
    assert torch.equal(model.eval()(*batch(5))[0], logits)


def test_layers_on_the_way_are_rescued_with_one_that_collapsed_and_never_alone():
    model, optimizer = collapsed(0, 1)
    assert [done.layer for done in rescue(model, optimizer, forward_of(model))] == ["h.0.attn", "h.1.attn"]
    for logit, layers in ((1e9, ["h.1.attn"]), (1e-9, ["h.0.attn", "h.1.attn"])):
        model, optimizer = collapsed(1)
        assert [done.layer for done in rescue(model, optimizer, forward_of(model), logit=logit)] == layers
    model, optimizer = collapsed()
    state = copy.deepcopy(model.state_dict())
    assert rescue(model, optimizer, forward_of(model), logit=1e-9) == []
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_the_run_goes_on_and_comes_back_and_folds():
    model, optimizer = collapsed(0, 1)
    rescue(model, optimizer, forward_of(model))
    gammas = [sigma.gamma.clone() for _, sigma in sigma_layers(model)]
    train(model, 20, optimizer=optimizer, first=2)
    assert min(entropies(model)) > 1
    assert not any(torch.equal(old, s.gamma) for old, (_, s) in zip(gammas, sigma_layers(model), strict=True))
    logits = model.eval()(*batch(5))[0]
    torch.testing.assert_close(fold(model)(*batch(5))[0], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("model_first", [False, True])
@pytest.mark.parametrize("grouping", ["ndim", "one"])
def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(tmp_path, grouping, model_first, others):
    """Two rescues, of a later layer and of an earlier one; with decay everywhere the first one makes a group.

    Where the model is brought into its shape before its optimizer is built, that has another order.
    """

    def adamw(model: nn.Module):
        return torch.optim.AdamW(groups(model) if grouping == "ndim" else model.parameters(), lr=1e-2)

    model = gpt(0)
    optimizer = adamw(model)
    for layer in ("h.1.attn", "h.0.attn"):
        rescue(model, optimizer, forward_of(model), layers=[layer], others=others)
        train(model, 2, optimizer=optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(model, 3, optimizer=optimizer, first=4)
    saved = torch.load(tmp_path / "checkpoint.pt")
    again = gpt(1)
    if model_first:
        reparametrise_named(again, reparametrised_in(saved["model"]))
    theirs = adamw(again)
    found = prepare_to_resume(again, theirs, saved["optimizer"])
    assert found[0] == "h.1.attn.c_attn" and sorted(found) == sorted(name for name, _ in sigma_layers(model))
    again.load_state_dict(saved["model"])
    theirs.load_state_dict(saved["optimizer"])
    train(again, 3, optimizer=theirs, first=4)
    for (name, ours), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, other), name


def test_a_layer_that_is_reparametrised_already_keeps_its_parameters():
    model, optimizer = collapsed(1)
    rescue(model, optimizer, forward_of(model))
    before = list(model.parameters())
    with torch.no_grad():
        model.h[1].attn.c_attn.parametrizations.weight[0].gamma[:2] = 60.0  # gamma has grown
    (done,) = rescue(model, optimizer, forward_of(model))
    assert done.layer == "h.1.attn" and done.queries == pytest.approx((60.0, LIMIT), rel=1e-2)
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


def test_a_clip_hears_nothing_of_a_rescue():
    """Else it would scale down what is bounded already, by the logits of before."""
    model = gpt()
    clip = QKClip(model, threshold=100.0)
    model(*batch(0))[1].backward()
    assert clip.step() == {}
    with torch.no_grad():
        model.h[1].attn.c_attn.weight[:64] *= 60
    rescue(model, torch.optim.AdamW(model.parameters()), forward_of(model), layers=["h.1.attn"])
    assert clip.step() == {}


def test_a_scheduler_learns_of_a_new_group():
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    rescue(model, optimizer, forward_of(model), layers=["h.0.attn"], scheduler=scheduler)
    train(model, 1, optimizer=optimizer)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-3]
    assert optimizer.param_groups[1]["weight_decay"] == 0 and len(optimizer.param_groups[1]["params"]) == 1


def test_beside_muon_gammas_are_the_other_optimizers():
    model = gpt()
    matrices = [p for p in model.h.parameters() if p.ndim == 2]
    muon = torch.optim.Muon(matrices, lr=1e-3)
    with pytest.raises(ValueError, match="optimizer = Muon: it takes no gammas"):
        rescue(model, muon, forward_of(model), layers=["h.0.attn"])
    adamw = torch.optim.AdamW([p for p in model.parameters() if p not in set(matrices)], lr=1e-2)
    optimizers = [muon, adamw]
    rescue(model, optimizers, forward_of(model), layers=["h.0.attn"])
    _, sigma = next(sigma_layers(model))
    before = sigma.gamma.clone()
    model(*batch(5))[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    assert adamw.param_groups[-1]["params"] == [sigma.gamma] and not torch.equal(sigma.gamma, before)
    again = gpt(1)
    theirs = [p for p in again.h.parameters() if p.ndim == 2]
    built = [
        torch.optim.Muon(theirs, lr=1e-3),
        torch.optim.AdamW([p for p in again.parameters() if p not in set(theirs)]),
    ]
    assert prepare_to_resume(again, built, [optimizer.state_dict() for optimizer in optimizers]) == ["h.0.attn.c_attn"]
    again.load_state_dict(model.state_dict())
    for ours, saved in zip(built, optimizers, strict=True):
        ours.load_state_dict(saved.state_dict())
    assert torch.equal(
        built[1].state[built[1].param_groups[-1]["params"][0]]["exp_avg"], adamw.state[sigma.gamma]["exp_avg"]
    )


def test_the_alarm_rescues_and_the_report_shows_it(tmp_path):
    model, optimizer = collapsed()
    acts = Rescue(model, optimizer, forward_of(model))
    with Monitor(model, every=1, optimizer=optimizer, path=tmp_path, on_alarm=acts) as monitor:
        for step in range(6):
            if step == 2:
                with torch.no_grad():
                    model.h[0].attn.c_attn.weight[:64] *= 60
            model(*batch(step))[1].backward()
            optimizer.step()
            monitor.step()
            optimizer.zero_grad()
    run = Run("run", *load(tmp_path))
    assert [record["step"] for record in run.records] == list(range(6))
    assert [(mark["step"], mark["layer"]) for mark in run.rescues] == [(2, "h.0.attn")]
    before, after = (run.records[i]["layers"]["h.0.attn"]["entropy"] for i in (2, 3))
    assert max(before) < min(after)
    assert report.main([str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert '<details id="rescues" open>' in page and "h.0.attn" in page


def test_a_monitor_rescues_what_it_heard_and_writes_it_down(tmp_path):
    model, optimizer = collapsed()
    monitor = Monitor(model, every=1, optimizer=optimizer, path=tmp_path)
    with pytest.raises(ValueError, match="after its first record"):
        monitor.rescue(forward_of(model))
    for step in range(2):
        if step == 1:
            with torch.no_grad():
                model.h[0].attn.c_attn.weight[:64] *= 60
        model(*batch(step))[1].backward()
        monitor.step()
    monitor.validated({"loss": 1.0})
    assert [done.layer for done in monitor.rescue(forward_of(model), fraction=1e-6)] == ["h.0.attn"]
    records, validations = load(tmp_path)
    assert [len(record.get("rescues", [])) for record in records] == [0, 1] and len(validations) == 1


def test_a_limit_that_is_too_large_is_halved_until_entropy_is_back():
    model, optimizer = collapsed(1)
    (done,) = rescue(model, optimizer, forward_of(model), limit=30.0)
    assert done.entropy[0] < 0.3 * done.uniform <= done.entropy[1]
    assert done.queries[0] > 30 and done.queries[1] in [pytest.approx(30 / 2**n, rel=1e-3) for n in range(1, 7)]
    model, optimizer = collapsed(1)
    assert rescue(model, optimizer, forward_of(model), limit=done.queries[1])[0].entropy == pytest.approx(done.entropy)


class Biased(nn.Module):
    """Attention that a bias of position alone makes sharp."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        place = torch.arange(x.shape[1])
        return self.attention(x, x, x, attn_mask=-60.0 * (place[:, None] - place).abs().float())[0]


def test_low_entropy_that_has_another_cause_is_not_bounded_away(caplog):
    model, x = Biased(), torch.randn(2, 8, 16)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    assert rescue(model, optimizer, lambda: model(x)) == []  # its logits are small
    (done,) = rescue(model, optimizer, lambda: model(x), layers=["attention"])
    assert done.entropy[1] < 0.1 and done.queries[1] == pytest.approx(min(LIMIT, done.queries[0]), rel=1e-3)
    assert "attention: its entropy stays low, and not for the size of its queries and keys" in caplog.text


def test_what_is_wrong_is_one_line():
    model, optimizer = collapsed(1)
    for error, settings in (
        ("layers = 'h.9.attn': no such attention was seen; there are h.0.attn, h.1.attn", {"layers": ["h.9.attn"]}),
        ("limit = -1: allowed are positive numbers", {"limit": -1}),
    ):
        with pytest.raises(ValueError, match=error):
            rescue(model, optimizer, forward_of(model), **settings)
    with pytest.raises(ValueError, match="no attention was seen"):
        rescue(model, optimizer, lambda: None)
    with pytest.raises(ValueError, match="it does not train the layers' queries and keys"):
        rescue(model, torch.optim.SGD(gpt().parameters(), 0.1), forward_of(model))
    with pytest.raises(TypeError, match="unexpected keyword argument 'fractoin'"):
        Rescue(model, optimizer, forward_of(model), fractoin=0.1)
    assert not list(sigma_layers(model))
    with torch.no_grad():
        model.wte.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"h\.0\.attn: its entropy is not a number"):
        Rescue(model, optimizer, forward_of(model))(Alarm(3, "h.0.attn", 0.0, 0.1, 2.0, 0.0))


def _trained(rank: int | None) -> dict[str, torch.Tensor]:
    """Two updates after a rescue, with half of each batch, or, without a rank, with the whole one."""
    model = gpt()
    for block in model.h:
        block.attn.dropout = block.mlp[-1].p = 0.0
    called = model if rank is None else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def part(step: int):
        return [x if rank is None else x[2 * rank : 2 * rank + 2] for x in batch(step)]

    if rank is not None:  # an error on one process is an error on both: the other would wait for it
        with pytest.raises(ValueError, match=r"layers = 'h\.9\.attn'"):
            rescue(called, optimizer, lambda: called(*part(5)), layers=["h.9.attn"] if rank == 1 else [])
    rescue(called, optimizer, lambda: called(*part(5)), layers=["h.1.attn"] if rank in (None, 0) else [], others=True)
    for step in range(2):
        called(*part(step))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=limit)
    torch.save(_trained(rank), f"{folder}/state{rank}")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_are_rescued_and_train_as_one(tmp_path):
    mp.start_processes(_worker, (str(tmp_path),), nprocs=2, start_method="forkserver")
    states = [torch.load(tmp_path / f"state{rank}") for rank in (0, 1)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    one = _trained(None)
    assert any("gamma" in name for name in one)
    torch.testing.assert_close(states[0], dict(one), rtol=1e-4, atol=1e-5)
