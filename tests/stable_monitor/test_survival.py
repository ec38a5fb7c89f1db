"""What the monitor is for: runs that become NaN, disks that are full, and training that is interrupted or gives odd numbers."""

import json
import logging
import os
import resource
import shutil
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from stable_monitor import Monitor, TensorBoardWriter, attention_temperature
from stable_monitor.records import FILE_NAME, read
from stable_monitor.report import main
from tests.stable_monitor.models import batch, gpt, train


def poison(model, step: int, name: str, value: float = torch.nan):
    """A monitor of every update that writes a number into a weight before an update."""

    class Poisoning(Monitor):
        def step(self, loss=None, lr=None):
            record = super().step(loss, lr)
            if self.updates == step:
                with torch.no_grad():
                    model.get_parameter(name)[0, 0] = value
            return record

    return lambda called, optimizer: Poisoning(called, 1, optimizer=optimizer, path=model.folder)


def run_with(folder, step: int, name: str = "h.1.attn.c_attn.weight", value: float = torch.nan):
    model = gpt()
    model.folder = folder
    if step == 0:
        with torch.no_grad():
            model.get_parameter(name)[0, 0] = value
    train(model, 5, poison(model, step, name, value))
    return folder


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, torch.nan),
        pytest.param(0, torch.inf, marks=pytest.mark.slow),
        (3, torch.inf),
        pytest.param(3, torch.nan, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_not_a_number_has_a_report_and_an_alarm_that_says_so(tmp_path, caplog, step, value):
    run, sound = run_with(tmp_path / "lost", step, value=value), tmp_path / "sound"
    train(gpt(), 5, lambda called, optimizer: Monitor(called, 2, optimizer=optimizer, path=sound))
    alarms = [(r["step"], a["layer"], a["entropy"]) for r in read(run) for a in r["alarms"]]
    assert (max(step, 1), "h.1.attn", None) in alarms  # the first record has no past
    assert f"update {max(step, 1)}: entropy collapse in h.1.attn: not a number" in caplog.text
    out = tmp_path / "report.html"
    for runs in ([run], [run, sound], [sound, run]):
        assert main([*map(str, runs), "-o", str(out)]) == 0
        page = out.read_text()
        assert "<td>not a number</td>" in page and ": not a number" in page
    if step:
        assert 'id="lost/not%20a%20number/decoder"' in page


def test_tensorboard_is_told_of_an_alarm_that_is_not_a_number(tmp_path):
    alarm = {"layer": "a", "entropy": None, "threshold": None, "reference": None, "bound": None}
    record = {"step": 1, "loss": None, "lr": None, "grad_l2": None, "grad_linf": None, "layers": {}, "alarms": [alarm]}
    TensorBoardWriter(tmp_path)(record)
    assert b"a: not a number" in next(tmp_path.iterdir()).read_bytes()


LAYER = '{"a": {"kind": "encoder", "keys": 4.0, "entropy": [1.0], "bound": [0.0]}}'
FOREIGN = [
    "",
    "   ",
    "# a note",
    "{",
    "3",
    "null",
    "[" * 100_000,
    "\x00\x00",
    '{"epoch": 3, "loss": 1.0}',
    '{"step": "7", "layers": {}, "alarms": []}',
    '{"step": -1, "layers": {}, "alarms": []}',
    '{"step": 1e400, "layers": {}, "alarms": []}',
    '{"step": 7, "layers": [], "alarms": []}',
    '{"step": 7, "layers": {"a": 3}, "alarms": []}',
    '{"step": 7, "layers": {"a": {"entropy": [1.0]}}, "alarms": []}',
    '{"step": 7, "layers": {"a": {"kind": "encoder", "entropy": "high"}}, "alarms": []}',
    '{"step": 7, "layers": {"a": {"kind": "encoder", "entropy": ["1.0"]}}, "alarms": []}',
    '{"step": 7, "layers": {"a": {"kind": "encoder", "sigma": {"q": "x"}}}, "alarms": []}',
    '{"step": 7, "layers": {}, "alarms": 5}',
    '{"step": 7, "layers": {}, "alarms": [{"layer": 3}]}',
    '{"step": 7, "layers": {}, "alarms": [{"layer": "a", "entropy": "low"}]}',
    '{"step": 7, "loss": "2.0", "layers": {}, "alarms": []}',
    '{"step": 7, "loss": 1e999, "layers": {}, "alarms": []}',
]


def reported(folder, lines: list[str], capsys, end: str = "\n") -> tuple[str, str]:
    """What the command says of a run with these lines, and its page."""
    (folder / FILE_NAME).write_text("\n".join(lines) + end)
    out = folder / "report.html"
    assert main([str(folder), "-o", str(out)]) == 0
    return capsys.readouterr().err, out.read_text()


def sound(step: int, loss: float = 2.0) -> str:
    return f'{{"step": {step}, "loss": {loss}, "layers": {LAYER}, "alarms": []}}'


@pytest.mark.parametrize("line", FOREIGN, ids=[line[:40] for line in FOREIGN])
def test_a_line_that_is_no_record_is_named_and_left_out(tmp_path, capsys, caplog, line):
    _, page = reported(tmp_path, [sound(5), line, sound(9)], capsys)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", f"{tmp_path / FILE_NAME}, line 2: not a record of the monitor; left out")
    ]
    assert "<td>2</td><td>5 to 9</td>" in page


