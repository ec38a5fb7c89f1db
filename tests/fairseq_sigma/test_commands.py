"""fairseq's commands on the plugin's models: each feature against the run that did without it."""

import random
import re
import subprocess
import sys

import pytest
import torch
from fairseq import checkpoint_utils, optim
from omegaconf import OmegaConf
from torch import nn

from fairseq_sigma import average, export
from stable_core import fold, fold_state_dict, sigma_reparam
from stable_core.sigma_reparam import SigmaReparam
from tests.stable_core.models import count_advances
from tests.warm import PYTHON

from .conftest import USER_DIR, call

SIGMA = "sigma_transformer_6l"


def same(a: dict, b: dict, **tolerance) -> None:
    assert a["model"].keys() == b["model"].keys()
    for key, value in a["model"].items():
        if tolerance:
            torch.testing.assert_close(b["model"][key], value, **tolerance, msg=lambda m, key=key: f"{key}: {m}")
        else:
            assert torch.equal(b["model"][key], value), key


def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(train):
    straight = train("straight", SIGMA, 6)
    train("resumed", SIGMA, 3)
    same(straight, train("resumed", SIGMA, 6))


@pytest.mark.parametrize("flags", [(), ("--norm", "stable", "--attention", "stable")], ids=["sigma", "stable"])
def test_activation_checkpointing_is_the_run_without(train, flags):
    """To rounding: fairseq's, with stock models too, adds up the encoder output's gradients in another order."""
    plain, checkpointed = (
        train(name, SIGMA, 4, *flags, *more) for name, more in (("a", ()), ("b", ["--checkpoint-activations"]))
    )
    same(plain, checkpointed, rtol=1e-4, atol=1e-4)


def test_gradient_accumulation_is_the_run_with_the_whole_batch(train):
    whole = train("whole", SIGMA, 4, "--batch-size", 64)
    parts = train("parts", SIGMA, 4, "--batch-size", 16, "--update-freq", 4)
    same(whole, parts, rtol=2e-3, atol=2e-4)


def test_batch_buckets_are_the_run_without(train):
    """All batches of an epoch in one update: buckets change what is together in a batch, and padding."""
    whole = train("whole", SIGMA, 1, "--update-freq", 100)
    buckets = train("buckets", SIGMA, 1, "--update-freq", 100, "--num-batch-buckets", 3, "--max-tokens", 70)
    same(whole, buckets, rtol=2e-3, atol=2e-4)


def running_sigmas(state: dict) -> list[tuple[float, float]]:
    """(|W^T u| / |u|, the largest singular value of W) for every reparametrised layer of a checkpoint."""
    found = []
    for key, W in state.items():
        if key.endswith("original"):
            u = state[key.replace("original", "0.u")]
            found.append(((W.T @ u / u.norm()).norm().item(), torch.linalg.svdvals(W)[0].item()))
    return found


FP16 = ("--fp16", "--fp16-no-flatten-grads")


@pytest.mark.parametrize(
    "optimizer, lr, flags",
    [  # those that fairseq wrote itself, one of torch's, one of timm's; then what stands between them and the model
        ("adam", 0.03, ("--use-old-adam",)),
        pytest.param("adamax", 0.03, (), marks=pytest.mark.slow),
        ("adafactor", 0.05, ()),
        pytest.param("nag", 0.3, (), marks=pytest.mark.slow),
        ("sgd", 1, ("--update-freq", 2)),
        ("lars", 50, ()),
        ("adam", 0.03, FP16),
        pytest.param("nag", 0.3, ("--bf16",), marks=pytest.mark.slow),
        pytest.param("adam", 0.03, ("--memory-efficient-fp16",), marks=pytest.mark.slow),
        pytest.param("adam", 0.03, ("--encoder-layerdrop", 0.5), marks=pytest.mark.slow),
    ],
)
def test_u_follows_every_optimizer(train, optimizer, lr, flags):
    """An epoch at a high rate, then updates that hardly change a weight: u has arrived at its top singular vector."""
    initial = train("initial", SIGMA, 1, "--optimizer", optimizer, "--lr", 1e-7, *flags)["model"]
    state = train(
        "trained", SIGMA, 60, "--optimizer", optimizer, "--lr", f"{lr},1e-7", "--lr-scheduler", "fixed", *flags
    )
    moved = running_sigmas({**state["model"], **{key: value for key, value in initial.items() if key.endswith("0.u")}})
    assert any(kept < 0.95 * true for kept, true in moved)  # without its advances u would be wrong
    for kept, true in running_sigmas(state["model"]):
        assert kept == pytest.approx(true, rel=0.05)


