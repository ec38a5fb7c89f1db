"""`rescue_checkpoint` on a file of torch.save: the run goes on from it as one that was rescued under way."""

import copy

import pytest
import torch

from stable_monitor import Monitor, prepare_to_resume, rescue
from stable_monitor.rescue_checkpoint import main

from .models import batch, gpt, train
from .test_rescue import collapsed, forward_of, groups

MODEL = f"{__name__}:gpt_of_the_tests"


def gpt_of_the_tests():
    return gpt(3)


def resumed(path):
    model = gpt(1)
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    saved = torch.load(path)
    prepare_to_resume(model, optimizer, saved["optimizer"])
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer


def test_the_file_is_that_of_a_run_that_was_rescued_under_way(tmp_path, capsys):
    model, optimizer = collapsed(1)
    before = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7}
    torch.save(before, tmp_path / "in.pt")
    arguments = [str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), "--model", MODEL]
    assert main([*arguments, "--layers", "h.1.attn"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("h.1.attn: |W_q| ") and f"have the command that trained {tmp_path}/in.pt resume it" in said
    rescue(model, optimizer, forward_of(model), layers=["h.1.attn"])
    again, theirs = resumed(tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt")["step"] == 7
    for model_, optimizer_ in ((model, optimizer), (again, theirs)):
        train(model_, 3, optimizer=optimizer_)
    for (name, ours), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, other), name
    assert main([*arguments, "--layers", "h.1.attn"]) == 1
    assert "it is there already" in capsys.readouterr().err


def test_a_checkpoint_that_was_rescued_before(tmp_path):
    model, optimizer = collapsed(0, 1)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "0.pt")
    for i, how in enumerate((["--layers", "h.1.attn"], ["--layers", "h.0.attn"], ["--reparam"])):
        assert main([f"{tmp_path}/{i}.pt", f"{tmp_path}/{i + 1}.pt", "--model", MODEL, *how]) == 0
    for layer in ("h.1.attn", "h.0.attn"):
        rescue(model, optimizer, forward_of(model), layers=[layer])
    again, theirs = resumed(tmp_path / "3.pt")
    assert len([name for name in again.state_dict() if name.endswith("gamma")]) == 9
    torch.testing.assert_close(again.eval()(*batch(5))[0], model.eval()(*batch(5))[0])
    moments = {name: optimizer.state[p] for name, p in model.named_parameters() if "attn.c_proj.bias" in name}
    for name, p in again.named_parameters():
        assert name not in moments or torch.equal(theirs.state[p]["exp_avg"], moments[name]["exp_avg"])


def test_the_layers_are_those_of_the_last_record(tmp_path, capsys):
    model, _ = collapsed(1)
    torch.save({"model": model.state_dict()}, tmp_path / "in.pt")
    with Monitor(model, every=1, path=tmp_path / "run") as monitor:
        model(*batch(5))[1].backward()
        monitor.step()
    options = ["--model", MODEL, "--run", str(tmp_path / "run")]
    assert main([str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), *options]) == 0
    said = capsys.readouterr().out
    assert "h.1.attn" in said and "h.0.attn" not in said and "no optimizer" in said


def test_every_layer_with_its_function_and_moments(tmp_path):
    model, optimizer = collapsed()
    moments = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "in.pt")
    assert main([str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), "--model", MODEL, "--reparam"]) == 0
    again, theirs = resumed(tmp_path / "out.pt")
    assert again.h[0].mlp[0].parametrizations.weight[0].gamma.requires_grad
    torch.testing.assert_close(again.eval()(*batch(5))[0], model.eval()(*batch(5))[0])
    for name, p in again.named_parameters():
        old = moments.get(name.replace(".parametrizations.weight.original", ".weight"))
        assert old is None or torch.equal(theirs.state[p]["exp_avg"], old["exp_avg"])


def test_a_checkpoint_of_timm(tmp_path):
    import timm

    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "in.pt")
    out = tmp_path / "out.pt"
    assert (
        main([str(tmp_path / "in.pt"), str(out), "--model", "timm:vit_tiny_patch16_224", "--layers", "blocks.2.attn"])
        == 0
    )
    assert [key for key in torch.load(out) if key.endswith("gamma")] == [
        "blocks.2.attn.qkv.parametrizations.weight.0.gamma"
    ]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--layers", "h.0.attn"], "say which model it is of, --model timm:NAME or --model MODULE:FUNCTION"),
        (["--layers", "h.9.attn", "--model", MODEL], "layers = 'h.9.attn': the model has no such module"),
        (["--layers", "h.0.attn", "--model", "gpt"], "model = 'gpt': allowed are timm:NAME and MODULE:FUNCTION"),
        (["--layers", "h.0.attn", "--model", f"{MODEL}x"], f"model = '{MODEL}x': module"),
        (
            ["--layers", "h.0.attn", "--model", "nowhere:gpt"],
            "model = 'nowhere:gpt': No module named 'nowhere'; allowed are",
        ),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, capsys, options, error):
    torch.save({"model": gpt().state_dict()}, tmp_path / "in.pt")
    assert main([str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), *options]) == 1
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1


def test_a_checkpoint_that_is_not_there_is_named_and_a_folder_for_the_new_one_is_made(tmp_path, capsys):
    assert main([str(tmp_path / "no.pt"), str(tmp_path / "out.pt"), "--layers", "h.0.attn"]) == 1
    assert "no.pt: no such file or folder" in capsys.readouterr().err
    torch.save({"model": gpt().state_dict()}, tmp_path / "in.pt")
    out = tmp_path / "new" / "folder" / "out.pt"
    assert main([str(tmp_path / "in.pt"), str(out), "--model", MODEL, "--layers", "h.0.attn"]) == 0 and out.exists()