def test_many_such_lines_are_one_warning(tmp_path, capsys, caplog):
    reported(tmp_path, ["x"] * 9 + [sound(1)] + ["y"], capsys)
    assert len(caplog.records) == 1 and "lines 1, 2, 3, 4, 5, ...: not a record" in caplog.text


def test_what_was_cut_short_at_the_end_is_left_out_in_silence(tmp_path, capsys, caplog):
    _, page = reported(tmp_path, [sound(1), sound(2)[:30]], capsys, end="")
    assert not caplog.records and "<td>1 to 1</td>" in page


def test_not_a_number_as_python_writes_it_and_old_records_are_read(tmp_path, capsys, caplog):
    lines = [sound(1), sound(2).replace("2.0", "NaN"), sound(3).replace("[1.0]", "[-Infinity]")]
    lines.append('{"step": 4, "layers": {"a": {"kind": "encoder"}}, "alarms": [{"layer": "a"}]}')
    _, page = reported(tmp_path, lines, capsys)
    assert not caplog.records and "<td>2 at 3, none since</td>" in page


# ------------------------------------------------------------------------------------------------ where records go


def warnings_of(caplog, path) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and str(path) in r.getMessage()]


def go_on(monitor, model, steps: int = 3) -> None:
    for step in range(steps):
        _, loss = model(*batch(step))
        loss.backward()
        assert monitor.step(loss)["loss"] == pytest.approx(loss.item(), rel=1e-5)
        model.zero_grad()


@pytest.mark.parametrize("how", ["a file is there", "a folder is there", "read-only", "full device"])
def test_a_path_that_cannot_be_written_is_one_warning(tmp_path, caplog, monkeypatch, how):
    model, path = gpt(), tmp_path / "run"
    if how == "a file is there":
        path.write_text("mine")
    elif how == "a folder is there":
        (path / FILE_NAME).mkdir(parents=True)
    elif how == "read-only":

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr("pathlib.Path.mkdir", refuse)  # root may write where others may not
    else:
        path.mkdir()
        (path / FILE_NAME).symlink_to("/dev/full")
    monitor = Monitor(model, 1, path=path)
    go_on(monitor, model)
    monitor.close()
    assert len(warnings_of(caplog, path)) == 1
    if how == "a file is there":
        assert path.read_text() == "mine"


def test_a_folder_that_is_deleted_is_one_warning_and_is_not_made_again(tmp_path, caplog):
    model = gpt()
    monitor = Monitor(model, 1, path=tmp_path / "run")
    go_on(monitor, model, 1)
    shutil.rmtree(tmp_path / "run")
    go_on(monitor, model)
    monitor.close()
    assert len(warnings_of(caplog, tmp_path)) == 1 and list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_for_a_while_keeps_whole_lines(tmp_path, caplog):
    model = gpt()
    with Monitor(model, 1, path=tmp_path) as monitor:
        go_on(monitor, model, 2)
        size = (tmp_path / FILE_NAME).stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
        try:
            go_on(monitor, model, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / FILE_NAME).stat().st_size == size
        go_on(monitor, model, 1)
    assert [record["step"] for record in read(tmp_path)] == [0, 1, 4]
    assert len(warnings_of(caplog, tmp_path)) == 1 and os.listdir(tmp_path) == [FILE_NAME]


