"""SimCLR: the loss against its formula, the four variants against Table 6, and the commands on a few digits."""

import json
import math
import os
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import tyro
from accelerate.utils import set_seed
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision import transforms

from recipes.simclr import pretrain, probe
from recipes.simclr.encoder import VARIANTS, encoder
from recipes.simclr.loss import contrastive
from recipes.simclr.online import OnlineProbe
from recipes.simclr.views import image_settings, random_view
from recipes.vision import data as vision_data
from recipes.vision.engine import load_export
from recipes.vision.settings import read_settings
from stable_monitor.records import load as monitored
from tests.recipes.two_processes import FEATURES, LABELS, nt_xent_of_half, projected

RECIPE = Path(__file__).parents[2] / "recipes" / "simclr"
WIDTH = {"patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY = (
    "--data digits --epochs 3 --batch-size 64 --warmup-epochs 1 --lr 1e-2 --lr-base-size 64 --hidden-dim 32 --crop-min 0.6 "
    "--model-kwargs patch_size=2 embed_dim=32 depth=2 num_heads=2"
).split()
PROBE = "--epochs 3 --batch-size 64 --no-augment".split()


def few_digits(*args):
    data = vision_data.load("digits")
    train = vision_data.Arrays(data.train.images[:256], data.train.labels[:256])
    return replace(data, train=train, test=vision_data.Arrays(data.test.images[:90], data.test.labels[:90]))


