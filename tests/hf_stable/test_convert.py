"""Converted models against the models they come from, and the command."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

import hf_stable
import timm_stable  # noqa: F401
from hf_stable import StableGPTForCausalLM, conversion
from hf_stable.convert import main
from hf_stable.convert_gpt2 import from_gpt2
from hf_stable.convert_nanogpt import check_against, from_nanogpt
from hf_stable.convert_timm import from_timm, image_processor
from nanogpt_patch import model as nanogpt
from stable_core import SigmaReparamConfig, fold
from tests.combinations import combined, label

from .models import GPT, disturbed, stable_gpt, tokens

TINY = {"depth": 2, "img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 48, "num_heads": 3}


def gpt2(**settings) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=99, n_positions=64, **special, **settings)
    return disturbed(GPT2LMHeadModel(config).eval())


@pytest.mark.parametrize("settings", [{}, {"activation_function": "gelu", "n_inner": 48}])
def test_gpt2_is_a_stable_gpt_with_stock_options(settings):
    theirs, ids = gpt2(**settings), tokens(2, 20)
    ours = from_gpt2(theirs)
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4
    generated = [model.generate(ids, max_new_tokens=10, do_sample=False) for model in (ours, theirs)]
    assert torch.equal(*generated)


def test_gpt2_with_another_attention_is_refused():
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx = True: allowed is False"):
        from_gpt2(gpt2(scale_attn_by_inverse_layer_idx=True))


def nanogpt_checkpoint(theirs: GPT2LMHeadModel) -> dict:
    """What nanoGPT's train.py writes: GPT-2's names, Linear in place of Conv1D, and torch.compile's prefix."""
    transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    model = {f"_orig_mod.{k}": x.T.clone() if k.endswith(transposed) else x for k, x in theirs.state_dict().items()}
    args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "bias": True, "vocab_size": 99, "dropout": 0.0}
    return {"model": model, "model_args": args, "iter_num": 10, "config": {"dataset": "shakespeare"}}


CODE = """
# Stands in for nanoGPT's model.py: GPT(config), and forward(idx, targets) -> (logits, loss).
import dataclasses, torch
from transformers import GPT2Config, GPT2LMHeadModel

@dataclasses.dataclass
class GPTConfig:
    n_layer: int; n_head: int; n_embd: int; block_size: int; bias: bool; vocab_size: int; dropout: float

class GPT(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, vocab_size=c.vocab_size,
                                               n_positions=c.block_size, activation_function="gelu"))
    def load_state_dict(self, state):
        own = self.gpt2.state_dict()
        transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        self.gpt2.load_state_dict({k: x.T if k.endswith(transposed) else x for k, x in state.items()})
    def forward(self, idx, targets=None):
        return self.gpt2(idx).logits, None
"""


def test_nanogpt(tmp_path):
    theirs, ids = gpt2(activation_function="gelu"), tokens(2, 20)
    checkpoint = nanogpt_checkpoint(theirs)
    ours = from_nanogpt(checkpoint)
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4

    (tmp_path / "model.py").write_text(CODE)
    assert check_against(ours, checkpoint, tmp_path / "model.py") < 1e-4
    wrong = copy.deepcopy(ours)
    wrong.transformer.h[1].ln_2.bias.data += 0.1
    with pytest.raises(ValueError, match="the converted model's outputs differ by"):
        check_against(wrong, checkpoint, tmp_path / "model.py")

    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert (
        main(["nanogpt", str(tmp_path / "ckpt.pt"), str(tmp_path / "out"), "--code", str(tmp_path / "model.py")]) == 0
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(ids).logits, ours(ids).logits)


CHARACTERS = "".join(map(chr, [10, *range(32, 126), 0xE9, 0x3C3, 0x1F600, 0xA0]))  # 99, as the model has


def test_nanogpts_characters(tmp_path, capsys):
    """Encoded and decoded as data/shakespeare_char/prepare.py does."""
    stoi = {c: i for i, c in enumerate(CHARACTERS)}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 99, "stoi": stoi}))
    torch.save(nanogpt_checkpoint(gpt2(activation_function="gelu")), tmp_path / "ckpt.pt")
    command = ["nanogpt", str(tmp_path / "ckpt.pt"), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "meta.pkl")]
    assert main(command) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "KING:\n  What's  this , sir ?\n\n\xe9\u03c3\U0001f600\xa0! "
    assert tokenizer(text)["input_ids"] == [stoi[c] for c in text]
    assert tokenizer.decode([stoi[c] for c in text]) == text
    with pytest.raises(Exception, match="UNK"):
        tokenizer("\u20ac")

    for held, error in (
        ({"stoi": {"a": 0}}, "1 characters, and the model has 99"),
        ({"stoi": Path("x")}, "it holds a pathlib"),
        ([], "no meta.pkl of characters"),
    ):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(held))
        assert main([*command[:2], str(tmp_path / "other"), *command[3:]]) == 1
        assert error in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "bare")]) == 0
    assert "no tokenizer is saved along: --tokenizer gpt2" in capsys.readouterr().err


