"""A norm and an attention that this project does not know: named like any other, and saved with the model."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from hf_stable import StableGPTForCausalLM
from hf_stable.convert import main as convert
from hf_stable.update import main as update
from stable_core import registry

from .models import run_without_package, stable_gpt, tokens
from .test_combinations import MODELS

OWN = '''
"""Dynamic tanh in the place of a norm, and logits of the two halves of a head, the second of which repel."""

import torch
from torch import nn

from stable_core.attentions import QueryKey
from stable_core.registry import register_attention, register_norm


class DynamicTanh(nn.Module):
    def __init__(self, dim, start):
        super().__init__()
        self.start, self.weight, self.scale = start, nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        nn.init.constant_(self.scale, self.start)

    def forward(self, x):
        return self.weight * torch.tanh(self.scale * x)


@register_norm("tanh", "gamma tanh(a x)")
def build_tanh(dim, options, **made):
    return DynamicTanh(dim, start=options.alpha)


def repel(q, k):
    signs = torch.ones(q.shape[-1], device=q.device)
    signs[q.shape[-1] // 2 :] = -1
    return torch.cat([q * signs, torch.ones_like(q[..., :1])], -1), torch.cat([k, k[..., :1].square()], -1)


@register_attention("repel")
def build_repel(head_dim, options, **made):
    return QueryKey(DynamicTanh(head_dim, 1.0), nn.Identity(), repel)
'''
METHODS = {"norm": "tanh", "attention": "repel"}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The module, imported from a file of its own; what it registers is gone after the test."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(registry, "_METHODS", {slot: dict(found) for slot, found in registry._METHODS.items()})
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_methods.py").write_text(OWN)
    yield importlib.import_module("own_methods")
    sys.modules.pop("own_methods", None)


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_trains_with_them_by_name(kind, own, tmp_path):
    cls, config, batch = MODELS[kind]
    torch.manual_seed(0)
    model = cls(type(config)(**{**config.to_dict(), **METHODS, "residual": "pre-ln"}))
    before, losses = {name: x.clone() for name, x in model.state_dict().items()}, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    norms = [name for name in before if name.endswith(".scale")]
    blocks = {"gpt": 2, "vit": 2, "mt": 1 + 2}[kind]
    assert (
        len(norms) == blocks * 3 + {"gpt": 1, "vit": 1, "mt": 2 + 2 * 2}[kind]
    )  # mt: a final one a side, cross-attention
    assert not any(torch.equal(model.state_dict()[name], before[name]) for name in norms)
    model.eval().save_pretrained(tmp_path / kind)
    assert torch.equal(cls.from_pretrained(tmp_path / kind)(**batch).logits, model(**batch).logits)
    (configuration,) = (tmp_path / kind).glob(f"configuration_{model.config.model_type}.py")
    assert configuration.read_text().endswith("\nfrom .own_methods import __name__ as _methods\n")


@torch.no_grad()
def test_logits_are_the_methods_written_out(own):
    model, ids = stable_gpt(**METHODS, n_layer=1, n_head=1, alpha=0.3), tokens(1, 5)
    w = {name.removeprefix("transformer."): x for name, x in model.state_dict().items()}

    def tanh(name: str, x: Tensor) -> Tensor:
        return w[f"{name}.weight"] * torch.tanh(w[f"{name}.scale"] * x)

    x = w["wte.weight"][ids[0]] + w["wpe.weight"][:5]
    q, k, v = (tanh("h.0.ln_1", x) @ w["h.0.attn.c_attn.weight"].T).chunk(3, dim=-1)
    q = tanh("h.0.attn.q_norm", q)
    logits = (q[:, :16] @ k[:, :16].T - q[:, 16:] @ k[:, 16:].T + k[:, 0] ** 2) / math.sqrt(32)
    A = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    x = x + A @ v @ w["h.0.attn.c_proj.weight"].T
    x = x + F.gelu(tanh("h.0.ln_2", x) @ w["h.0.mlp.c_fc.weight"].T) @ w["h.0.mlp.c_proj.weight"].T
    torch.testing.assert_close(model(ids).logits[0], tanh("ln_f", x) @ w["wte.weight"].T, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_a_checkpoint_lacks_has_the_first_values_of_a_new_model(own, tmp_path):
    """On the meta device, where transformers builds: of a norm that is not there, or in part."""
    model = stable_gpt(**METHODS)
    model.save_pretrained(tmp_path / "gpt")
    state = load_file(tmp_path / "gpt" / "model.safetensors")
    for name in ("h.0.ln_1.weight", "h.0.ln_1.scale", "h.1.ln_2.weight"):
        del state[f"transformer.{name}"]
    save_file(state, tmp_path / "gpt" / "model.safetensors", {"format": "pt"})
    loaded = StableGPTForCausalLM.from_pretrained(tmp_path / "gpt").transformer.h
    assert torch.equal(loaded[0].ln_1.weight, torch.ones(32)) and loaded[0].ln_1.scale == torch.tensor(0.475)
    assert torch.equal(loaded[1].ln_2.weight, torch.ones(32))
    assert torch.equal(loaded[1].ln_2.scale, model.transformer.h[1].ln_2.scale)


REMOTE = """
import torch
from transformers import AutoModelForCausalLM
for folder in ({folder!r}, {again!r}):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(torch.tensor({ids})).logits, folder + ".pt")
    model.save_pretrained({again!r})  # what was loaded can be saved and loaded in turn
