"""The benchmarks measure what they say: in turns, in ratios of the same round, models that compute the same."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from benchmarks import attention, scaling
from benchmarks.families import PlainAlgorithm1, Step, peers
from benchmarks.models import translation
from benchmarks.paired import Report, arguments, interleave, quartiles, ratios
from stable_core import SigmaReparamConfig, sigma_reparam

CPU = torch.device("cpu")


def test_every_round_takes_each_in_turn_and_the_warm_up_does_not_count():
    calls = []
    times = interleave({name: lambda name=name: calls.append(name) for name in "ab"}, 3, CPU, "", warm_up=2)
    assert calls == ["a", "b"] * 5
    assert [len(own) for own in times.values()] == [3, 3]


def test_ratios_are_of_the_same_round_and_reach_the_file(tmp_path):
    times = {"plain": [1.0, 2.0, 4.0, 8.0, 1.0], "σ": [2.0, 2.0, 6.0, 8.0, 1.1]}
    assert ratios(times, "plain")["σ"] == [2.0, 1.0, 1.5, 1.0, 1.1]
    assert quartiles([2.0, 1.0, 1.5, 1.0, 1.1]) == (1.0, 1.5)  # sorted 1.0 1.0 1.1 1.5 2.0
    report = Report("test", CPU)
    report.add("a title", times, ["plain"], "ms", 1000)
    report.save(tmp_path / "out")
    row = json.loads((tmp_path / "out.json").read_text())["rows"][1]
    assert row["/ plain"] == [2.0, 1.0, 1.5, 1.0, 1.1]
    assert row["values"] == [2000, 2000, 6000, 8000, 1100]
    text = (tmp_path / "out.txt").read_text()
    assert "1.100 (1.000 - 1.500)" in text
    assert torch.__version__ in text
    assert (tmp_path / "out.png").stat().st_size > 5000


def test_a_device_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        arguments("step_time", "What.", 1).parse_args(["--device", "tpu"])
    assert "'tpu': allowed are cpu" in capsys.readouterr().err


def test_the_plain_algorithm_does_the_same_work():
    """A W_hat apart by what one fresh v makes, though it advances before a forward pass where ours does after the step."""
    torch.manual_seed(0)
    ours, plain = nn.Linear(90, 80), nn.Linear(90, 80)
    plain.load_state_dict(ours.state_dict())
    sigma_reparam(ours, SigmaReparamConfig(gamma_init="one"))
    parametrize.register_parametrization(plain, "weight", PlainAlgorithm1(plain.weight))
    kept, slow = ours.parametrizations.weight[0], plain.parametrizations.weight[0]
    slow.u = kept.u.clone()
    slow.v = nn.functional.normalize(ours.parametrizations.weight.original.detach().T @ kept.u, dim=0)
    for model in (ours, plain):
        model.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for i in range(3):
        x = torch.randn(5, 90)
        plain.train(i > 0)
        for model in (ours, plain):
            y = model(x)
            model.optimizer.zero_grad()
            y.square().sum().backward()
            model.optimizer.step()
    torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-3, atol=1e-5)


def test_peers_are_on_the_layers_that_are_reparametrised():
    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(9, 8), nn.LayerNorm(8), nn.Linear(8, 7))

    def picked() -> nn.Module:
        return sigma_reparam(plain(), filter_fn=lambda _, name: name == "2")

    for build in peers(plain, picked, "plain").values():
        assert [n for n, m in build().named_modules() if parametrize.is_parametrized(m)] == ["2"]


def test_what_is_kept_for_backward_is_the_parameters_the_activations_and_w_hat():
    family = translation(1, 64)
    steps = {label: Step(family, label, 25, CPU) for label in ("post-LN", "σReparam + post-LN")}
    plain, ours = (scaling.kept_for_backward(step) for step in steps.values())
    layers = [m for m in steps["σReparam + post-LN"].model.modules() if parametrize.is_parametrized(m)]
    copies = sum(4 * layer.parametrizations.weight.original.numel() for layer in layers)
    assert copies <= ours - plain <= 1.05 * copies


def test_a_benchmark_runs_from_the_command_line(monkeypatch, capsys, tmp_path):
    command = ["attention", "--lengths", "17", "--batch", "1", "--rounds", "2", "--out", str(tmp_path / "attention")]
    monkeypatch.setattr(sys, "argv", command)
    attention.main()
    assert "StableAttention" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "attention.json").read_text())["rows"]) == 5


@pytest.mark.slow  # tests/stable_core/test_kernels.py holds each kernel against float64
def test_the_kernels_are_right_where_they_are_timed(tmp_path):
    """In a process of its own, as Triton is told when it is imported that there is an interpreter."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.kernels", "--tiny", "--rounds", "1", "--out", tmp_path / "out"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    errors = {row["name"]: row["values"][0] for row in rows if "float32: the kernels' largest errors" in row["title"]}
    assert set(errors) == {"u", "W_hat", "dW", "dgamma"}
    assert max(errors.values()) < 1e-5