@pytest.mark.parametrize("settings", combined(), ids=label)
@torch.no_grad()
def test_nanogpt_patchs_models(settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64}
    theirs = disturbed(nanogpt.GPT(nanogpt.GPTConfig(**sizes, **settings, tau_scale=1.5)).eval())
    checkpoint = {"model": theirs.state_dict(), "model_args": vars(theirs.config)}
    ours, ids = from_nanogpt(checkpoint), tokens(2, 20)
    assert (ours(ids).logits - theirs(ids, targets=ids)[0]).abs().max() < 1e-4
    assert {name: getattr(ours.config, name) for name in nanogpt.SETTINGS} == {
        **nanogpt.SETTINGS,
        **settings,
        "tau_scale": 1.5,
    }
    assert check_against(ours, checkpoint, Path(nanogpt.__file__)) < 1e-4


def test_a_nanogpt_checkpoint_in_the_words_of_before():
    theirs = nanogpt.GPT(nanogpt.GPTConfig(**{**GPT, **nanogpt.STOCK})).eval()
    old = {"norm": "layernorm", "alpha": 0.475, "attention": "dot", "tau_scale": 1.0, "init": "gpt2", "reparam": "none"}
    checkpoint = {"model": theirs.state_dict(), "model_args": {**GPT, **old, "bias": True}}
    assert from_nanogpt(checkpoint).config.init == "stock"
    assert check_against(from_nanogpt(checkpoint), checkpoint, Path(nanogpt.__file__)) < 1e-4


@pytest.mark.parametrize("settings", combined(), ids=label)
@torch.no_grad()
def test_timm_stables_models(settings):
    torch.manual_seed(0)
    sizes = {**TINY, "depth": 1, "img_size": 16, "tau_scale": 1.5}
    theirs = disturbed(timm.create_model("stablevit_small", **sizes, **settings).eval())
    ours, images = from_timm(theirs), torch.randn(3, 3, 16, 16)
    assert (ours(images).logits - theirs(images)).abs().max() < 1e-4
    assert {name: getattr(ours.config, name) for name in settings} == settings
    assert ours.config.tau_scale == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("stablevit_small", {}),
        ("stablevit_small", {"tau_scale": 2.0, "alpha": 0.125, "norm": "layernorm"}),
        ("stablevit_small", {"norm": "rmsnorm", "attention": "qknorm", "init": "xavier", "qkv_bias": False}),
        ("stablevit_small", {"attention": "l2"}),
        ("stablevit_small", {"attention": "l2_tied", "norm": "layernorm"}),
        ("sigma_vit_small_patch16_224", {}),
        ("sigma_vit_small_patch16_224", {"qkv": "joint", "gamma_init": "one", "weight_std": 0.05}),
        ("sigma_vit_small_patch16_224_preln", {"reparam": "weight"}),
        ("sigma_vit_small_patch16_224_preln", {"reparam": "spectral"}),
        ("vit_tiny_patch16_224", {"mlp_ratio": 3}),
    ],
)
def test_timm(name, settings, tmp_path):
    torch.manual_seed(0)
    theirs = disturbed(timm.create_model(name, **TINY, **settings).eval())
    images = torch.randn(3, 3, 32, 32)
    ours = from_timm(theirs)
    assert (ours(images).logits - theirs(images)).abs().max() < 1e-4
    ours.save_pretrained(tmp_path)  # and through the configuration alone
    again = type(ours).from_pretrained(tmp_path)
    assert (again(images).logits - theirs(images)).abs().max() < 1e-4
    features = again.vit(images, output_hidden_states=True)
    torch.testing.assert_close(features.last_hidden_state, theirs.forward_features(images), rtol=1e-3, atol=1e-4)
    if "sigma" in name:
        assert (hf_stable.fold(again)(images).logits - theirs(images)).abs().max() < 1e-4
        assert from_timm(fold(theirs)).config.reparam == "none"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"reg_tokens": 2}, "StableVisionTransformer has vit.reg_token: an option that"),
        ({"init_values": 0.1}, "StableVisionTransformer has vit.blocks.0.ls1.gamma: an option that"),
        ({"global_pool": "avg"}, "global_pool = 'avg': allowed is 'token'"),
        ({"img_size": (32, 64)}, r"img_size = \(32, 64\), patch_size = \(8, 8\): allowed are squares"),
    ],
)
def test_timm_options_that_are_not_there(settings, error):
    with pytest.raises(ValueError, match=error):
        from_timm(timm.create_model("stablevit_small", **{**TINY, **settings}))


