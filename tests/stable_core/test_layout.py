"""The state dict says which weights, rows and orientation a sigma is of: no file is folded, or loaded, as something else."""

import copy
import io
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stable_core import SigmaReparamConfig, fold, fold_state_dict, sigma_reparam
from stable_core.targets import Group, Target


class Conv1D(nn.Module):
    """transformers' layer, y = x W + b."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf))

    def forward(self, x):
        return x @ self.weight


def projections(names: str, width: int = 12, out: int = 12) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(width, out) for name in names.split()})


def nested() -> nn.Module:
    """An attention inside of another one, both by the same names."""
    outer = projections("q_proj k_proj v_proj")
    outer["inner"] = projections("q_proj k_proj v_proj")
    return outer


def trained(model: nn.Module, **settings) -> nn.Module:
    return moved(sigma_reparam(model, SigmaReparamConfig(**settings)))


def moved(model: nn.Module) -> nn.Module:
    """By an optimizer, so that u is near the singular vectors, not at them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model


def copies(qkv: str) -> nn.Module:
    """As nn.TransformerEncoder copies its layer: nothing in a copy knows which one it is."""
    attention = sigma_reparam(projections("to_q to_k to_v"), SigmaReparamConfig(qkv=qkv))
    return moved(nn.ModuleList(copy.deepcopy(attention) for _ in range(11)))


def unequal(monkeypatch, rows: list[int]) -> nn.Module:
    """A packed weight whose blocks are no thirds, as of grouped queries."""
    model = nn.Sequential(nn.Linear(16, sum(rows)))
    monkeypatch.setitem(sigma_reparam.__globals__, "find_groups", lambda *_: [Group([Target(model[0], "0")], rows)])
    return trained(model)


MODELS = {
    "square Conv1D": lambda _: trained(nn.Sequential(Conv1D(12, 12), Conv1D(12, 12))),
    "packed Conv1D, joint": lambda _: trained(nn.ModuleDict({"c_attn": Conv1D(36, 12)}), qkv="joint"),
    "MultiheadAttention": lambda _: trained(nn.MultiheadAttention(12, 2), qkv="qk_joint"),
    "MultiheadAttention of other sizes": lambda _: trained(nn.MultiheadAttention(12, 2, kdim=8, vdim=8)),
    "known names above": lambda _: trained(nn.ModuleDict({"value": projections("wq wk wv")}), qkv="joint"),
    "known names above, q and k": lambda _: trained(
        nn.ModuleDict({"q": projections("to_q to_k to_v")}), qkv="qk_joint"
    ),
    "attention in attention": lambda _: trained(nested(), qkv="joint"),
    "copies": lambda _: copies("joint"),
    "copies, q and k": lambda _: copies("qk_joint"),
    "grouped queries": lambda patch: unequal(patch, [16, 4, 4]),
    "q and k, and a narrow v": lambda patch: unequal(patch, [24, 4]),
}


def written(state: dict, how: str) -> dict:
    if how == "safetensors":
        return load(save(state))
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("how", ["torch.save", "safetensors"])
@pytest.mark.parametrize("name", MODELS)
def test_a_file_folds_as_the_model_does(name, how, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[name](monkeypatch)
    folded = fold_state_dict(written(model.state_dict(), how))
    torch.testing.assert_close(folded, dict(fold(model).state_dict()), rtol=1e-6, atol=1e-6)


def test_layers_that_were_renamed_and_wrapped():
    """As by peft, which wraps some of them."""
    model = trained(projections("q_proj k_proj v_proj"), qkv="joint")
    names = {"q_proj": "model.query.base_layer", "k_proj": "model.k", "v_proj": "model.value.base_layer"}
    state = {names[k.partition(".")[0]] + k[6:]: x for k, x in model.state_dict().items()}
    expected = {names[k.partition(".")[0]] + k[6:]: x for k, x in fold(model).state_dict().items()}
    torch.testing.assert_close(fold_state_dict(state), expected, rtol=1e-6, atol=1e-6)


def test_orientation_of_a_square_weight_whose_u_lags_behind():
    """sigma = |W^T u| of W (out, in), which Conv1D keeps as (in, out), and whose other image may be the longer one."""
    W, u = torch.tensor([[0.1, 3.0], [0.0, 0.2]]), torch.tensor([1.0, 0.0])
    assert (W @ u).norm() < (W.T @ u).norm()
    conv = Conv1D(2, 2)
    conv.weight.data.copy_(W)
    sigma_reparam(conv, SigmaReparamConfig(gamma_init="one"))
    conv.parametrizations.weight[0].u.copy_(u)
    torch.testing.assert_close(fold_state_dict(conv.state_dict())["weight"], W / 0.1)


# ------------------------------------------------------------------------------------------------------- loading


def attention(qkv: str) -> nn.Module:
    return sigma_reparam(projections("q_proj k_proj v_proj"), SigmaReparamConfig(qkv=qkv))


def packed(qkv: str) -> nn.Module:
    return sigma_reparam(nn.ModuleDict({"attn": nn.MultiheadAttention(12, 2)}), SigmaReparamConfig(qkv=qkv))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "saved, model, message",
    [
        (
            lambda: sigma_reparam(nn.ModuleDict({"fc": nn.Linear(12, 12)})),
            lambda: sigma_reparam(nn.ModuleDict({"fc": Conv1D(12, 12)})),
            r"fc: the state dict has sigmas of 12 rows of \(out, in\), the model sigmas of 12 rows of \(in, out\)",
        ),
        (
            lambda: packed("qk_joint"),
            lambda: packed("separate"),
            r"attn\.in_proj_weight: the state dict has sigmas of 24, 12 rows .*, the model sigmas of 12, 12, 12 rows",
        ),
        (
            lambda: attention("joint"),
            lambda: attention("separate"),
            r"q_proj: the state dict has sigmas of 36 rows .* shared by q_proj, k_proj, v_proj, .* number 1, the model",
        ),
    ],
)
def test_another_layout_is_refused_in_one_line(saved, model, message, strict):
    with pytest.raises(ValueError, match=message) as error:
        model().load_state_dict(saved().state_dict(), strict=strict)
    assert "\n" not in str(error.value)