# --------------------------------------------------------------------------------------------------- interruptions


class Stop(BaseException):
    """As Ctrl-C: no Exception."""


def interrupt(model, error, where: str = "h.1.mlp"):
    """A hook that breaks the forward pass off there."""

    def stop(*_):
        raise error

    return model.get_submodule(where).register_forward_pre_hook(stop)


def hooks(model) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), GeneratorExit(), Stop(), ValueError()], ids=repr)
@pytest.mark.parametrize("where", ["h.0.attn.c_attn", "h.1.mlp"])
@pytest.mark.parametrize("settings", [{}, {"flash": False}, {"checkpoint": True}], ids=str)
def test_nothing_stays_after_a_forward_pass_that_is_broken_off(error, where, settings):
    model, other = gpt(**settings), gpt(**settings)
    monitor, expected = Monitor(model, 1), Monitor(other, 1)
    handle = interrupt(model, error, where)
    with pytest.raises(type(error)):
        model(*batch(9))
    error.__traceback__ = None  # in torch before 2.14 it keeps the hooks of a checkpoint that is broken off
    handle.remove()
    assert _get_current_function_mode_stack() == []
    assert hooks(model) == 1  # which waits for training
    model.eval()(*batch(9))
    for watched in (model.train(), other):
        torch.manual_seed(1)
        watched(*batch(0))[1].backward()
    got = monitor.step()["layers"]
    for name, layer in expected.step()["layers"].items():
        assert got[name]["entropy"] == layer["entropy"]
    monitor.close()
    assert hooks(model) == 0 and model._compiled_call_impl is None


@pytest.mark.parametrize("again", ["forward", "backward"])
def test_ctrl_c_in_activations_that_are_computed_again(again):
    """The next forward pass is as ever, and so is a backward pass that is tried again."""
    model, plain = gpt(checkpoint=True), gpt(checkpoint=True)
    with attention_temperature(model, 0.5), attention_temperature(plain, 0.5):
        torch.manual_seed(0)
        _, loss = model(*batch(1))
        handle = interrupt(model, KeyboardInterrupt(), "h.0.mlp")
        with pytest.raises(KeyboardInterrupt):
            loss.backward(retain_graph=True)
        handle.remove()
        model.zero_grad()
        losses = []
        if again == "backward":
            loss.backward()
            torch.manual_seed(0)
            plain(*batch(1))[1].backward()
            assert torch.equal(model.wte.weight.grad, plain.wte.weight.grad)
            return
        for one in (model, plain):
            torch.manual_seed(0)
            losses.append(one(*batch(1))[1])
            losses[-1].backward()
    assert losses[0] == losses[1] and torch.equal(model.wte.weight.grad, plain.wte.weight.grad)
    assert _get_current_function_mode_stack() == [] and hooks(model) == 0


def test_an_interrupt_in_a_thread_leaves_that_thread_free():
    model, left = gpt(), []
    monitor = Monitor(model, 1)
    handle = interrupt(model, Stop())

    def work():
        try:
            model(*batch(0))
        except Stop:
            left.extend(_get_current_function_mode_stack())
            left.append(hooks(model))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    handle.remove()
    assert left == [1 + 1]  # the waiting one, and the one that interrupts
    model(*batch(0))
    assert len(monitor.step()["layers"]) == 2


def test_a_loop_in_a_generator_that_is_given_up():
    model = gpt()

    def loop():
        with Monitor(model, 1) as monitor, attention_temperature(model):
            for step in range(9):
                _, loss = model(*batch(step))
                loss.backward()
                yield monitor.step(loss)

    records = loop()
    assert next(records)["step"] == 0
    records.close()
    assert hooks(model) == 0 and _get_current_function_mode_stack() == []