def test_a_converted_image_model_sees_what_timm_sees(tmp_path):
    torch.manual_seed(0)
    tiny = {**TINY, "img_size": 72}  # resized to 80 pixels, of which it keeps 72
    theirs = timm.create_model("sigma_vit_small_patch16_224", **tiny).eval()
    torch.save({"state_dict": theirs.state_dict(), "arch": "sigma_vit_small_patch16_224"}, tmp_path / "last.pth.tar")
    command = [
        "timm",
        "sigma_vit_small_patch16_224",
        str(tmp_path / "out"),
        "--model-kwargs",
        *(f"{name}={value}" for name, value in tiny.items()),
    ]
    door = ["--device-modules", "timm_stable"]
    assert main([*command, "--checkpoint", str(tmp_path / "last.pth.tar"), *door]) == 0

    coarse = np.random.default_rng(0).integers(0, 255, (12, 10, 3), np.uint8)
    picture = Image.fromarray(coarse.repeat(16, 0).repeat(16, 1))
    cfg = {**timm.data.resolve_model_data_config(theirs), "input_size": (3, 72, 72)}
    transform = timm.data.create_transform(**cfg)
    seen = image_processor(theirs)(picture, return_tensors="pt")["pixel_values"]
    assert (seen[0] - transform(picture)).abs().mean() < 0.02  # two libraries' bicubic
    best = pipeline("image-classification", str(tmp_path / "out"))(picture, top_k=1)[0]
    expected = theirs(transform(picture)[None]).softmax(-1).max()
    assert best["score"] == pytest.approx(expected.item(), abs=2e-3)


def test_folding_by_command(tmp_path):
    model, ids = stable_gpt(reparam="sigma", gamma_init="spectral"), tokens(2, 8)
    theirs = hf_stable.sigma_reparam(gpt2(), SigmaReparamConfig(gamma_init="spectral"))
    for name, source in (("ours", model), ("theirs", theirs)):
        source.save_pretrained(tmp_path / name)
        (tmp_path / name / "processor_config.json").write_text("{}")  # of whatever kind
        assert main(["folded", str(tmp_path / name), str(tmp_path / f"{name}-plain")]) == 0
        assert (tmp_path / f"{name}-plain" / "processor_config.json").exists()
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-plain")
        assert not any("parametrizations" in key for key in plain.state_dict())
        torch.testing.assert_close(plain(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-5)


def test_errors_are_one_line(tmp_path, capsys):
    torch.save({"weights": 1}, tmp_path / "other.pt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    torch.save({**nanogpt_checkpoint(gpt2()), "model_args": {"n_layer": 3}}, tmp_path / "deep.pt")
    torch.save({**nanogpt_checkpoint(gpt2()), "model_args": {"rope": True}}, tmp_path / "rope.pt")
    stable_gpt().save_pretrained(tmp_path / "plain")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"model": {}, "model_args": {"n_layer": "2"}}, tmp_path / "type.pt")
    torch.save({**nanogpt_checkpoint(gpt2()), "model_args": {**nanogpt_checkpoint(gpt2())["model_args"], "norm": "layernorm"}},
               tmp_path / "patched.pt")  # fmt: skip
    (tmp_path / "model.py").write_text(CODE)
    out = str(tmp_path / "out")
    for command, error in (
        (
            ["nanogpt", str(tmp_path / "other.pt"), out],
            "no checkpoint of nanoGPT: it holds no 'model' and 'model_args'",
        ),
        (["nanogpt", str(tmp_path / "rope.pt"), out], "model_args holds rope: allowed are vocab_size, block_size"),
        (["nanogpt", str(tmp_path / "deep.pt"), out], "nanoGPT"),
        (["nanogpt", str(tmp_path / "empty.pt"), out], "empty.pt: cut short, or not written by torch.save"),
        (["nanogpt", str(tmp_path / "type.pt"), out], "Field 'n_layer' expected int, got str (value: '2')"),
        (["nanogpt", str(tmp_path / "patched.pt"), out, "--code", str(tmp_path / "model.py")], "its GPT has no norm"),
        (["nanogpt", str(tmp_path / "gone.pt"), out], "No such file"),
        (["nanogpt", str(tmp_path / "other.pt"), str(tmp_path / "full")], "is there and not empty"),
        (["timm", "resnet18", out], "ResNet: allowed are timm's stablevit_*, sigma_vit_* and vit_*"),
        (["timm", "stablevit_tiny", out], "stablevit_tiny: no model of timm; --device-modules timm_stable adds"),
        (["folded", str(tmp_path / "plain"), out], "nothing to fold"),
        (["folded", str(tmp_path / "full"), out], "no config.json, so no folder of save_pretrained"),
    ):
        assert main(command) == 1
        printed = capsys.readouterr().err
        assert error in printed and printed.startswith("convert: ") and printed.count("\n") == 1, printed
    assert not (tmp_path / "out").exists()


