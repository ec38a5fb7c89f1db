"""What a record says of time and of learning rates, and that old files without it are read."""

import json

import pytest
import torch

from stable_monitor import Alarm, Monitor, clock, monitor
from stable_monitor.columns import Columns
from stable_monitor.records import Records, parsed
from stable_monitor.report import report
from tests.stable_monitor.models import batch, gpt
from tests.stable_monitor.test_report import record, write

LAYERS = {"h.0.attn": "decoder"}


class HandTurned:
    """A clock that goes only where a test has it go."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(clock, "perf_counter", lambda: self.now)

    def takes(self, seconds, function):
        def slow(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return slow


def test_throughput_and_the_monitors_part_of_the_time(monkeypatch):
    """Two updates of 10 s between records; 1 s for each of two layers, and 3 s for a writer."""
    hand, records = HandTurned(monkeypatch), []
    monkeypatch.setattr(monitor, "by_head", hand.takes(1.0, monitor.by_head))
    model = gpt()
    watching = Monitor(model, 2, writers=[hand.takes(3.0, records.append)])
    for step in range(5):
        _, loss = model(*batch(step))
        loss.backward()
        hand.now += 10.0
        watching.step(loss)
    assert [(r["updates_per_second"], r["overhead"]) for r in records] == [
        (None, None),
        (pytest.approx(2 / 25, rel=1e-5), pytest.approx(5 / 25, rel=1e-5)),
        (pytest.approx(2 / 25, rel=1e-5), pytest.approx(5 / 25, rel=1e-5)),
    ]


def test_what_an_alarm_sets_off_is_not_the_monitors(monkeypatch):
    hand, records = HandTurned(monkeypatch), []
    model = gpt()
    watching = Monitor(model, 1, writers=[records.append], on_alarm=hand.takes(60.0, lambda alarm: None))
    alarms = [Alarm(0, "h.0.attn", 0.1, 0.3, 1.0, 0.0)]
    monkeypatch.setattr(watching._watch, "look", lambda record: alarms if record["step"] == 0 else [])
    for step in range(2):
        _, loss = model(*batch(step))
        loss.backward()
        hand.now += 20.0
        watching.step(loss)
    assert records[0]["alarms"] and records[1]["overhead"] == 0
    assert records[1]["updates_per_second"] == pytest.approx(1 / 80, rel=1e-5)


def test_rates_of_all_groups_are_those_of_the_update():
    def rates(*factors, schedule_first=False):
        model = gpt()
        halves = list(model.h[0].parameters()), list(model.h[1].parameters())
        optimizers = [torch.optim.SGD(own, 0.5 * factor) for own, factor in zip(halves, factors, strict=True)]
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
        monitor = Monitor(model, 1, optimizer=optimizers)
        found = []
        for step in range(2):
            _, loss = model(*batch(step))
            loss.backward()
            if schedule_first:
                monitor.read_gradients()
            _ = [optimizer.step() for optimizer in optimizers]
            before = monitor.step(loss) if not schedule_first else None
            _ = [scheduler.step() for scheduler in schedulers]
            found.append(before or monitor.step(loss))
        return [(r["lr"], r.get("lrs")) for r in found]

    assert rates(1, 1) == [(0.5, None), (0.25, None)]
    assert rates(1, 3) == rates(1, 3, schedule_first=True) == [(0.5, [0.5, 1.5]), (0.25, [0.25, 0.75])]


def test_the_page_says_how_fast_a_run_goes(tmp_path):
    """Half and a quarter of a second for an update: 2 in 0.75 s; the monitor has half and a quarter of that."""
    pace = [{}, {"updates_per_second": 2.0, "overhead": 0.5}, {"updates_per_second": 4.0, "overhead": 0.25}]
    new = write(tmp_path / "new", [record(step, LAYERS, **own) for step, own in enumerate(pace)])
    old = write(tmp_path / "old", [record(step, LAYERS) for step in range(3)])
    report([new, old], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "2.67 updates/s; the monitor takes 41.7 % of the time" in page and page.count("updates/s") == 1


@pytest.mark.parametrize("changes", [{"lrs": "fast"}, {"lrs": ["fast", 1.0]}, {"overhead": "much"}])
def test_a_line_with_something_else_is_no_record(tmp_path, changes):
    good, wrong = ({**record(step, LAYERS), "nonfinite": []} for step in range(2))
    for layer in (good["layers"]["h.0.attn"], wrong["layers"]["h.0.attn"]):
        layer["lag"] = {}  # as the monitor writes it, which is read in another way
    wrong |= changes
    assert parsed(json.dumps(good).encode()) == good and parsed(json.dumps(wrong).encode()) is None
    read = list(Records(write(tmp_path, [good, wrong])))
    assert read == [good]
    columns = Columns([0])
    columns.add(read[0])
    assert columns.pace is None
