"""recipes/vision/fine_tune: its command, small, and its table against the log."""

import json
import statistics
from pathlib import Path

import pytest
from timm.optim import create_optimizer_v2

from recipes.vision import fine_tune
from stable_core import sigma_layers, sigma_reparam

RESULTS = Path(fine_tune.__file__).parent / "results"
SMALL = "--data digits --pretraining 2 --updates 2 --images 20 --lrs 1e-3 --layer-decays 0.8 --seeds 1".split()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_interrupted_command_goes_on(tmp_path, monkeypatch, capsys):
    call = ["--output", str(tmp_path), *SMALL, "--heads", "new", "tiny", "kept"]
    real, done = fine_tune.fine_tune, []

    def interrupted(run, *arguments):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(run)
        return real(run, *arguments)

    monkeypatch.setattr(fine_tune, "fine_tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fine_tune.main(call)
    first = (tmp_path / "log.jsonl").read_text()
    (kept,) = tmp_path.glob("*.pt")
    when = kept.stat().st_mtime_ns
    monkeypatch.undo()
    assert fine_tune.main(call) == 0 and kept.stat().st_mtime_ns == when
    log = (tmp_path / "log.jsonl").read_text()
    lines = read(tmp_path / "log.jsonl")
    assert log.startswith(first) and len(first.splitlines()) == 1
    assert [(line["head"], line["variant"]) for line in lines] == [
        (head, variant) for head in ("new", "tiny", "kept") for variant in ("plain", "sigma")
    ]
    assert all(line["losses"][0] == pytest.approx(lines[0]["losses"][0], abs=1e-3) for line in lines[:2])
    assert [len(line["gamma"]) for line in lines] == [0, 2] * 3
    assert fine_tune.main(call) == 0 and (tmp_path / "log.jsonl").read_text() == log
    assert "tiny head" in capsys.readouterr().out


def test_no_layer_changes_its_rate_or_decay_by_sigma_reparam():
    """timm's layer decay is by a layer's name; gamma has that of its layer, and no weight decay."""
    settings = fine_tune.Settings(data="digits")
    found = []
    for reparametrised in (False, True):
        model = fine_tune.build(settings)
        if reparametrised:
            sigma_reparam(model)
        optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.8)
        of = {id(p): (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        found.append({name: of[id(p)] for name, p in model.named_parameters()})
    plain, sigma = found
    for layer, _ in sigma_layers(model):
        scale, decay = plain.pop(f"{layer}.weight")
        assert sigma.pop(f"{layer}.parametrizations.weight.original") == (scale, decay)
        assert sigma.pop(f"{layer}.parametrizations.weight.0.gamma") == (scale, 0.0)
    assert sigma == plain


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"opt": "pray"}, "opt = 'pray': allowed are timm's"),
        ({"lrs": (1e-3, 0.0)}, r"lrs = \(0.001, 0.0\): allowed are positive numbers"),
        ({"images": 0}, "images = 0: allowed are positive numbers"),
    ],
)
def test_wrong_settings_are_named(settings, error):
    with pytest.raises(ValueError, match=error):
        fine_tune.Settings(**settings)


def test_the_table_is_that_of_the_log():
    lines = read(RESULTS / "fine_tune.jsonl")
    columns = fine_tune.table(lines).columns
    header, rows = [column.header for column in columns], list(zip(*(column.cells for column in columns), strict=True))
    setting = {"variant": "sigma", "opt": "sgd", "head": "kept", "layer_decay": 0.8}
    own = [line for line in lines if setting.items() <= line.items()]
    (row,) = (row for row in rows if row[0] == "σReparam, kept head, sgd")
    best = 0.0
    for lr in {line["lr"] for line in own}:
        seeds = [line["top1"] for line in own if line["lr"] == lr]
        assert len(seeds) == 3 and row[header.index(f"{lr:g}")] == f"{sum(seeds) / 3:.1f}"
        best = max(best, statistics.mean(seeds))
    assert statistics.mean(map(float, row[-1].split(" / "))) == pytest.approx(best, abs=0.1)


def test_by_sgd_gamma_of_a_kept_head_passes_zero_in_the_log_and_nowhere_else():
    lines = [line for line in read(RESULTS / "fine_tune.jsonl") if line["variant"] == "sigma"]
    through = {(line["opt"], line["head"]) for line in lines if min(line["gamma"]) < 0}
    assert through == {("sgd", "kept")}
