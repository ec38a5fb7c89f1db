"""The bench for a GPU runs on a CPU with tiny models, finds what is wrong, and loses no section to another's failure."""

import json
import math
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

from benchmarks import families, gpu, gpu_checks, hf_translation, paired
from benchmarks.accelerator import graphed, trace
from benchmarks.paired import Report
from hf_stable import SigmaTransformerConfig, SigmaTransformerForConditionalGeneration
from nanogpt_patch.model import GPT, STOCK, GPTConfig
from stable_core import SigmaReparamConfig, sigma_reparam

CPU = torch.device("cpu")


WITHOUT_FAIRSEQ = """
import runpy, sys
sys.modules["fairseq"] = None
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow  # the tests after it have its parts: a section that dies, exit codes, every check
def test_sections_leave_every_number_on_disk_without_fairseq(tmp_path):
    sections = ["ceilings", "gpt_eager", "translation_6l", "monitor", "entropy", "graphs"]
    command = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--sections", *sections]
    done = subprocess.run([sys.executable, "-c", WITHOUT_FAIRSEQ, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert torch.__version__ in found["machine"]
    assert [row["state"] for row in found["rows"] if row["title"] == "sections"] == ["ok"] * len(sections)
    large = {row["name"]: row for row in found["rows"] if row["title"] == "GPT-2 124M, bf16, eager, 32 tokens"}
    assert len(large) == 8
    for row in large.values():
        assert len(row["values"]) == len(row["/ pre-LN"]) == 5
        assert row["launches"] > 100
        assert row["loss"] == pytest.approx(math.log(64), rel=0.2)  # that of random words
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.txt", "gpu.png"}
    assert "GPT-2 124M, bf16, eager, 32 tokens: pre-LN" in done.stdout.split("graphs: ok")[1]  # the summary


def test_a_section_that_dies_is_reported_and_the_others_go_on(monkeypatch, tmp_path):
    def broken(bench):
        raise KeyError("no such thing")

    def endless(bench):
        while True:
            time.sleep(0.01)

    sections = {"broken": broken, "fine": lambda bench: None, "endless": endless, "late": broken}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    monkeypatch.setattr(gpu, "TO_BEGIN", 0.5)
    monkeypatch.setattr(Report, "save", lambda self, out: None)
    left = iter([100.0, 100.0, 1.0, 0.0])  # seconds, at the start of each section
    monkeypatch.setattr(gpu.Bench, "left", lambda self: next(left))
    bench = gpu.Bench(Report("test", CPU), CPU, True, 0.0)
    states = {
        "broken": "KeyError: 'no such thing'",
        "fine": "ok",
        "endless": "TimeoutError: the minutes are over",
        "late": "no time left",
    }
    assert gpu.run(bench, sections, tmp_path) == states
    assert {row["name"]: row["state"] for row in bench.report.rows} == states


@pytest.mark.parametrize(("section", "code"), [("broken", 1), ("fine", 0)])
def test_the_exit_code_says_whether_a_section_failed(monkeypatch, tmp_path, section, code):
    sections = {"broken": lambda bench: bench.judge("title", [("a thing", 2.0, 1.0)]), "fine": lambda bench: None}
    monkeypatch.setattr(gpu, "SECTIONS", {section: sections[section]})
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--out", str(tmp_path / "new")])
    assert gpu.main() == code


def test_a_model_that_does_not_run_leaves_the_table_to_the_others():
    bench = gpu.Bench(Report("test", CPU), CPU, True, time.monotonic() + 60)
    family = gpu.gpt(bench)

    def unbuilt() -> nn.Module:
        raise RuntimeError("out of memory")

    family.variants["StableGPT"] = unbuilt
    with pytest.raises(RuntimeError, match=r"^StableGPT: RuntimeError: out of memory$"):
        gpu.compare(bench, "title", family, [8], 0.0, ["pre-LN", "StableGPT", "QK-norm + pre-LN"])
    assert [row["name"] for row in bench.report.rows] == ["pre-LN", "QK-norm + pre-LN"]


@pytest.mark.parametrize(("far", "wrong"), [(0.1, False), (0.3, True), (math.nan, True)])
def test_what_is_too_far_apart_fails(far, wrong):
    bench = gpu.Bench(Report("test", CPU), CPU, True, 0.0)
    if wrong:
        with pytest.raises(AssertionError, match="of a thing"):
            bench.judge("title", [("of a thing", far, 0.2)])
    else:
        bench.judge("title", [("of a thing", far, 0.2)])


def test_every_check_holds_on_the_cpu():
    assert [name for name, far, limit in gpu_checks.findings(CPU) if not far <= limit] == []


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (SigmaReparamConfig(stop_gradient=True), ["x: gradient of W", "x: u after 5 updates"]),
        (SigmaReparamConfig(n_power_iterations=3), ["x: u after 5 updates"]),
        (SigmaReparamConfig(kind="spectral", gamma_init="one"), None),
    ],
)
def test_a_layer_that_computes_something_else_is_found(monkeypatch, config, wrong):
    monkeypatch.setattr(gpu_checks, "sigma_reparam", partial(sigma_reparam, config=config))
    torch.manual_seed(0)
    check = gpu_checks.check_layer("x", nn.Linear(70, 80, bias=False), (32, 70), CPU, gpu_checks.FP32)
    if wrong is None:
        with pytest.raises(AttributeError):  # its gamma has no gradient at all
            list(check)
    else:
        assert [name for name, far, limit in check if not far <= limit] == wrong


@pytest.mark.parametrize(
    ("family", "registered"),
    [
        (
            lambda: families.vit("small", depth=1, embed_dim=32, num_heads=2),
            lambda: timm.create_model("sigma_vit_small_patch16_224_preln", depth=1, embed_dim=32, num_heads=2),
        ),
        (
            lambda: families.gpt(16, n_layer=1, n_head=2, n_embd=32, vocab_size=64),
            lambda: GPT(GPTConfig(16, 64, 1, 2, 32, **STOCK | {"reparam": "sigma"})),
        ),
        (
            lambda: hf_translation.translation(1, 32, 5, 64),
            lambda: SigmaTransformerForConditionalGeneration(
                SigmaTransformerConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, residual="pre-ln")
            ),
        ),
    ],
    ids=["timm", "nanogpt", "hf"],
)
def test_the_layers_reparametrised_are_those_of_the_registered_models(family, registered):
    ours, theirs = family().variants["σReparam + pre-LN"](), registered()
    names, truth = ([n for n, m in model.named_modules() if parametrize.is_parametrized(m)] for model in (ours, theirs))
    assert names == truth != []


def test_models_are_built_within_a_device_that_only_plain_layers_see():
    family = families.gpt(16, n_layer=1, n_head=2, n_embd=32, vocab_size=64).on(torch.device("meta"), ["pre-LN"])
    assert list(family.variants) == family.bases == ["pre-LN"]
    assert all(p.is_meta for p in family.variants["pre-LN"]().parameters())
    with torch.device("meta"):
        layer = families.reparametrised(nn.Linear(70, 80, device="cpu"))
    assert layer(torch.ones(1, 70)).isfinite().all()


def test_a_trace_counts_and_a_graph_of_the_cpu_is_the_work():
    x = torch.zeros(3)
    assert trace(lambda: [x.neg_() for _ in range(3)], CPU).launches == 3
    calls = []
    replay = graphed(lambda: calls.append(1), CPU, warm_up=3)
    replay()
    assert len(calls) == 4


def test_what_is_fast_is_called_more_often_within_a_round(monkeypatch):
    calls, clock = {"fast": 0, "slow": 0}, [0.0]
    monkeypatch.setattr(paired, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def work(name: str, taken: float) -> None:
        calls[name] += 1
        clock[0] += taken

    work_of = {name: partial(work, name, taken) for name, taken in (("fast", 0.01), ("slow", 0.05))}
    times = paired.interleave_within(work_of, 0.0, CPU, 0.045)
    assert calls == {"fast": 2 + 5 * 5, "slow": 2 + 5}
    assert times == {"fast": [pytest.approx(0.01)] * 5, "slow": [pytest.approx(0.05)] * 5}  # a call's, not a round's