def without_layouts(state: dict) -> dict:
    return {key: x for key, x in state.items() if not key.endswith("_extra_state")}


@pytest.mark.parametrize("qkv", ["separate", "joint", "qk_joint"])
def test_state_dicts_from_before_load_and_fold(qkv):
    """By the names and shapes that this library's own models have, as they were folded before."""
    model = nn.ModuleDict({"split": projections("q_proj k_proj v_proj"), "packed": nn.MultiheadAttention(12, 2)})
    model["tall"], model["square"] = Conv1D(30, 12), Conv1D(12, 12)
    trained(model, qkv=qkv)
    old = without_layouts(model.state_dict())
    assert len(old) < len(model.state_dict())
    other = sigma_reparam(copy.deepcopy(fold(copy.deepcopy(model))), SigmaReparamConfig(qkv=qkv))
    assert str(other.load_state_dict(dict(old))) == "<All keys matched successfully>"
    assert all(torch.equal(x, other.state_dict()[key]) for key, x in model.state_dict().items())
    torch.testing.assert_close(fold_state_dict(old), dict(fold(model).state_dict()), rtol=1e-6, atol=1e-6)


def test_distributed_checkpoints_from_before(tmp_path):
    model, other = trained(nn.Sequential(nn.Linear(9, 7))), sigma_reparam(nn.Sequential(nn.Linear(9, 7)))
    dcp.save(without_layouts(get_model_state_dict(model)), checkpoint_id=tmp_path)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_model_state_dict(other, state)
    assert all(torch.equal(x, other.state_dict()[key]) for key, x in model.state_dict().items())
    set_model_state_dict(other, without_layouts(get_model_state_dict(model)))


# ------------------------------------------------------------------------------- what is done to models and state dicts


def averaged(model: nn.Module) -> nn.Module:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    return average.module


def assigned(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model).to("meta")
    other.load_state_dict(model.state_dict(), assign=True)
    return other


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: copy.deepcopy(model).half(),
        lambda model: copy.deepcopy(model).to("meta").to_empty(device="cpu"),
        averaged,
        assigned,
    ],
    ids=["deepcopy", "half", "to_empty", "average", "assign"],
)
def test_whatever_becomes_of_a_model_it_knows_what_it_is(change):
    model = attention("qk_joint")
    layouts = {key: x for key, x in model.state_dict().items() if key.endswith("_extra_state")}
    said = {key: json.loads(bytes(x.int().tolist())) for key, x in layouts.items()}
    shared = {"rows": [24], "transposed": False, "members": ["q_proj", "k_proj"]}
    assert list(said.values()) == [{**shared, "index": 0}, {**shared, "index": 1}, {"rows": [12], "transposed": False}]
    changed = change(model).state_dict()
    assert all(torch.equal(x, changed[key]) for key, x in layouts.items())


def drifted(state: dict) -> dict:
    """An exponential moving average over the whole of a state dict, integers not excepted."""
    average = {key: x.clone() for key, x in state.items()}
    for _ in range(2000):
        for key, x in average.items():
            x.mul_(0.9999).add_(state[key], alpha=1 - 0.9999)
    return average


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {key: (x + x + x) / 3 for key, x in state.items()},
        lambda state: {key: x.half() for key, x in state.items()},
        lambda state: {key: x.bfloat16() for key, x in state.items()},
        lambda state: {key: x.double() for key, x in state.items()},
        drifted,
    ],
    ids=["sum", "half", "bfloat16", "double", "average"],
)
def test_arithmetic_on_the_whole_of_a_state_dict_leaves_it_readable(change):
    model = attention("joint")
    changed = change(model.state_dict())
    attention("joint").load_state_dict(changed)
    plain = fold_state_dict({key: x.float() for key, x in changed.items()})
    torch.testing.assert_close(plain, dict(fold(model).state_dict()), rtol=0.02, atol=0.02)


def test_a_state_dict_to_call_the_model_with():
    model, x = sigma_reparam(nn.Linear(9, 7)), torch.randn(3, 9)
    assert torch.equal(torch.func.functional_call(model, model.state_dict(), x), model(x))


# ------------------------------------------------------------------------------------------------------- refusals


def leave_out(state: dict, layer: str) -> dict[str, Tensor]:
    return {key: x for key, x in state.items() if not key.startswith(layer)}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda state: leave_out(state, "k_proj"),
            "v_proj.weight: it shares its sigma with k_proj, of which .* none near",
        ),
        (
            lambda state: leave_out(state, "v_proj"),
            "k_proj.weight: the state dict holds no weight with which the sigma",
        ),
        (
            lambda state: state | {k.replace("k_proj", "k_2"): x for k, x in state.items()},
            "v_proj.weight: .* k_proj, of which the state dict holds k_proj.weight and k_2.weight near it",
        ),
        (
            lambda state: {k: x * 0.8 if k.endswith("_extra_state") else x for k, x in state.items()},
            "q_proj.weight: its _extra_state in the state dict is damaged; take that key out",
        ),
    ],
)
def test_a_state_dict_that_is_not_whole_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fold_state_dict(change(attention("joint").state_dict()))
