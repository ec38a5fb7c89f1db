"""The alarm: on made-up records, and on a model whose attention is made to collapse."""

import pytest
import torch
from torch import nn

from stable_core import entropy_lower_bound
from stable_monitor import Alarm, AlarmConfig, EntropyCollapse, Monitor, lower_learning_rate, stop_training
from stable_monitor.alarm import Watch
from tests.stable_monitor.models import gpt, train


def alarms(entropies, bound=0.0, logit=1000.0, fraction=0.1, **config) -> list[int]:
    """The steps at which a layer raises an alarm; its heads have these entropies, one for all or one for each."""
    watch = Watch(AlarmConfig(fraction, **config))
    heads = (x if isinstance(x, list) else [x] * 4 for x in entropies)
    layers = [{"entropy": x, "bound": [bound] * 4, "max_logit": [1.0, logit, 2.0, None]} for x in heads]
    return [step for step, layer in enumerate(layers) if watch.look({"step": step, "layers": {"a": layer}})]


def test_it_rings_once_for_each_fall_below_a_part_of_the_past():
    assert alarms([4.0, 3.9, 4.1, 0.41]) == []
    assert alarms([4.0, 3.9, 4.1, 0.38, 0.1, 0.1]) == [3]
    assert alarms([4.0, 0.3, 4.0, 0.3]) == [1, 3]
    assert alarms([4.0, *[0.41, 0.39] * 9]) == [2]  # it hovers
    assert alarms([4.0, 0.39, 0.79, 0.39, 0.81, 0.39]) == [1, 5]  # recovered above twice the threshold
    assert alarms([4.0, 1.9, 2.9, 1.9, 3.1, 1.9], fraction=0.5) == [1, 5]  # or half-way, where that is lower
    assert alarms([4.0, 3.0, 2.0, 1.2, 0.8, 0.5]) == []  # slow learning is no collapse
    assert alarms([4.0, 3.0, 2.2, 1.5, 1.0, 0.7, 0.5, 0.35, 0.2]) == [7]  # but to go to a tenth is,
    assert alarms([4.0 * 0.93**n for n in range(300)]) == [32]  # however slowly
    assert alarms([1.0, 4.0, 4.0, 4.0, 0.39]) == [4]  # a tenth of the highest, not of the first
    assert alarms([1.0, 1.0, 1.0, 40.0, 1.0]) == []  # and not of a single record,
    assert alarms([4.0, *[1.0] * 100, 0.39]) == [101]  # but for the first: an untrained model attends evenly
    assert alarms([4.0, 1.9], fraction=0.5) == [1]
    assert alarms([4.0, 3.7], fraction=0.9) == []
    assert alarms([4.0, 0.3], logit=49.0) == [] and alarms([4.0, 0.3], logit=51.0) == [1]  # sharp at small logits
    assert alarms([4.0, 0.3, 4.0, 0.3], patience=2) == [3]


def test_half_of_the_heads_are_enough_and_nan_is_a_collapse():
    assert alarms([4.0, [4.0, 4.0, 0.0, 4.0]]) == []
    assert alarms([4.0, [4.0, 0.0, 0.0, 4.0]]) == [1]
    assert alarms([4.0, None, None]) == [1]
    assert alarms([4.0, [4.0, None, 4.0, 4.0]]) == [1]  # one such head is the whole model in the next layer
    assert alarms([None, 4.0, 3.9]) == []
    assert alarms([4.0, 0.1], bound=None) == [1]


def test_what_never_was_a_number_rings_too_and_what_had_no_keys_does_not():
    assert alarms([None, None, None]) == [1]  # once there is a record before it
    assert alarms([None, None, 4.0, None]) == [1, 3]
    assert alarms([None] * 4, patience=3) == [3]
    watch, empty = Watch(AlarmConfig()), {"keys": None, "entropy": [None], "bound": [None]}
    assert [watch.look({"step": step, "layers": {"a": empty}}) for step in range(3)] == [[], [], []]


def test_an_alarm_says_what_is_not_a_number():
    watch = Watch(AlarmConfig())
    layers = [{"a": {"entropy": [x], "bound": [0.0]}, "b": {"entropy": [None], "bound": [None]}} for x in (2.5, None)]
    (a, b) = (alarm for step, layer in enumerate(layers) for alarm in watch.look({"step": step, "layers": layer}))
    assert str(a) == "update 1: entropy collapse in a: not a number (its highest median before: 2.5)"
    assert str(b) == "update 1: entropy collapse in b: not a number"


def collapse_at(step: int, model, layer: int = 1):
    """A monitor of every update that sharpens one layer's attention before an update, as a run going wrong would."""

    class Sharpening(Monitor):
        def step(self, loss=None, lr=None):
            record = super().step(loss, lr)
            if self.updates == step:
                with torch.no_grad():
                    model.h[layer].attn.c_attn.weight[:64] *= 60
            return record

    return Sharpening