def test_a_wrong_conversion_is_noticed():
    with pytest.raises(ValueError, match=r"GPT-2: the converted model's outputs differ by 0\.1, allowed is 0\.0001"):
        conversion.check_equal(torch.zeros(3), torch.full((3,), 0.1), "GPT-2")
    with pytest.raises(ValueError, match="differ by nan"):
        conversion.check_equal(torch.zeros(3), torch.full((3,), torch.nan), "GPT-2")
    model = stable_gpt()
    state = {name: x for name, x in model.state_dict().items() if "ln_f" not in name}
    with pytest.raises(ValueError, match=r"it lacks transformer\.ln_f\.weight: an option that StableGPTForCausalLM"):
        conversion.load_whole(StableGPTForCausalLM(model.config), state, "it")


def tokenizer_beside(folder) -> None:
    vocabulary = models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), unk_token="w0").save_pretrained(folder)


@pytest.mark.parametrize(
    "change", ["a llama's", "a llama that says it is a GPT-2", "lacks", "too much", "another shape", "cut"]
)
def test_what_is_no_whole_gpt2_is_refused(change, tmp_path, capsys):
    """The status is not 0, one line says why, and nothing is written: transformers alone warns and draws the rest."""
    source, weights = tmp_path / "source", tmp_path / "source" / "model.safetensors"
    if "llama" in change:
        config = LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=99
        )
        LlamaForCausalLM(config).save_pretrained(source)
        if "says" in change:
            gpt2().config.save_pretrained(source)
    else:
        gpt2().save_pretrained(source)
        state = load_file(weights)
        if change == "lacks":
            del state["transformer.h.1.mlp.c_fc.weight"]
        elif change == "too much":
            state["transformer.h.2.mlp.c_fc.weight"] = torch.zeros(32, 128)
        elif change == "another shape":
            state["transformer.ln_f.bias"] = torch.zeros(31)
        save_file(state, weights, {"format": "pt"})
        if change == "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
    tokenizer_beside(source)
    capsys.readouterr()
    assert main(["gpt2", str(source), str(tmp_path / "out")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        last.startswith("convert: ")
        and {
            "a llama's": "holds a model of type 'llama': allowed is 'gpt2'",
            "a llama that says it is a GPT-2": "these are not the weights of a GPT2LMHeadModel",
            "lacks": "lacks transformer.h.1.mlp.c_fc.weight: these are not",
            "too much": "has too much transformer.h.2.mlp.c_fc.weight",
            "another shape": "has in another shape transformer.ln_f.bias",
            "cut": "a file of weights is damaged",
        }[change]
        in last
    ), last
    assert not (tmp_path / "out").exists()


def test_a_folder_that_lacks_a_weight_is_not_folded(tmp_path, capsys):
    stable_gpt(reparam="sigma", norm="layernorm").save_pretrained(tmp_path / "gpt")
    weights = tmp_path / "gpt" / "model.safetensors"
    state = load_file(weights)
    del state["transformer.h.0.ln_1.weight"]
    save_file(state, weights, {"format": "pt"})
    capsys.readouterr()
    assert main(["folded", str(tmp_path / "gpt"), str(tmp_path / "out")]) == 1
    assert "lacks transformer.h.0.ln_1.weight" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
