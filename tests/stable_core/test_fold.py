"""Folding gives plain layers with the same outputs, in memory and from a file."""

import copy
import subprocess

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from stable_core import SigmaReparamConfig, fold, fold_state_dict, sigma_reparam
from tests.warm import PYTHON


class Conv1D(nn.Module):
    """transformers' layer, y = x W + b."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Model(nn.Module):
    """One of everything that can be reparametrised."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(6, 24, 3, padding=1)
        self.packed = nn.MultiheadAttention(24, 2, batch_first=True)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(24, 24) for _ in range(3))
        self.c_attn, self.c_proj = Conv1D(72, 24), Conv1D(24, 24)
        self.head = nn.Linear(24, 1)

    def forward(self, x):
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.packed(x, x, x)[0]
        x = nn.functional.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = self.c_attn(x).split(24, dim=-1)
        return self.head(self.c_proj(nn.functional.scaled_dot_product_attention(q, k, v)))


CONFIGS = [SigmaReparamConfig(qkv=qkv) for qkv in ("separate", "joint", "qk_joint")]
CONFIGS += [SigmaReparamConfig(kind="spectral"), SigmaReparamConfig(kind="weight")]


@pytest.fixture(params=CONFIGS, ids=lambda config: f"{config.kind}-{config.qkv}")
def trained(request):
    torch.manual_seed(0)
    model = sigma_reparam(Model(), request.param)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 9, 6)).square().mean().backward()
        optimizer.step()
    return model


def test_fold_gives_the_same_outputs_and_leaves_no_trace(trained):
    x = torch.randn(4, 9, 6)
    before, keys = trained(x), Model().state_dict().keys()
    assert fold(trained) is trained
    assert torch.equal(trained(x), before)
    assert trained.state_dict().keys() == keys
    assert {name for name, _ in trained.named_parameters()} == {name for name, _ in Model().named_parameters()}
    assert not any(parametrize.is_parametrized(module) for module in trained.modules())
    assert [type(module) for module in trained.modules()] == [type(module) for module in Model().modules()]
    trained.load_state_dict(Model().state_dict())


def test_folding_a_copy_leaves_the_model_in_training(trained):
    x = torch.randn(4, 9, 6)
    before = trained(x)
    folded = fold(copy.deepcopy(trained))
    torch.testing.assert_close(folded(x), before)
    assert torch.equal(trained(x), before)
    trained(x).sum().backward()


def test_a_saved_state_dict_folds_the_same(trained):
    x = torch.randn(4, 9, 6)
    plain = Model()
    plain.load_state_dict(fold_state_dict(trained.state_dict()))
    torch.testing.assert_close(plain(x), trained(x), rtol=1e-5, atol=1e-5)


def test_an_average_of_state_dicts_folds_to_what_the_model_makes_of_it():
    def state(seed):
        torch.manual_seed(seed)
        return sigma_reparam(Model()).state_dict()

    mean = {key: (a + b) / 2 for (key, a), b in zip(state(1).items(), state(2).values(), strict=True)}
    model, plain, x = sigma_reparam(Model()), Model(), torch.randn(4, 9, 6)
    model.load_state_dict(mean)
    plain.load_state_dict(fold_state_dict(mean))
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)


def fold_file(folder) -> subprocess.CompletedProcess:
    files = [str(folder / name) for name in ("checkpoint.pt", "plain.pt")]
    return subprocess.run([PYTHON, "-m", "stable_core.fold_checkpoint", *files], capture_output=True, text=True)


def test_the_command_line_folds_a_checkpoint(trained, tmp_path):
    torch.save({"model": trained.state_dict(), "step": 3}, tmp_path / "checkpoint.pt")
    done = fold_file(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    out = torch.load(tmp_path / "plain.pt")
    assert out["step"] == 3
    plain, x = Model(), torch.randn(4, 9, 6)
    plain.load_state_dict(out["model"])
    torch.testing.assert_close(plain(x), trained(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"model": nn.Linear(2, 2).state_dict()}, "no reparametrised layer"),
        ([1, 2], "not a state dict"),
        (None, "/checkpoint.pt: No such file or directory"),
    ],
)
def test_the_command_line_refuses_in_one_line(content, message, tmp_path):
    if content is not None:
        torch.save(content, tmp_path / "checkpoint.pt")
    done = fold_file(tmp_path)
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert "Errno" not in done.stderr
    assert not (tmp_path / "plain.pt").exists()


@pytest.mark.parametrize("qkv", ["joint", "qk_joint"])
def test_narrow_projections_with_a_joint_sigma(qkv):
    layers = nn.ModuleDict({name: nn.Linear(100, 30) for name in ("q_proj", "k_proj", "v_proj")})
    sigma_reparam(layers, SigmaReparamConfig(qkv=qkv))
    folded = fold_state_dict(layers.state_dict())
    for name, layer in layers.items():
        torch.testing.assert_close(folded[f"{name}.weight"], layer.weight)


def test_other_parametrizations_are_left_alone():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5))
    sigma_reparam(model, filter_fn=lambda module, name: name == "1")
    torch.nn.utils.parametrizations.orthogonal(model[0])
    torch.nn.utils.parametrizations.weight_norm(model[2])
    others = [key for key in model.state_dict() if not key.startswith("1.")]
    assert set(others) - {"2." + k for k in model[2].state_dict()} <= set(fold_state_dict(model.state_dict()))
    fold(model)
    assert [key for key in model.state_dict() if not key.startswith("1.")] == others
    assert not parametrize.is_parametrized(model[1])


def test_a_part_of_a_joint_group_is_not_folded():
    layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj")})
    sigma_reparam(layers, SigmaReparamConfig(qkv="joint"))
    before = [layer.weight.clone() for layer in layers.values()]
    with pytest.raises(ValueError, match="weight: it shares its sigma with a layer outside of what is folded"):
        fold(layers["q_proj"])
    assert all(torch.equal(layer.weight, W) for layer, W in zip(layers.values(), before, strict=True))


def test_refusals_change_nothing():
    with pytest.raises(ValueError, match="Linear: nothing to fold"):
        fold(nn.Linear(3, 3))
    model = sigma_reparam(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)))
    with torch.no_grad():
        model[1].parametrizations.weight[0].gamma.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"1\.weight: its folded weight holds NaN"):
        fold(model)
    assert parametrize.is_parametrized(model[0]) and parametrize.is_parametrized(model[1])


def test_a_sharded_model_is_refused():
    """One process is enough to shard over."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(sigma_reparam(nn.Linear(70, 80)), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"weight: its weight is sharded; gather the state dict"):
            fold(model)
    finally:
        dist.destroy_process_group()