"""


def test_a_folder_loads_where_neither_they_nor_this_library_are(own, tmp_path):
    model, ids = stable_gpt(**METHODS), tokens(2, 8)
    model.save_pretrained(tmp_path / "saved")
    paths = {name: str(tmp_path / path) for name, path in (("folder", "saved"), ("again", "again"))}
    run_without_package(REMOTE.format(**paths, ids=ids.tolist()))
    for folder in ("saved", "again"):
        torch.testing.assert_close(torch.load(tmp_path / f"{folder}.pt"), model(ids).logits, rtol=1e-5, atol=1e-6)
    assert files(tmp_path / "saved") == files(tmp_path / "again")


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def test_a_process_without_the_module_is_told_to_import_it(own, tmp_path, monkeypatch):
    stable_gpt(**METHODS).save_pretrained(tmp_path / "gpt")
    del registry._METHODS["norm"]["tanh"]
    with pytest.raises(ValueError, match=r"norm = 'tanh': allowed are .*; import the module that registers another"):
        StableGPTForCausalLM.from_pretrained(tmp_path / "gpt")


def test_the_command_line_is_told_which_modules_to_import(own, tmp_path, capsys):
    model, ids = stable_gpt(**METHODS, reparam="sigma"), tokens(2, 8)
    model.save_pretrained(tmp_path / "gpt")
    registry._METHODS["norm"].pop("tanh")
    registry._METHODS["attention"].pop("repel")
    del sys.modules["own_methods"]
    assert convert(["folded", str(tmp_path / "gpt"), str(tmp_path / "out")]) == 1
    assert "import the module that registers another one" in capsys.readouterr().err.splitlines()[-1]
    assert convert(["folded", str(tmp_path / "gpt"), str(tmp_path / "out"), "--methods", "own_methods"]) == 0
    plain = StableGPTForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.reparam == "none"
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_update_of_a_folder_keeps_them(own, tmp_path, capsys):
    stable_gpt(**METHODS).save_pretrained(tmp_path / "gpt")
    before = files(tmp_path / "gpt")
    del registry._METHODS["norm"]["tanh"], registry._METHODS["attention"]["repel"]
    (tmp_path / "gpt" / "configuration_stable_gpt.py").write_text(before["keywords.py"])
    assert update([str(tmp_path / "gpt")]) == 0
    assert capsys.readouterr().out.endswith("gpt: configuration_stable_gpt.py\n")
    assert files(tmp_path / "gpt") == before


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("wide", "import numpy\n" + OWN, "norm = 'tanh', which wide registers, cannot be saved with the model: it imports nu"),
        ("near", "from . import own\n" + OWN, "it imports .; allowed are torch, the standard library and names of stable_core"),
        ("whole", "import stable_core.norms\n" + OWN, "it imports stable_core.norms; allowed are"),
        ("keywords", OWN, "keywords.py, which registers a method: this library has a file of that name"),
        ("__main__", OWN, "which __main__ registers, cannot be saved with the model: allowed are modules that are imported"),
        ("typed", None, "which typed registers, cannot be saved with the model: allowed are modules that are imported"),
    ],
)  # fmt: skip
def test_a_module_that_cannot_go_along_is_refused(name, text, error, own, tmp_path, monkeypatch):
    del registry._METHODS["norm"]["tanh"], registry._METHODS["attention"]["repel"]
    module = type(sys)(name)
    monkeypatch.setitem(sys.modules, name, module)
    if text is not None:
        module.__file__ = str(tmp_path / f"{name}.py")
        (tmp_path / f"{name}.py").write_text(text)
    exec(compile(OWN, name, "exec"), module.__dict__)
    with pytest.raises(ValueError) as raised:
        stable_gpt(**METHODS).save_pretrained(tmp_path / "gpt")
    assert error in str(raised.value)
    assert not (tmp_path / "gpt").exists()