@pytest.fixture(autouse=True, scope="module")
def little_data():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "load", few_digits)
        patch.setattr(probe, "load", few_digits)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The directory of a finished run of each variant."""
    folder = tmp_path_factory.mktemp("runs")
    for variant in VARIANTS:
        assert pretrain.main(["--variant", variant, "--output", str(folder / variant), *TINY]) == 0
    return {variant: folder / variant for variant in VARIANTS}


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def start_of(run: Path) -> nn.Module:
    """The model that pretraining began with."""
    settings = read_settings(pretrain.Settings, run)
    set_seed(settings.seed)
    return pretrain.build(settings, few_digits())


# ------------------------------------------------------------------------------------------------------------- the loss


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Mean over all views i of -log(exp(s(i, j) / temperature) / sum over k != i of exp(s(i, k) / temperature))."""
    z = torch.cat((first, second))
    n, losses = len(first), []
    for i in range(2 * n):
        s = [torch.dot(z[i], z[k]) / (z[i].norm() * z[k].norm()) / temperature for k in range(2 * n)]
        others = [s[k].exp() for k in range(2 * n) if k != i]
        losses.append(-torch.log(s[(i + n) % (2 * n)].exp() / sum(others)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_is_nt_xent_in_full_precision(autocast):
    z = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = contrastive(0.1)(nn.Identity(), [z.unbind(), None])
    torch.testing.assert_close(loss, nt_xent(*z, 0.1), rtol=1e-5, atol=1e-6)


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    mp.start_processes(nt_xent_of_half, (str(tmp_path),), nprocs=2, start_method="forkserver")
    model, views = projected()
    loss = nt_xent(*model(views), 0.1)
    loss.backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, loss.detach())
    for part in parts:
        torch.testing.assert_close(part[1:], (model.weight.grad, model.bias.grad))

    norm, head = nn.BatchNorm1d(6, affine=False, momentum=None), nn.Linear(6, 3)  # None: the mean of all batches
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    adam = torch.optim.Adam(head.parameters(), lr=3e-3)
    for batch in FEATURES:
        adam.zero_grad()
        nn.functional.cross_entropy(head(norm(batch)), LABELS).backward()
        adam.step()
    for rank in range(2):
        learned = torch.load(tmp_path / f"probe-{rank}.pt")
        for name, x in {**norm.state_dict(prefix="norm."), **head.state_dict(prefix="head.")}.items():
            torch.testing.assert_close(learned[name], x)


# --------------------------------------------------------------------------------------------------------- the variants


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_table_6_says_of_a_variant(variant):
    vit = encoder(variant, 8, WIDTH)
    layers = [module for module in vit.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert len(layers) == 1 + 4 * WIDTH["depth"]
    assert [parametrize.is_parametrized(layer) for layer in layers] == [variant.startswith("sigma")] * len(layers)
    norms = sum(isinstance(module, nn.LayerNorm) for module in vit.modules())
    assert norms == (0 if variant == "sigma" else 2 * WIDTH["depth"] + 1)
    frozen = {name for name, p in vit.named_parameters() if not p.requires_grad}
    patcher = {"patch_embed.proj.weight", "patch_embed.proj.bias"} if variant == "frozen_patcher" else set()
    assert frozen == {"pos_embed", *patcher}
    model = pretrain.SimCLR(vit, 32)
    assert not any(map(parametrize.is_parametrized, model.head.modules()))


def test_positions_are_stacked_sines_and_cosines():
    vit = encoder("sigma", 12, {**WIDTH, "patch_size": 4})
    pos, quarter = vit.pos_embed[0], WIDTH["embed_dim"] // 4
    assert pos.shape == (1 + 9, WIDTH["embed_dim"]) and not pos[0].any()  # the class token's
    for row in range(3):
        for column in range(3):
            angles = [[at / 10000 ** (i / quarter) for i in range(quarter)] for at in (row, column)]
            expected = [wave(angle) for axis in angles for wave in (math.sin, math.cos) for angle in axis]
            torch.testing.assert_close(pos[1 + 3 * row + column], torch.tensor(expected))


def uniform(weight: Tensor, bound: float) -> None:
    """Of [-bound, bound]; of so many weights one is close to it."""
    assert 0.98 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_the_weights_are_moco_v3s_or_a_truncated_normal():
    width = {**WIDTH, "patch_size": 4, "embed_dim": 96}
    torch.manual_seed(0)
    vit = encoder("baseline", 8, width)
    uniform(vit.patch_embed.proj.weight, math.sqrt(6 / (3 * 4 * 4 + 96)))
    for block in vit.blocks:
        uniform(block.attn.qkv.weight, math.sqrt(6 / (96 + 96)))
        uniform(block.attn.proj.weight, math.sqrt(6 / (96 + 96)))
        uniform(block.mlp.fc1.weight, math.sqrt(6 / (96 + 4 * 96)))
        uniform(block.mlp.fc2.weight, math.sqrt(6 / (96 + 4 * 96)))
    for variant in ("sigma", "sigma_preln"):
        for module in encoder(variant, 8, width).modules():
            if isinstance(module, nn.Linear | nn.Conv2d):  # the spectral norm, and size of tokens, of .02 in ViT-B/16
                std = 0.02 * (16 / 4 if isinstance(module, nn.Conv2d) else math.sqrt(768 / 96))
                assert module.weight.std().item() == pytest.approx(std, rel=0.05)
                assert module.weight.abs().max() > 2.5 * std
    for module in vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert not module.bias.any()


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("variant", [pytest.param("baseline", marks=pytest.mark.slow), *list(VARIANTS)[1:]])
def test_training_moves_all_but_what_is_fixed(variant, runs):
    before, after = start_of(runs[variant]), load_file(runs[variant] / "model.safetensors")
    parameters = {}  # W_hat for a reparametrised weight
    for name, module in before.named_modules():
        for leaf in ("weight", "bias", "cls_token", "pos_embed"):
            if isinstance(getattr(module, leaf, None), Tensor):
                parameters[f"{name}.{leaf}"] = getattr(module, leaf)
    assert parameters.keys() == {name for name in after if "running" not in name and "batches" not in name}
    fixed = {"encoder.pos_embed"}
    if variant == "frozen_patcher":
        fixed |= {"encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"}
    assert {name for name, x in parameters.items() if torch.equal(x, after[name])} == fixed


@pytest.mark.parametrize(
    "variant",
    ["frozen_patcher", "sigma", *(pytest.param(v, marks=pytest.mark.slow) for v in ("baseline", "sigma_preln"))],
)
def test_training_lowers_the_loss(variant, tmp_path):
    """Of the same views of 64 images, before and after."""
    assert pretrain.main(["--variant", variant, "--output", str(tmp_path), *TINY, "--epochs", "12"]) == 0
    before = start_of(tmp_path)
    view = random_view(image_settings(before.encoder), False, 0.5, 0.6)
    torch.manual_seed(0)
    pairs = [torch.stack([view(Image.fromarray(image)) for image in few_digits().train.images[:64]]) for _ in range(2)]
    losses = []
    with torch.no_grad():
        for model in (before, load_export(start_of(tmp_path), tmp_path)):
            losses.append(contrastive(0.1)(model.train(), [pairs, None]).item())
    assert losses[1] < losses[0] - 0.3, losses


def test_the_cosine_begins_after_the_warmup(runs):
    peak, updates, warmup = 1e-2, 12, 4
    for row in rows(runs["sigma"]):
        update = row["updates"] - 1
        if update < warmup:
            expected = peak * (1 + 999 * update / warmup) / 1000
        else:
            expected = peak * (1 + math.cos(math.pi * (update - warmup) / (updates - warmup))) / 2
        assert row["lr"] == pytest.approx(expected)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, runs, monkeypatch):
    command = ["--variant", "sigma", "--output", str(tmp_path / "sigma"), *TINY]
    calls = []

    def interrupted(temperature):
        loss_of = contrastive(temperature)

        def count(model, batch):
            calls.append(1)
            if len(calls) == 7:  # in the second epoch
                raise KeyboardInterrupt
            return loss_of(model, batch)

        return count

    monkeypatch.setattr(pretrain, "contrastive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(command)
    assert len(rows(tmp_path / "sigma")) == 1
    assert pretrain.main(command) == 0
    assert len(calls) == 7 + 8
    resumed, whole = (load_file(run / "model.safetensors") for run in (tmp_path / "sigma", runs["sigma"]))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    for name in ("train_loss", "probe_top1"):
        resumed, whole = ([row[name] for row in rows(run)] for run in (tmp_path / "sigma", runs["sigma"]))
        assert resumed == whole


# ---------------------------------------------------------------------------------------------------------------- views


def paper_listing(size: int, strength: float, crop_scale: tuple[float, float]) -> transforms.Compose:
    """[σ, App. D.1] without its blur, which small images do not get."""
    return transforms.Compose([
        transforms.RandomResizedCrop(size, scale=crop_scale, interpolation=Image.BICUBIC),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.RandomApply([
            transforms.ColorJitter(
                brightness=0.8 * strength, contrast=0.8 * strength, saturation=0.8 * strength, hue=0.2 * strength
            ),
        ], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])  # fmt: skip


def noise(size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def images(size: int) -> dict:
    return image_settings(encoder("sigma", size, {**WIDTH, "patch_size": 8}))


def test_views_are_the_papers():
    ours, theirs = random_view(images(32), True, 0.5, 0.08), paper_listing(32, 0.5, (0.08, 1.0))
    image = noise(32)
    for seed in range(30):
        torch.manual_seed(seed)
        view = ours(image)
        torch.manual_seed(seed)
        assert torch.equal(view, theirs(image))


def test_digits_are_not_mirrored_and_other_images_half_the_time():
    half = np.zeros((32, 32, 3), dtype=np.uint8)
    half[:, 16:] = 255
    image = Image.fromarray(half)
    torch.manual_seed(0)
    for mirrored, expected in ((False, 0), (True, 100)):
        view = random_view(images(32), mirrored, 0.0, 1.0)
        rows = [view(image)[0].mean(0) for _ in range(200)]
        flipped = sum(bool(row[0] > row[-1]) for row in rows)
        assert abs(flipped - expected) <= 0.3 * expected
    assert not few_digits().mirrored


def test_large_images_are_blurred_half_the_time():
    """By how much neighbours differ in the views of noise: crops do not change it that much."""
    np.random.seed(0)
    torch.manual_seed(0)
    view = random_view(images(96), True, 0.0, 1.0)
    image = noise(96)
    differences = torch.tensor([view(image).diff(dim=2).abs().mean().item() for _ in range(200)])
    sharp = differences.max()
    blurred = (differences < 0.6 * sharp).sum().item()  # a sigma under 0.5 is not seen
    assert 50 <= blurred <= 110, differences


# ---------------------------------------------------------------------------------------------------------------- probe


def accuracy_by_hand(variant: str, encoder: dict[str, Tensor], probe: dict[str, Tensor]) -> float:
    """Percent, of exported weights in timm's own model."""
    norm = {"norm_layer": nn.Identity} if variant == "sigma" else {}
    vit = VisionTransformer(img_size=8, num_classes=0, **WIDTH, **norm).eval()
    vit.load_state_dict(
        {name.removeprefix("encoder."): x for name, x in encoder.items() if name.startswith("encoder.")}
    )
    test = few_digits().test
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = (torch.from_numpy(test.images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        features = vit.forward_features(x)[:, 0]  # the class token
    features = (features - probe["norm.running_mean"]) / (probe["norm.running_var"] + 1e-5).sqrt()
    right = (features @ probe["head.weight"].T + probe["head.bias"]).argmax(1) == torch.from_numpy(test.labels)
    return 100 * right.float().mean().item()


@pytest.mark.parametrize("variant", ["frozen_patcher", "sigma"])
def test_the_probe_beside_pretraining_reports_the_accuracy_of_its_weights(variant, runs):
    run = runs[variant]
    (checkpoint,) = run.glob("checkpoint-*")
    learned = torch.load(checkpoint / "custom_checkpoint_0.pkl")
    accuracy = accuracy_by_hand(variant, load_file(run / "model.safetensors"), learned)
    one_image = 100 / len(few_digits().test.labels)  # whose two best logits may differ by a rounding
    assert rows(run)[-1]["probe_top1"] == pytest.approx(accuracy, abs=one_image + 1e-4)
    validations = [(line["step"], line["validation"]["probe_top1"]) for line in monitored(run)[1]]
    assert validations == [(row["updates"], pytest.approx(row["probe_top1"], rel=1e-5)) for row in rows(run)]


def test_pretraining_is_bitwise_that_without_the_probe(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(OnlineProbe, "learn", lambda *_: None)
    monkeypatch.setattr(pretrain, "evaluator", lambda *_: lambda model: {"top1": 0.0})
    assert pretrain.main(["--variant", "sigma", "--output", str(tmp_path), *TINY]) == 0
    assert [row["train_loss"] for row in rows(tmp_path)] == [row["train_loss"] for row in rows(runs["sigma"])]
    without, with_it = (load_file(run / "model.safetensors") for run in (tmp_path, runs["sigma"]))
    assert without.keys() == with_it.keys() and all(torch.equal(without[name], with_it[name]) for name in without)


@pytest.mark.parametrize("variant", ["frozen_patcher", "sigma"])
def test_the_probe_reports_the_accuracy_of_an_unchanged_encoder(variant, runs, capsys):
    """The accuracy by hand, from the exported weights in timm's own model."""
    run = runs[variant]
    assert probe.main([str(run), "--output", str(run / "probe"), *PROBE]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (run, run / "probe"))
    for name, x in before.items():
        assert not name.startswith("encoder.") or torch.equal(x, after[name]), name

    top1 = accuracy_by_hand(variant, after, after)
    assert rows(run / "probe")[-1]["top1"] == pytest.approx(top1, abs=1e-4)
    assert f"probe of the pretrained encoder: {top1:.2f} %" in capsys.readouterr().out


def test_the_untrained_encoder_is_that_of_the_runs_first_update(runs, capsys):
    run = runs["sigma_preln"]
    assert probe.main([str(run), "--untrained", "--output", str(run / "untrained"), *PROBE, "--seed", "5"]) == 0
    probed = load_file(run / "untrained" / "model.safetensors")
    first = start_of(run).encoder
    torch.testing.assert_close(probed["encoder.blocks.1.mlp.fc1.weight"], first.blocks[1].mlp.fc1.weight.detach())
    assert torch.equal(probed["encoder.cls_token"], first.cls_token)
    assert "probe of the untrained encoder" in capsys.readouterr().out


def test_the_probed_encoder_stays_in_eval_mode():
    vit = encoder("baseline", 8, {**WIDTH, "proj_drop_rate": 0.5})
    model = probe.Probe(vit, 10).train()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert model.norm.training and torch.equal(model.encoder(x), model.encoder(x))
    model(x).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}


# --------------------------------------------------------------------------------------------------------- the commands


def script(folder: Path, *args, env: dict) -> subprocess.CompletedProcess:
    """run.sh showing its commands; with a python that knows of no GPU, beside no .venv, which would come first on the path."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text("#!/bin/sh\necho 0\n")
    (folder / "bin" / "python").chmod(0o755)
    (folder / "home" / "recipes").mkdir(parents=True)
    (folder / "home" / "recipes" / "simclr").symlink_to(RECIPE)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "SMALL": "0", "DRY_RUN": "1", "RUNS": "runs", "PATH": path, **env}
    command = ["bash", str(folder / "home" / "recipes" / "simclr" / "run.sh"), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def commands(done: subprocess.CompletedProcess) -> list[list[str]]:
    """The arguments of each command that run.sh runs, after its module."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line)[3:] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("epochs, warmup", [("300", "40"), ("100", "10")])
def test_the_full_run_is_table_6_or_appendix_d_2(epochs, warmup, tmp_path):
    (tmp_path / "train").mkdir()
    env = {"DATA_DIR": str(tmp_path)} | ({"EPOCHS": epochs, "WARMUP": warmup} if warmup == "10" else {})
    first, second = commands(script(tmp_path, "sigma_preln", "3", "--color-strength", "1", env=env))
    settings, probing = tyro.cli(pretrain.Settings, args=first), tyro.cli(probe.Settings, args=second)
    output = Path(f"runs/simclr/sigma_preln-{epochs}-{warmup}-3")
    assert settings == pretrain.Settings(
        output=output, variant="sigma_preln", seed=3, epochs=int(epochs), warmup_epochs=float(warmup), color_strength=1.0,
        data_dir=tmp_path, workers=10, precision="bf16", grad_checkpointing=True,
    )  # fmt: skip
    assert probing == probe.Settings(run=output, output=output / "probe", seed=3, workers=10, precision="bf16")


def test_the_small_run_with_few_digits(tmp_path, capsys):
    small = commands(script(tmp_path, "sigma", env={"SMALL": "1", "EPOCHS": "2", "WARMUP": "1", "RUNS": str(tmp_path)}))
    assert len(small) == 3 and pretrain.main(small[0]) == 0
    for arguments in small[1:]:
        assert probe.main([*arguments, "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert "probe of the pretrained encoder" in out and "probe of the untrained encoder" in out


@pytest.mark.parametrize(
    "args, env, message",
    [
        ([], {}, "VARIANT = : allowed are baseline, frozen_patcher, sigma, sigma_preln"),
        (["sigma", "one"], {}, "SEED = one: allowed are whole numbers"),
        (
            ["sigma"],
            {"DATA_DIR": "nowhere", "DRY_RUN": "0"},
            "DATA_DIR=nowhere: it has to hold train/ and val/, a folder for each class",
        ),
        (["sigma"], {"SMALL": "yes"}, "SMALL = yes: allowed are 0, 1"),
    ],
)
def test_mistakes_in_the_script_get_one_line(args, env, message, tmp_path):
    done = script(tmp_path, *args, env=env)
    assert done.returncode == 1 and done.stderr == f"run.sh: {message}\n"


@pytest.mark.parametrize(
    "args, message",
    [
        ("--temperature 0", "temperature = 0.0: allowed are numbers above 0"),
        ("--accumulation 2", "accumulation = 2: allowed are 1: negatives come from one batch"),
        ("--crop-min 1.5", "crop_min = 1.5: allowed are numbers above 0, up to 1"),
        ("--warmup-epochs 3", "warmup_epochs = 3.0: allowed are numbers from 0 to under epochs, 3"),
        ("--variant moco", "invalid choice 'moco'"),
    ],
)
def test_a_bad_setting_is_told(args, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        pretrain.main([*TINY, "--variant", "sigma", "--output", str(tmp_path / "run"), *args.split()])
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stopped.value.code == 2 and message in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "module, args, message",
    [
        ("pretrain", [*TINY, "--variant", "sigma", "--model-kwargs", "embed_dim=30"], "pretrain: model_kwargs = {"),
        (
            "pretrain",
            [*TINY, "--variant", "sigma", "--batch-size", "2000"],
            "pretrain: batch_size = 2000: allowed are at most",
        ),
        (
            "probe",
            ["nowhere"],
            "probe: run = nowhere: allowed are directories of finished runs of recipes.simclr.pretrain",
        ),
        (
            "probe",
            ["other"],
            "probe: run = other: allowed are directories of finished runs of recipes.simclr.pretrain",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_what_cannot_be_done_is_told_in_a_line(module, args, message, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").touch()
    (tmp_path / "other" / "settings.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, "--output", "run", *args])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"recipes.simclr.{module}", run_name="__main__")
    assert stopped.value.code.startswith(message) and "\n" not in stopped.value.code