def test_a_warning_names_the_layer_that_collapses(caplog):
    model, records = gpt(), []
    train(model, 5, lambda called, _: collapse_at(3, model)(called, 1, writers=[records.append]))
    assert [len(record["alarms"]) for record in records] == [0, 0, 0, 1, 0]
    alarm, layer = records[3]["alarms"][0], records[3]["layers"]["h.1.attn"]
    assert alarm["layer"] == "h.1.attn"
    assert alarm["entropy"] == sorted(layer["entropy"])[1]  # the lower median of four heads
    assert alarm["entropy"] < alarm["threshold"] < alarm["reference"]
    assert alarm["bound"] <= entropy_lower_bound(0.0, 16)
    assert "update 3: entropy collapse in h.1.attn" in caplog.text and "h.0.attn" not in caplog.text


def test_a_callback_stops_the_run(tmp_path):
    model, losses = gpt(), []
    make = collapse_at(2, model)
    with pytest.raises(EntropyCollapse, match=r"update 2: entropy collapse in h\.1\.attn") as caught:
        losses += train(model, 5, lambda called, _: make(called, 1, path=tmp_path, on_alarm=stop_training))
    assert caught.value.alarm.step == 2
    assert (tmp_path / "monitor.jsonl").read_text().count('"layer": "h.1.attn"') == 1


def test_a_callback_lowers_the_learning_rate_under_a_scheduler():
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    rates = []

    def monitor(called, optimizer):
        lower = lower_learning_rate(optimizer, 0.1, scheduler)
        made = collapse_at(2, model)(called, 1, on_alarm=lower)
        scheduled = made.step

        def step(loss):
            scheduled(loss)
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])

        made.step = step
        return made

    train(model, 4, monitor, optimizer)
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005])


def test_history_is_taken_up_again_when_a_run_is_resumed(tmp_path):
    model = gpt()
    train(model, 3, lambda called, _: Monitor(called, 1, path=tmp_path))
    with torch.no_grad():
        model.h[0].attn.c_attn.weight[:64] *= 60
    records = []
    train(model, 1, lambda called, _: Monitor(called, 1, path=tmp_path, step=3, writers=[records.append]), first=3)
    assert [alarm["layer"] for alarm in records[0]["alarms"]] == ["h.0.attn"]


def test_several_optimizers_are_lowered_once_each_and_keep_their_tensors():
    layers = [nn.Linear(1, 1) for _ in range(4)]
    shared = torch.tensor(0.5)  # as torch gives it to each group
    adam = torch.optim.Adam([{"params": x.parameters()} for x in layers[:2]], lr=shared)
    sgd = torch.optim.SGD(layers[2].parameters(), lr=0.2)
    cycle = torch.optim.SGD(layers[3].parameters(), lr=0.1)
    twin = torch.optim.SGD(layers[3].parameters(), lr=0.1)
    alarm = Alarm(3, "a", 0.0, 0.1, 1.0, 0.0)
    for optimizers in ([adam, sgd], (adam, sgd), {"adam": adam, "sgd": sgd}):
        lower = lower_learning_rate(optimizers)
        before = shared.item(), sgd.param_groups[0]["lr"]
        lower(alarm), lower(alarm)  # two layers of one update
        assert all(group["lr"] is shared for group in adam.param_groups)
        assert (shared.item(), sgd.param_groups[0]["lr"]) == pytest.approx((before[0] / 2, before[1] / 2))

    scheduler, plain = (torch.optim.lr_scheduler.OneCycleLR(x, 0.4, total_steps=9) for x in (cycle, twin))
    lower_learning_rate(cycle, 0.25, scheduler)(alarm)
    for _ in range(6):
        cycle.step(), twin.step(), scheduler.step(), plain.step()
        assert cycle.param_groups[0]["lr"] == pytest.approx(twin.param_groups[0]["lr"] / 4)