@pytest.mark.parametrize("first", [0, 1])
def test_two_who_listen_let_go_in_any_order(first):
    model = gpt()
    one, two = Monitor(model, 1), Monitor(model, 1)
    handle = interrupt(model, Stop())
    with pytest.raises(Stop):
        model(*batch(0))
    handle.remove()
    model(*batch(0))
    assert one.step()["layers"] == two.step()["layers"]
    for monitor in (one, two) if first == 0 else (two, one):
        monitor.close()
    assert model._compiled_call_impl is None and hooks(model) == 0


def test_a_model_that_catches_the_interrupt_itself_goes_on_being_seen():
    class Retrying(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.tries = gpt(), 0

        def forward(self, *args):
            try:
                return self.inner(*args)
            except Stop:
                return self.inner(*args)

    model = Retrying()
    once = [True]

    def stop(*_):
        if once:
            once.pop()
            raise Stop

    model.inner.h[1].mlp.register_forward_pre_hook(stop)
    monitor = Monitor(model, 1)
    model(*batch(0))[1].backward()
    assert list(monitor.step()["layers"]) == ["inner.h.0.attn", "inner.h.1.attn"]
    assert _get_current_function_mode_stack() == []


def test_a_watched_model_is_compiled_and_replicated_as_ever():
    model, expected = gpt(), gpt()
    Monitor(model, 1)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled.eval()(*batch(0))[0], expected.eval()(*batch(0))[0])
    replica = model._replicate_for_data_parallel()  # which has no weights of its own yet
    seen = []
    replica.forward = lambda *args: seen.append(args)
    replica(1, 2)
    assert seen == [(1, 2)]


# ------------------------------------------------------------------------------------------------------ odd numbers


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (2, 2.0), (2.5, 2.5), (None, None), (np.float32(2.5), 2.5), (np.array([2.5]), 2.5), (torch.tensor(2.5), 2.5),
        (torch.tensor([[2.5]]), 2.5), (torch.tensor(2), 2.0), (torch.tensor(2.5, dtype=torch.bfloat16), 2.5),
        (float("nan"), None), (torch.tensor(torch.inf), None),
    ],
    ids=repr,
)  # fmt: skip
def test_a_loss_of_one_number(loss, expected, caplog):
    model = gpt()
    monitor = Monitor(model, 1)
    model(*batch(0))[1].backward()
    assert monitor.step(loss, lr=loss)["loss"] == expected and "not recorded" not in caplog.text


@pytest.mark.parametrize(
    "loss", [torch.ones(2), torch.ones(0), np.ones(2), 1j, torch.tensor(1j), "2.0", [2.0], {"loss": 2.0}, object(), 10**400],
    ids=lambda x: repr(x)[:20],
)  # fmt: skip
def test_a_loss_of_no_number_is_null_and_one_warning(loss, caplog):
    model = gpt()
    monitor = Monitor(model, 1)
    for step in range(2):
        model(*batch(step))[1].backward()
        record = monitor.step(loss)
        assert record["loss"] is None and len(record["layers"]) == 2
    (message,) = [r.getMessage() for r in caplog.records]
    assert message.startswith("loss not recorded: ") and "\n" not in message
    json.dumps(record, allow_nan=False)


def test_the_learning_rate_of_several_optimizers_and_of_tensors():
    model = gpt()
    adam = torch.optim.AdamW(model.wte.parameters(), lr=torch.tensor(0.25), capturable=False)
    sgd = torch.optim.SGD(model.wpe.parameters(), lr=0.5)
    for optimizer, expected in (
        (adam, 0.25), (sgd, 0.5), ([adam, sgd], 0.25), ((sgd, adam), 0.5), ({"a": adam, "b": sgd}, 0.25)
    ):  # fmt: skip
        with Monitor(model, 1, optimizer=optimizer) as monitor:
            _, loss = model(*batch(0))
            loss.backward()
            assert monitor.step(loss)["lr"] == expected
    adam.param_groups[0]["lr"] = "fast"
    with Monitor(model, 1, optimizer=adam) as monitor:
        assert monitor.step(1.0)["lr"] is None


def test_the_models_own_loss_of_two_elements_is_none():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return {"loss": F.relu(self.attention(x, x, x)[0]).sum((1, 2))}

    model = Model()
    monitor = Monitor(model, 1)
    model(torch.randn(2, 3, 8))["loss"].sum().backward()
    assert monitor.step()["loss"] is None