def test_u_follows_the_composite_optimizer():
    """Which no command line can set up: weights with Adam, and what has one dimension with fairseq's Nesterov SGD."""
    torch.manual_seed(0)
    model = sigma_reparam(nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8)))
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.param_group = "matrices" if parameter.ndim > 1 else "vectors"
    adam = {"_name": "adam", "lr": [0.03], "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "weight_decay": 0.0,
            "use_old_adam": False, "fp16_adam_stats": False, "tpu": False}  # fmt: skip
    nag = {"_name": "nag", "lr": [0.01], "momentum": 0.9, "weight_decay": 0.0}
    schedule = {"_name": "fixed", "force_anneal": None, "lr_shrink": 0.1, "warmup_updates": 0}
    groups = {"matrices": adam, "vectors": nag}
    groups = {name: {"optimizer": settings, "lr_scheduler": schedule} for name, settings in groups.items()}
    optimizer = optim.build_optimizer(
        OmegaConf.create({"_name": "composite", "groups": groups, "dynamic_groups": False}), parameters
    )
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(16, 24)
    for step in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 if step < 20 else 1e-7
        optimizer.zero_grad()
        optimizer.backward((model(x) - x[:, :8].sin()).square().mean())
        optimizer.step()
    state = {key: value.detach() for key, value in model.state_dict().items()}
    left_behind = {**state, **{key: value for key, value in initial.items() if key.endswith("0.u")}}
    assert any(kept < 0.95 * true for kept, true in running_sigmas(left_behind))
    for kept, true in running_sigmas(state):
        assert kept == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize("flags", [(), ("--ema-fp32",), ("--ema-fp32", *FP16)], ids=["plain", "fp32", "fp16"])