def test_schedulers_made_of_others_are_lowered():
    lr = torch.optim.lr_scheduler
    rates = []
    for lowered in (False, True):
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
        parts = [lr.LambdaLR(optimizer, lambda step: 1 / (step + 1)), lr.LambdaLR(optimizer, lambda step: 0.5**step)]
        scheduler = lr.SequentialLR(optimizer, parts, milestones=[3])
        lower = lower_learning_rate(optimizer, 0.1, scheduler)
        rates.append([])
        for step in range(6):
            optimizer.step()
            if lowered and step == 1:
                lower(Alarm(1, "a", 0.0, 0.1, 1.0, 0.0))
            scheduler.step()
            rates[-1].append(optimizer.param_groups[0]["lr"])
    assert rates[1][1:] == pytest.approx([rate / 10 for rate in rates[0][1:]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AlarmConfig(fraction=1.5), "fraction = 1.5: allowed are numbers between 0 and 1"),
        (lambda: AlarmConfig(patience=0.5), "patience = 0.5: allowed are whole numbers from 1"),
        (lambda: lower_learning_rate(sgd(), 2.0), "factor = 2.0: allowed are"),
        (lambda: lower_learning_rate([]), "optimizer = []: allowed are an optimizer, or several"),
        (lambda: lower_learning_rate(nn.Linear(1, 1)), "optimizer = Linear.*: allowed are an optimizer, or several"),
        (lambda: lower_learning_rate(sgd(), 0.5, "cosine"), "scheduler = 'cosine': allowed are None and torch's"),
        (lambda: lower_learning_rate(sgd(), "half"), "factor = 'half': allowed are numbers between 0 and 1"),
        (lambda: Monitor(nn.Linear(1, 1), alarm="stop"), "alarm = 'stop': allowed are None and an AlarmConfig"),
        (lambda: Monitor(nn.Linear(1, 1), on_alarm="stop"), "on_alarm = 'stop': allowed are None and functions"),
        (lambda: Monitor(nn.Linear(1, 1), writers="wandb"), "writers = 'wandb': allowed are functions of a record"),
        (lambda: Monitor(nn.Linear(1, 1), writers=print), "writers = .*: allowed are functions of a record, in a list"),
        (lambda: Monitor("gpt2"), "model = 'gpt2': allowed are torch modules"),
        (lambda: Monitor(nn.Linear(1, 1), path=3), "path = 3: allowed are None, a directory and a .jsonl file"),
        (
            lambda: Monitor(nn.Linear(1, 1), optimizer="adam"),
            "optimizer = 'adam': allowed are an optimizer, or several",
        ),
        (lambda: Monitor(nn.Linear(1, 1), optimizer={}), "optimizer = {}: allowed are an optimizer, or several"),
        (
            lambda: Monitor(nn.Linear(1, 1), optimizer=[sgd(), 3]),
            "optimizer = list: allowed are an optimizer, or several",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message.replace("[]", r"\[\]").replace("{}", r"\{\}")) as error:
        make()
    assert "\n" not in str(error.value)


def sgd():
    return torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)


def resumed(history, record, **config):
    """The alarms of a resumed run's first record."""
    watch = Watch(AlarmConfig(0.3, **config))
    for step, (entropy, rescues) in enumerate(history):
        layer = {"entropy": [entropy], "max_logit": [1000.0], "keys": 64}
        watch.look({"step": step, "layers": {"a": layer}, "rescues": [{"layer": "a"}] * rescues})
    watch.resume()
    layer = {"entropy": [record], "max_logit": [1000.0], "keys": 64}
    found = watch.look({"step": 9, "layers": {"a": layer}})
    assert watch.look({"step": 10, "layers": {"a": layer}}) == [] and (watch.collapsed == {"a"}) == (record < 1.0)
    return found


def test_what_had_collapsed_before_a_run_was_resumed_is_told_again_but_not_if_it_was_rescued():
    (alarm,) = resumed([(4.0, 0), (0.5, 0)], 0.5)
    assert alarm.again and "update 9: entropy had collapsed before the run was resumed in a: 0.5 nats" in str(alarm)
    assert resumed([(4.0, 0), (0.5, 1)], 0.5) == [] and resumed([(4.0, 0), (0.5, 1), (0.5, 0)], 0.5) == []
    (alarm,) = resumed([(4.0, 0), (0.5, 1), (4.0, 0), (0.5, 0)], 0.5)  # it fell once more
    assert alarm.again
    assert resumed([(4.0, 0), (0.5, 0)], 3.9) == []  # it is back
    (alarm,) = resumed([(4.0, 0)], 0.5)
    assert not alarm.again  # it falls now
    (alarm,) = resumed([], 0.5)  # elsewhere, without the records: against log(64) = 4.16
    assert alarm.again and alarm.reference == pytest.approx(4.159, abs=1e-3)
    assert resumed([], 1.3) == []


def test_what_was_declined_after_a_blow_up_is_not_told_again():
    """Else a resumed run would rescue what the uninterrupted one leaves alone, once the loss has come back."""
    watch = Watch(AlarmConfig(0.3))
    for step, (loss, entropy) in enumerate(
        [(2.0, 4.0), (9.0, 4.0), (9.0, 4.0), (9.0, 0.5), (1.0, 0.5), *[(1.0, 0.5)] * 5]
    ):
        layer = {"entropy": [entropy], "max_logit": [1000.0], "keys": 64}
        alarms = watch.look({"step": step, "loss": loss, "layers": {"a": layer}})
        assert [alarm.blowup for alarm in alarms] == [True] * (step == 3)
    watch.resume()
    assert watch.look({"step": 20, "loss": 1.0, "layers": {"a": layer}}) == []


def test_what_had_collapsed_does_not_stop_a_resumed_run_and_is_no_alarm_of_its(tmp_path):
    model, records = gpt(), []
    with torch.no_grad():
        model.h[0].attn.c_attn.weight[:64] *= 60

    def monitor(called, _):
        return Monitor(called, 1, path=tmp_path, step=3, on_alarm=stop_training, writers=[records.append])

    train(model, 2, monitor, first=3)
    assert [record["alarms"] for record in records] == [[], []]
    raised = []
    train(model, 1, lambda called, _: Monitor(called, 1, step=3, on_alarm=raised.append), first=3)
    assert [(alarm.layer, alarm.again) for alarm in raised] == [("h.0.attn", True)]
