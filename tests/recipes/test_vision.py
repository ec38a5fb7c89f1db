"""The vision trainer: what it learns, resumes, shares and refuses; and the recipes' commands."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import tyro
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from recipes.command import keyword_arguments
from recipes.vision import corruptions, data, diverged, engine, grid, train
from recipes.vision.settings import read_settings
from stable_monitor.records import load
from tests.warm import WARM

RECIPES = Path(train.__file__).parent
TINY = "--data digits --model-kwargs patch_size=2 embed_dim=32 depth=2 num_heads=2"


def settings(output: Path, options: str = "") -> train.Settings:
    common = f"--output {output} {TINY} --model vit_small_patch16_224 --batch-size 64 --lr 3e-3 --epochs 2"
    return tyro.cli(train.Settings, args=shlex.split(f"{common} {options}"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def test_the_command_learns_the_digits(tmp_path, capsys):
    options = "--epochs 8 --weight-decay 0.05 --warmup-epochs 1 --monitor-every 20"
    options += " --model-kwargs patch_size=2 embed_dim=64 depth=2 num_heads=4"
    train.main(shlex.split(f"--output {tmp_path} {TINY} --model stablevit_small --batch-size 32 --lr 5e-3 {options}"))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["top1"] > 40  # chance is 10
    assert f"accuracy {rows[-1]['top1']:.2f} %" in capsys.readouterr().out
    records, validations = load(tmp_path)
    assert [record["step"] for record in records] == list(range(0, 8 * 44, 20))
    assert [line["validation"]["top1"] for line in validations] == pytest.approx(
        [row["top1"] for row in rows], rel=1e-5
    )

    # The accuracy of the exported weights, counted by hand.
    given = read_settings(train.Settings, tmp_path)
    digits = data.load("digits")
    model = engine.load_export(train.build(given, digits), tmp_path).eval()
    transform = data.test_transform(digits, train.image_settings(model))
    images = torch.stack([transform(digits.test[i][0]) for i in range(len(digits.test))])
    with torch.no_grad():
        right = model(images).argmax(1) == torch.tensor(digits.test.labels)
    assert 100 * right.double().mean().item() == pytest.approx(rows[-1]["top1"], abs=1e-4)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "model", [pytest.param("vit_small_patch16_224", marks=pytest.mark.slow), "sigma_vit_small_patch16_224"]
)
def test_an_interrupted_run_ends_as_the_uninterrupted_one(tmp_path, monkeypatch, model):
    options = f"--model {model} --epochs 3 --mixup 0.8 --cutmix 1 --auto-augment rand-m9-mstd0.5-inc1 --erasing 0.25"
    options += " --repeats 2 --drop-path 0.1 --ema-decay 0.9 --accumulation 2"
    whole = train.train(settings(tmp_path / "whole", options))
    criterion, updates = train.criterion, []

    def stopping(*args):
        loss_of = criterion(*args)

        def stop_in_the_second_epoch(model, batch):
            updates.append(1)
            if len(updates) == 70:
                raise Stop
            return loss_of(model, batch)

        return stop_in_the_second_epoch

    monkeypatch.setattr(train, "criterion", stopping)
    with pytest.raises(Stop):
        train.train(settings(tmp_path / "cut", options))
    monkeypatch.undo()
    (tmp_path / "cut" / "checkpoint-2.part").mkdir()  # what a kill leaves behind
    resumed = train.train(settings(tmp_path / "cut", options))
    timing = ("seconds", "images_per_second")
    for row in (*whole, *resumed):
        for name in timing:
            row.pop(name)
    assert resumed == whole and len(whole) == 3
    for name, x in weights(tmp_path / "whole").items():
        assert torch.equal(x, weights(tmp_path / "cut")[name]), name


def test_accumulated_batches_are_one_update(tmp_path):
    for times in (1, 4):
        train.train(settings(tmp_path / str(times), f"--epochs 1 --accumulation {times} --opt sgd --lr 0.1"))
    one, four = (weights(tmp_path / str(times)) for times in (1, 4))
    for name, x in one.items():
        torch.testing.assert_close(four[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # tests/engines/test_ddp.py has the models, and one process the trainer
def test_two_processes_are_one(tmp_path):
    options = f"{TINY} --model sigma_vit_small_patch16_224 --batch-size 64 --lr 0.1 --opt sgd --epochs 1"
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for name, command in (("one", []), ("two", launch)):
        module = [*command, "tests.recipes.unshifted"]
        flags = shlex.split(f"--output {tmp_path / name} {options}")
        subprocess.run([sys.executable, "-m", *module, *flags], check=True, capture_output=True, env=cpu_only())
    one, two = ([json.loads(line) for line in (tmp_path / name / "log.jsonl").open()][-1] for name in ("one", "two"))
    assert two["updates"] == one["updates"] == 22
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-4)
    for name, x in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], x, rtol=2e-3, atol=2e-4)


def cpu_only() -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def test_lars_adapts_without_weight_decay(tmp_path):
    """timm ties adaptation to weight decay, of which the paper has none: it would be plain SGD, at a hundred times its rate."""
    model = train.build(
        given := settings(tmp_path, "--opt lars --lr 2 --lr-base-size 32 --momentum 0"), data.load("digits")
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = engine.optimizer_for(given, model)
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        rate = 2 * 64 / 32
        if before[name].any() and p.grad.any():
            rate *= 0.001 * before[name].norm() / (p.grad.norm() + 1e-8)
        torch.testing.assert_close(p.detach(), before[name] - rate * p.grad, msg=name)


def test_schedules(tmp_path):
    """Learning rate and weight decay of every update, against the formulas."""
    seen = []
    options = "--epochs 4 --warmup-epochs 1 --weight-decay 0.1 --weight-decay-end 0.3"

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            seen.append((self.param_groups[1]["lr"], *(group["weight_decay"] for group in self.param_groups)))

    def run(options):
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "create_optimizer_v2", lambda groups, **kwargs: Spy(groups, lr=kwargs["lr"]))
            train.train(settings(tmp_path / str(len(options)), options))
        return np.array(seen).T

    rates, vectors, matrices = run(options)
    assert len(rates) == 88
    cosine = (1 + np.cos(np.pi * np.arange(88) / 88)) / 2
    np.testing.assert_allclose(rates[22:], 3e-3 * cosine[22:], rtol=1e-6)
    np.testing.assert_allclose(rates[:22], 3e-6 + (3e-3 - 3e-6) * np.arange(22) / 22, rtol=1e-6)
    np.testing.assert_allclose(matrices, 0.3 - 0.2 * cosine, rtol=1e-6)
    assert not vectors.any()
    rates, *_ = run("--epochs 3 --sched step --decay-epochs 2")
    np.testing.assert_allclose(rates, [3e-3] * 44 + [3e-4] * 22, rtol=1e-6)


def test_a_run_that_diverges_says_so(tmp_path):
    with pytest.raises(engine.Diverged, match=r"after \d+ updates"):
        train.train(settings(tmp_path, "--opt sgd --lr 1e20"))
    assert "the loss is nan" in json.loads((tmp_path / "log.jsonl").read_text())["stopped"]


def test_a_run_whose_entropy_collapses_is_stopped(tmp_path):
    with pytest.raises(engine.EntropyCollapse, match=r"entropy collapse in blocks\.\d\.attn"):
        train.train(settings(tmp_path, "--lr 0.3 --monitor-every 1 --on-alarm stop"))
    row = json.loads((tmp_path / "log.jsonl").read_text())
    assert "entropy collapse" in row["stopped"] and row["updates"] < 22 and "top1" not in row


def test_fine_tuning_begins_with_the_weights_of_a_run(tmp_path):
    """Other classes and image size: all but head and position embedding are those of the run, and so is the function."""
    first = settings(tmp_path, "--model sigma_vit_small_patch16_224 --epochs 1")
    train.train(first)
    again = settings(
        tmp_path / "b", f"--model sigma_vit_small_patch16_224 --weights {tmp_path}/model.safetensors --img-size 16"
    )
    digits = data.load("digits")
    model = train.build(again, data.Data(digits.train, digits.test, num_classes=3))
    before, after = engine.load_export(train.build(first, digits), tmp_path), model.eval()
    assert after.head.weight.shape == (3, 32) and after.pos_embed.shape[1] == 65
    with torch.no_grad():
        x = torch.randn(2, 65, 32)
        torch.testing.assert_close(after.blocks(x), before.eval().blocks(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--lr 0", "lr = 0.0: allowed are numbers above 0"),
        ("--model vit_tiny", "model = 'vit_tiny': allowed are timm.list_models"),
        ("--opt sgdd", "opt = 'sgdd': allowed are timm's"),
        ("--warmup-epochs 2", "warmup_epochs = 2.0: allowed are numbers from 0 to under epochs, 2"),
        ("--sched step", "decay_epochs = None: allowed are for sched = step"),
        ("--model-kwargs depth", "model_kwargs = 'depth': allowed are NAME=VALUE"),
        ("--model-kwargs deepness=2", "model_kwargs = deepness=2: .*deepness"),
        ("--batch-size 10000", "batch_size = 10000: allowed are at most the 1438 images"),
        ("--batch-size 63 --accumulation 2", "batch_size = 63: allowed are multiples of processes x accumulation, 2"),
        ("--data imagenet", "num_classes is missing: data 'imagenet' is none of digits"),
        ("--data torch/x --num-classes 9", "data_dir = None: it has to be the directory"),
        ("--weights nowhere", "weights = PosixPath.'nowhere'.: allowed are files"),
        ("--drop-path 1", "drop_path = 1.0: allowed are numbers from 0 to under 1"),
    ],
)
def test_bad_settings(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises((SystemExit, ValueError)) as error:  # tyro's, which has printed it, or ours
        train.train(settings(tmp_path, options))
    assert re.search(message, f"{capsys.readouterr().err} {error.value}")


def test_another_run_is_not_overwritten(tmp_path):
    train.train(settings(tmp_path, "--epochs 1"))
    with pytest.raises(ValueError, match=r"lr = 0.5: the run in .* has 0.003; take another output"):
        train.train(settings(tmp_path, "--epochs 1 --lr 0.5"))


def test_published_corruptions_are_read_as_they_are_published(tmp_path):
    """Files in CIFAR-C's layout of clean images, with the model's own answers for labels: it is right on all but noise."""
    digits = data.load("digits")
    rows = train.train(given := settings(tmp_path / "run", "--epochs 1"))
    model = engine.load_export(train.build(given, digits), tmp_path / "run").eval()
    transform = data.test_transform(digits, train.image_settings(model))
    images = digits.test.images
    with torch.no_grad():
        answers = model(torch.stack([transform(Image.fromarray(image)) for image in images])).argmax(1)
    published = tmp_path / "CIFAR-10-C"
    published.mkdir()
    index = np.arange(10_000) % len(images)
    clean = np.tile(images[index], (5, 1, 1, 1))
    for name in corruptions.NAMES:
        np.save(published / f"{name}.npy", clean)
    noise = clean.copy()
    noise[20_000:30_000] = np.random.default_rng(0).integers(0, 256, clean[20_000:30_000].shape)  # severity 3
    np.save(published / "fog.npy", noise)
    np.save(published / "labels.npy", np.tile(answers[index], 5))
    found = corruptions.evaluate(tmp_path / "run", corruptions.Settings(runs=(), cifar_c=published, images=len(images)))
    assert found.pop("clean") == pytest.approx(rows[-1]["top1"])
    assert found.pop("fog 3") < 95
    assert len(found) == 74 and set(found.values()) == {100}


def test_corruptions_made_here_hurt_more_the_more_severe(tmp_path):
    digits = data.load("digits")
    images = np.repeat(np.repeat(digits.test.images, 4, axis=1), 4, axis=2)
    arrays = data.Arrays(images, digits.test.labels)
    arrays.transform = np.asarray
    distances = []
    for severity in corruptions.SEVERITIES:
        corrupted = corruptions.Corrupted(arrays, "gaussian_noise", severity)
        assert (corrupted[7][0] == corrupted[7][0]).all() and corrupted[7][1] == digits.test.labels[7]
        distances.append(np.abs(corrupted[7][0].astype(float) - images[7]).mean())
    assert sorted(distances) == distances and len(set(distances)) == 5


def test_the_grid_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    digits = data.load("digits")
    packed = {}
    for part in ("train", "test"):
        arrays = getattr(digits, part)
        packed |= {f"x_{part}": np.repeat(np.repeat(arrays.images[:256], 4, 1), 4, 2), f"y_{part}": arrays.labels[:256]}
    np.savez(tmp_path / "cifar10.npz", **packed)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    command = shlex.split(f"--output {tmp_path / 'out'} --data-dir {tmp_path} --seeds 1 --models vit stable --jobs 2")
    command += shlex.split("--lrs 3e-3 --warmups 0 --depth 2")
    grid.main(command)
    log = (tmp_path / "out" / "log.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert {(line["model"], line["lr"]) for line in lines} == {("vit", 3e-3), ("stable", 3e-3)}
    assert all(
        math.isfinite(line["test_loss"]) and line["losses"][0] == pytest.approx(math.log(10), abs=1) for line in lines
    )
    assert (tmp_path / "out" / "grid.png").stat().st_size > 10_000

    def no_more(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(grid, "train", no_more)
    capsys.readouterr()
    grid.main(command)
    assert "ViT" in capsys.readouterr().out and (tmp_path / "out" / "log.jsonl").read_text() == log
    with pytest.raises(ValueError, match=r"depth = 9: .* holds runs with 2; give another --output"):
        grid.main([*command, "--depth", "9"])


def test_the_ablations_of_the_grid_change_one_part(tmp_path):
    """Without its parts StableViT is timm's ViT; each ablation puts one of them back."""

    def built(name: str) -> nn.Module:
        model = grid.MODELS[name]
        kwargs = keyword_arguments((*model.kwargs, "depth=2", "patch_size=8", "img_size=32"))
        torch.manual_seed(0)
        return timm.create_model(model.name, **kwargs)

    vit = built("vit")
    changed = {}
    for name in ("stable_init", "stable_norm", "stable_atten"):
        model = built(name)
        weights = all(torch.equal(a, b) for a, b in zip(vit.parameters(), model.parameters(), strict=False))
        norms = type(model.blocks[0].norm1) is not type(vit.blocks[0].norm1)
        attention = type(model.blocks[0].attn.q_norm) is not type(vit.blocks[0].attn.q_norm)
        changed[name] = (not weights and not norms and not attention, norms, attention)
    assert changed == {
        "stable_init": (True, False, False),
        "stable_norm": (False, True, False),
        "stable_atten": (False, False, True),
    }