def test_a_stored_average_has_the_sigma_of_its_own_weights(train, flags):
    checkpoint = train("ema", SIGMA, 8, "--store-ema", "--ema-decay", 0.7, "--lr", 0.05, *flags)
    average = checkpoint["extra_state"]["ema"]
    average = {key: value.float() for key, value in average.items()}
    folded, checked = fold_state_dict(average), 0
    for key, W in average.items():
        if key.endswith("original"):
            expected = W * average[key.replace("original", "0.gamma")] / torch.linalg.svdvals(W)[0]
            W_hat = folded[key.replace("parametrizations.weight.original", "weight")]
            torch.testing.assert_close(W_hat, expected, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(W, checkpoint["model"][key].float(), atol=1e-2)
            checked += 1
    assert checked == 2 * 6 + 2 * 10


def test_an_average_searches_for_singular_vectors_only_where_it_is_saved(train, monkeypatch):
    found, converge = [], SigmaReparam.converge
    monkeypatch.setattr(SigmaReparam, "converge", lambda self: (found.append(self), converge(self)))
    train("ema", SIGMA, 1, "--store-ema")
    once = len(found)
    train("ema", SIGMA, 3, "--store-ema")
    assert once == len(found) - once == 2 * 6 + 2 * 10


def test_a_resumed_average_is_bitwise_the_one_that_never_stopped(train):
    average = ("--store-ema", "--ema-decay", 0.7)
    straight = train("straight", SIGMA, 6, *average)
    train("resumed", SIGMA, 3, *average)
    resumed = train("resumed", SIGMA, 6, *average)
    same(straight, resumed)
    same(*({"model": checkpoint["extra_state"]["ema"]} for checkpoint in (straight, resumed)))


def test_a_run_goes_on_in_the_middle_of_an_epoch(train):
    flags = ("--save-interval-updates", 1, "--keep-interval-updates", 1, "--num-workers", 2, "--patience", 3)
    straight = train("straight", SIGMA, 7, *flags)
    train("resumed", SIGMA, 3, *flags)  # of 4 updates an epoch
    same(straight, train("resumed", SIGMA, 7, *flags))


PLAIN, OTHER = "holds plain weights and the model is reparametrised", "is reparametrised and the model is not"


@pytest.mark.parametrize(
    "first, then, message, flag",
    [
        pytest.param("deepnorm_transformer_6l", SIGMA, PLAIN, "--restore-file", marks=pytest.mark.slow),
        (SIGMA, "deepnorm_transformer_6l", OTHER, "--restore-file"),
        ("transformer", SIGMA, PLAIN, "--finetune-from-model"),
        pytest.param(SIGMA, "transformer", OTHER, "--finetune-from-model", marks=pytest.mark.slow),
    ],
)
def test_training_ends_with_the_line_that_says_what_does_not_fit(train, first, then, message, flag, tmp_path):
    train("first", first, 1)
    path = tmp_path / "first" / "checkpoint_last.pt"
    with pytest.raises(ValueError) as error:
        train("then", then, 2, flag, path)
    assert str(error.value).startswith(f"{path}: the checkpoint {message}: use ") and "\n" not in str(error.value)


def test_iterative_quantisation_is_refused(train, tmp_path):
    (tmp_path / "pq.yaml").write_text("{}")
    with pytest.raises(ValueError, match="--quantization-config-path: allowed with --reparam none only"):
        train("sigma", SIGMA, 3, "--quantization-config-path", tmp_path / "pq.yaml")


@pytest.mark.slow  # speech trains in two processes as in one, and tests/engines/test_ddp.py has the layers
@pytest.mark.parametrize("backend", ["pytorch_ddp", "legacy_ddp"])
def test_two_processes_are_the_run_with_one(train, backend, corpus, tmp_path):
    whole = train("one", SIGMA, 4, "--batch-size", 64)
    from .conftest import TINY

    command = [sys.executable, "-m", "fairseq_cli.train", corpus, "--user-dir", USER_DIR, "--arch", SIGMA, *TINY]
    command += ["--batch-size", 32, "--max-update", 4, "--save-dir", tmp_path / "two", "--no-epoch-checkpoints"]
    command += ["--distributed-world-size", 2, "--ddp-backend", backend]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "two" / "checkpoint_last.pt", map_location="cpu")
    same(whole, two, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("precision", ["--fp16", "--bf16", "--memory-efficient-bf16"])
def test_half_precision_advances_once_and_not_a_step_behind(train, precision, monkeypatch):
    """The last u is one power iteration, with the last weights, from that of the run which stops an update before."""
    flags = [precision, *(["--fp16-no-flatten-grads"] if precision == "--fp16" else [])]
    before = train("before", SIGMA, 4, *flags)["model"]
    calls = count_advances(monkeypatch)
    state = train("mixed", SIGMA, 5, *flags)["model"]
    weights = [key for key in state if key.endswith("original")]
    assert len(calls) == 5 * len(weights)
    for key in weights:
        W, name = state[key].float(), key.replace("original", "0.u")
        assert state[name].dtype == torch.float32
        expected = torch.nn.functional.normalize(W @ (W.T @ before[name]), dim=0)
        torch.testing.assert_close(state[name], expected, rtol=1e-4, atol=1e-5)


def test_generation_folds_and_incremental_decoding_agrees(train, generate, tmp_path):
    train("sigma", SIGMA, 30)
    hypotheses = generate("sigma")
    assert len(hypotheses) == 43
    path = str(tmp_path / "sigma" / "checkpoint_last.pt")
    (model,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task([path])
    model.eval()
    tokens = torch.tensor([[4, 5, 6, 7, 8, 2]])
    unfolded = model(tokens, torch.tensor([6]), torch.tensor([[2, 4, 5, 6]]))[0]
    model.prepare_for_inference_(cfg)
    assert not any("parametrizations" in key for key in model.state_dict())
    encoder_out = model.encoder(tokens, torch.tensor([6]))
    state = {}
    for length in (1, 2, 3, 4):
        step, _ = model.decoder(torch.tensor([[2, 4, 5, 6]])[:, :length], encoder_out, incremental_state=state)
        torch.testing.assert_close(step[:, -1], unfolded[:, length - 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "residual", ["deepnorm", *(pytest.param(r, marks=pytest.mark.slow) for r in ("post-ln", "pre-ln"))]
)
def test_export_loads_in_stock_fairseq_with_equal_outputs(train, generate, residual, corpus, tmp_path):
    train("ours", SIGMA, 30, "--residual", residual)
    (tmp_path / "stock").mkdir()
    ours, theirs = (str(tmp_path / name / "checkpoint_last.pt") for name in ("ours", "stock"))
    subprocess.run([PYTHON, "-m", "fairseq_sigma.export", ours, theirs], check=True)
    (mine,), _, _ = checkpoint_utils.load_model_ensemble_and_task([ours])
    (exported,), _, _ = checkpoint_utils.load_model_ensemble_and_task([theirs])
    assert type(exported).__module__.startswith("fairseq.")
    batch = (torch.tensor([[4, 5, 6, 7, 8, 2]]), torch.tensor([6]), torch.tensor([[2, 4, 5, 6]]))
    torch.testing.assert_close(exported.eval()(*batch)[0], mine.eval()(*batch)[0], rtol=1e-3, atol=1e-3)
    if residual == "post-ln":  # the whole command, in a process that has never seen the plugin
        command = [
            PYTHON,
            "-m",
            "fairseq_cli.generate",
            corpus,
            "--path",
            theirs,
            "--beam",
            5,
            "--max-len-b",
            12,
        ]
        command += ["--cpu", "--batch-size", 20, "--required-batch-size-multiple", 1]
        out = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert out.returncode == 0, out.stderr[-2000:]
        lines = [line.split("\t") for line in out.stdout.splitlines() if line.startswith("H-")]
        assert [line[2] for line in sorted(lines, key=lambda line: int(line[0][2:]))] == generate("ours")


def test_no_sentence_is_lost_where_the_exports_own_words_are_followed(train, corpus, tmp_path):
    """Long and short sentences, 43 of them, translated by a fairseq that has never seen the plugin."""
    train("ours", SIGMA, 1)
    draw = random.Random(1)
    for language in ("en", "de"):
        lines = [" ".join(draw.choices("abcdef", k=draw.choice((2, 9, 70, 250)))) for _ in range(43)]
        (tmp_path / f"long.{language}").write_text("".join(f"{line}\n" for line in lines))
    known = ("--srcdict", corpus / "dict.en.txt", "--tgtdict", corpus / "dict.de.txt")
    call("preprocess", "-s", "en", "-t", "de", *known, "--testpref", tmp_path / "long", "--destdir", tmp_path / "data")
    ours, stock = tmp_path / "ours" / "checkpoint_last.pt", tmp_path / "stock.pt"
    said = subprocess.run([PYTHON, "-m", "fairseq_sigma.export", str(ours), str(stock)], capture_output=True,
                          text=True, check=True).stdout  # fmt: skip
    advice = re.search("fairseq-generate (.*?) needs no --user-dir", said)[1].split()
    flags = ["--cpu", "--beam", 1, "--max-len-b", 5, "--num-workers", 0, *advice, "--max-tokens", 300]
    command = [PYTHON, "-m", "fairseq_cli.generate", tmp_path / "data", *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {line.split("\t")[0] for line in done.stdout.splitlines() if line.startswith("H-")} == {
        f"H-{index}" for index in range(43)
    }


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("--norm", "none", "--residual", "pre-ln"),
            "--norm none: stock fairseq has no such transformer, allowed is layernorm",
        ),
        (("--attention", "stable"), "--attention stable: stock fairseq has no such transformer, allowed is dot"),
    ],
)
def test_export_refuses_what_stock_fairseq_has_no_model_for(train, tmp_path, capsys, flags, message):
    train("bare", SIGMA, 1, *flags)
    path = tmp_path / "bare" / "checkpoint_last.pt"
    capsys.readouterr()
    assert export.main([str(path), str(tmp_path / "out.pt")]) == 1
    assert capsys.readouterr().err == f"export: {path}: {message}\n"


def test_the_cores_fold_names_the_command_for_this_checkpoint(train, tmp_path):
    train("ours", SIGMA, 1)
    path, out = str(tmp_path / "ours" / "checkpoint_last.pt"), tmp_path / "out.pt"
    done = subprocess.run([PYTHON, "-m", "stable_core.fold_checkpoint", path, str(out)], capture_output=True, text=True)
    assert done.returncode == 1 and not out.exists()
    assert done.stderr.startswith(
        f"fold_checkpoint: {path}: holds argparse.Namespace, allowed are tensors, numbers, strings"
    )
    assert "python -m fairseq_sigma.export" in done.stderr
    assert done.stderr.count("\n") == 1 and "\x1b" not in done.stderr


def test_averaged_checkpoints_generate(train, generate, tmp_path):
    a, b = train("a", SIGMA, 20), train("b", SIGMA, 25)
    (tmp_path / "mean").mkdir()
    paths = [str(tmp_path / name / "checkpoint_last.pt") for name in ("a", "b", "mean")]
    assert average.main(paths) == 0
    assert len(generate("mean")) == 43
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task(paths[2:])
    model.load_state_dict(torch.load(paths[2])["model"])
    checked = 0
    for name, module in fold(model).named_modules():
        kept = f"{name}.parametrizations.weight"
        if f"{kept}.original" in a["model"]:
            W, gamma = ((a["model"][f"{kept}.{x}"] + b["model"][f"{kept}.{x}"]) / 2 for x in ("original", "0.gamma"))
            torch.testing.assert_close(module.weight, W * gamma / torch.linalg.svdvals(W)[0], rtol=2e-3, atol=1e-4)
            checked += 1
    assert checked == 2 * 6 + 2 * 10
    # The exported average is the same one.
    stock = export.export(torch.load(paths[2]))["model"]
    name, alpha = "encoder.layers.1.fc2", model.encoder.layers[1].alpha
    torch.testing.assert_close(stock[f"{name}.weight"] * alpha, model.get_submodule(name).weight, rtol=1e-3, atol=1e-4)


def test_averaging_refuses_different_models(train, tmp_path, capsys):
    train("a", SIGMA, 1)
    train("b", SIGMA, 1, "--encoder-layers", 1)
    a, b = (str(tmp_path / name / "checkpoint_last.pt") for name in "ab")
    assert average.main([a, a, b, str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"average: {b}: not of the same model as {a}\n"


def test_validate_interactive_and_score(train, generate, corpus, tmp_path, capsys, monkeypatch):
    train("sigma", SIGMA, 30)
    path = ("--path", tmp_path / "sigma" / "checkpoint_last.pt", "--user-dir", USER_DIR, "--cpu")
    hypotheses = generate("sigma")
    capsys.readouterr()
    call("validate", corpus, *path, "--task", "translation", "--valid-subset", "test", "--batch-size", 20)
    (tmp_path / "input").write_text("a b c\nf e d c\n")
    call("interactive", corpus, *path, "--input", tmp_path / "input", "--beam", 5, "-s", "en", "-t", "de")
    out = capsys.readouterr().out
    assert {"H-0", "H-1"} <= {line.split("\t")[0] for line in out.splitlines()}
    (tmp_path / "sys").write_text("".join(f"{line}\n" for line in hypotheses))
    call("score", "--sys", tmp_path / "sys", "--ref", tmp_path / "sys")
    assert "BLEU4 = 100.00" in capsys.readouterr().out


def test_hydra_train(corpus, tmp_path):
    settings = {
        "task": "translation", "task.data": corpus, "task.source_lang": "en", "task.target_lang": "de",
        "common.user_dir": USER_DIR.resolve(), "common.cpu": "true", "+model._name": SIGMA, "+model.encoder_layers": 1,
        "+model.decoder_layers": 1, "+model.encoder_embed_dim": 16, "+model.encoder_attention_heads": 2,
        "+model.decoder_attention_heads": 2, "+model.encoder_ffn_embed_dim": 32, "+model.qkv": "joint",
        "criterion": "label_smoothed_cross_entropy", "optimizer": "adam", "lr_scheduler": "fixed",
        "optimization.max_update": 2, "optimization.lr": "[0.01]", "dataset.batch_size": 16, "dataset.num_workers": 0,
        "checkpoint.save_dir": tmp_path / "hydra", "hydra.run.dir": tmp_path,
    }  # fmt: skip
    command = [PYTHON, "-m", "fairseq_cli.hydra_train", *(f"{key}={value}" for key, value in settings.items())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    state = torch.load(tmp_path / "hydra" / "checkpoint_last.pt", map_location="cpu")["model"]
    assert state["encoder.layers.0.self_attn.q_proj.parametrizations.weight.0.u"].numel() == 3 * 16
    exported = str(tmp_path / "stock.pt")
    assert export.main([str(tmp_path / "hydra" / "checkpoint_last.pt"), exported]) == 0
    (stock,), _, _ = checkpoint_utils.load_model_ensemble_and_task([exported])
    assert not any("parametrizations" in key for key in stock.state_dict())


def test_layers_to_keep(train, tmp_path):
    trained = train("sigma", SIGMA, 1)["model"]
    path = str(tmp_path / "sigma" / "checkpoint_last.pt")
    keep = {"encoder_layers_to_keep": "1", "decoder_layers_to_keep": "0,1"}  # fairseq wants both named
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides=keep)
    assert len(model.encoder.layers) == 1
    # A layer goes on with the alpha that it was trained with, which fewer layers would have smaller.
    (whole,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path])
    assert model.encoder.layers[0].alpha == whole.encoder.layers[1].alpha > 1
    kept = "fc1.parametrizations.weight.original"
    assert torch.equal(model.state_dict()[f"encoder.layers.0.{kept}"], trained[f"encoder.layers.1.{kept}"])