# ------------------------------------------------------------------------------------------------- the shell recipes


def recipe(tmp_path: Path, command: str, **environment: str) -> list[train.Settings]:
    """The settings that a recipe trains with, as its dry run shows them."""
    (tmp_path / "train").mkdir(exist_ok=True)
    env = {
        **os.environ,
        **WARM,
        "DRY_RUN": "1",
        "DATA_DIR": str(tmp_path),
        "RUNS": str(tmp_path / "runs"),
        **environment,
    }
    name, *arguments = command.split()
    done = subprocess.run([RECIPES / name, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    return [tyro.cli(train.Settings, args=line[line.index("recipes.vision.train") + 1 :]) for line in commands]


@pytest.mark.parametrize(
    ("what", "ratio"),
    [
        ("heads {}", 2.0),  # the original Transformer's, which grow with sqrt(d1) [ST, Section 3.3.1]
        ("attention stable", 1.0),  # "not directly related to the hidden dimension" [ST, Section 3.3.2]
    ],
)
def test_logits_over_the_number_of_heads(tmp_path, monkeypatch, what, ratio):
    """Of a block in which keys are queries: a token's logit of itself, with 16 heads of 64 and with 4 of 256."""
    seen = []

    def spy(q, k, v, **kwargs):
        seen.append((q * k).sum(-1).mean().item() / math.sqrt(q.shape[-1]))
        return v

    for heads in (4, 16):
        (given,) = recipe(tmp_path, f"ablations.sh {what.format(heads)}", HEADS="" if "{" in what else str(heads))
        torch.manual_seed(0)
        kwargs = keyword_arguments((*given.model_kwargs, "depth=1", "img_size=32", "num_classes=2"))
        model = timm.create_model(given.model, **kwargs).eval()
        attention = model.blocks[0].attn
        assert attention.num_heads == heads and isinstance(model.norm, nn.LayerNorm) and not attention.qkv.bias.any()
        with torch.no_grad():
            torch.nn.init.normal_(attention.qkv.weight, generator=torch.Generator().manual_seed(0))
            attention.qkv.weight[1024:2048] = attention.qkv.weight[:1024]
            monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
            model(torch.randn(2, 3, 32, 32))
            monkeypatch.undo()
    few, many = seen
    assert few / many == pytest.approx(ratio, rel=1e-4)


def test_heads_go_with_attention_only(tmp_path):
    env = {**os.environ, **WARM, "DRY_RUN": "1", "HEADS": "8"}
    done = subprocess.run([RECIPES / "ablations.sh", "norm", "rmsnorm"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "ablations.sh: HEADS=8: allowed with attention only\n"


def test_an_alarm_does_not_end_a_run_of_the_grid(tmp_path, capsys):
    """At the rate of the alarm that ended a run above, and without the option that the grid's command does not have."""
    assert all(given.on_alarm == "warn" for given in recipe(tmp_path, "robustness_grid.sh vit"))
    train.train(settings(tmp_path / "collapsed", "--lr 0.3 --monitor-every 1 --epochs 1"))
    with pytest.raises(engine.Diverged):
        train.train(settings(tmp_path / "nan", "--opt sgd --lr 1e20"))
    capsys.readouterr()
    assert diverged.main([str(tmp_path / "collapsed"), str(tmp_path / "nan")]) == 0
    told = capsys.readouterr().out
    assert re.search(r"collapsed .* 1 .*update \d+, blocks\.\d\.attn", told) and re.search(r"nan .* NaN", told)
    assert "of 2 diverged" in told and "the alarm rang in 1" in told


def test_what_counts_as_divergence():
    """NaN, or accuracy lost, also by all of them; an alarm is beside it, and what has not ended counts for nothing."""

    def run(*accuracies: float, ended: bool = True, became_nan: bool = False, alarm: str = "-") -> diverged.Run:
        return diverged.Run("run", 300, ended, accuracies, became_nan, classes=1000, alarm=alarm)

    alarm = "update 100, blocks.0.attn"
    runs = [
        run(10, 81.0, alarm=alarm),
        run(10, 82.0),
        run(60, 3.0, alarm=alarm),
        run(60, became_nan=True),
        run(20, ended=False),
    ]
    assert diverged.verdicts(runs) == ["no", "no", "accuracy lost", "NaN", "-"]
    assert diverged.summary(runs) == (
        "2 of 4 diverged; top-1 of the others 81.50 ± 0.50 %; the alarm rang in 2; 1 have not ended"
    )
    assert diverged.verdicts([run(0.1), run(0.15)]) == ["accuracy lost"] * 2
    with pytest.raises(ValueError, match=r"runs = nowhere: allowed are directories of recipes.vision.train"):
        diverged.Settings((Path("nowhere"),))


def test_the_pages_heads_are_those_of_the_log():
    page = (RECIPES / "results" / "tables.md").read_text()
    runs = map(json.loads, (RECIPES / "results" / "small.jsonl").read_text().splitlines())
    rows = []
    for run in runs:
        kwargs = keyword_arguments(run["settings"]["model_kwargs"])
        name, top1 = (
            {"dot": "dot product", "stable": "StableAtten"}.get(kwargs.get("attention")),
            run["rows"][-1]["top1"],
        )
        if name:
            numbers = f"{top1:.1f} | {max(run['max_logit']):.0f} | {min(run['entropy']):.2f}"
            rows.append(f"| {name} | {kwargs['num_heads']} | {numbers} |\n")
        assert not run["alarms"] and f"{top1:.1f}" in page
    assert len(rows) >= 4 and all(row in page for row in rows)


SMALL_RECIPES = (
    *(f"imagenet1k.sh {v}" for v in ("deit_b", "sigma_deit_b", "mae_b", "sigma_b", "sn_b", "wn_b", "mae_l", "sigma_h")),
    "imagenet21k.sh pretrain",
    "stablevit.sh large vit_warmup",
    "ablations.sh init xavier",
    "cifar100.sh vit",
)


@pytest.mark.parametrize("command", SMALL_RECIPES)
def test_small_recipes_build_small_models(tmp_path, command):
    (given,) = recipe(tmp_path, command, SMALL="1")
    assert given.data in ("cifar10", "digits") and given.lr_base_size is None
    size = 32 if given.data == "cifar10" else given.img_size
    model = timm.create_model(given.model, img_size=size, **keyword_arguments(given.model_kwargs))
    assert sum(p.numel() for p in model.parameters()) < 1e6
    loss = nn.functional.cross_entropy(model(torch.randn(2, 3, size, size)), torch.tensor([0, 1]))
    assert loss.isfinite()


def test_a_dry_run_needs_neither_data_nor_weights(tmp_path):
    env = {**os.environ, **WARM, "DRY_RUN": "1", "DATA_DIR": "", "RUNS": str(tmp_path)}
    done = subprocess.run([RECIPES / "imagenet21k.sh", "finetune"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    weights = tmp_path / "vision" / "imagenet21k-pretrain-1" / "model.safetensors"
    assert words[words.index("--weights") + 1] == str(weights) and not any(tmp_path.iterdir())


@pytest.mark.slow
def test_small_imagenet21k_runs_from_end_to_end(tmp_path):
    """Both stages, as a user calls them, with less to do; the tests above have the script's settings and fine-tuning apart."""
    env = {**os.environ, **WARM, "SMALL": "1", "RUNS": str(tmp_path), "ACCELERATE_USE_CPU": "true"}
    early = subprocess.run([RECIPES / "imagenet21k.sh", "finetune"], env=env, capture_output=True, text=True)
    assert early.returncode == 1 and "run" in early.stderr and "pretrain 1 first" in early.stderr
    for stage in ("pretrain", "finetune"):
        command = [RECIPES / "imagenet21k.sh", stage, "1", "--epochs", "2", "--decay-epochs", "1"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "accuracy" in done.stdout
