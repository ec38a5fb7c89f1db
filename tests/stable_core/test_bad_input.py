"""Every mistake gets one line that names the layer or value, and leaves the model as it was."""

import pytest
import torch
from torch import nn

from stable_core import SigmaReparamConfig, deepnorm_scales, param_groups, sigma_reparam


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7))


def damaged(value, row=slice(None)):
    broken = model()
    with torch.no_grad():
        broken[2].weight[row] = value
    return broken


def tied():
    tied = model()
    tied.add_module("embedding", nn.Embedding(7, 6))
    tied[2].weight = tied.embedding.weight
    return tied


@pytest.mark.parametrize(
    "make, config, filter_fn, message",
    [
        (lambda: damaged(0.0), {}, None, "2: its weight is zero, so sigma = 0; initialise it"),
        (lambda: damaged(0.0, 3), {"kind": "weight"}, None, "2: its weight has a row of zeros; initialise it"),
        (lambda: damaged(float("nan"), 0), {}, None, "2: its weight holds NaN or inf"),
        (lambda: damaged(float("inf"), 0), {}, None, "2: its weight holds NaN or inf"),
        (
            lambda: sigma_reparam(model(), filter_fn=lambda m, n: n == "2"),
            {},
            None,
            "2: already reparametrised; fold it",
        ),
        (model, {}, lambda m, n: "attention" in n, "filter_fn matches nothing; its Linear, .* layers: 0, 2"),
        (model, {}, "2", r"filter_fn = '2': allowed are functions filter_fn\(module, name\) -> bool \('str' object"),
        (model, {}, lambda m: True, r"filter_fn = <.*>: allowed are .* takes 1 positional argument but 2 were given\)"),
        (nn.ReLU, {}, None, "ReLU: no layer to reparametrise"),
        (tied, {}, lambda m, n: True, "2: its weight is tied to another layer's; leave it out"),
        (model, {"qkv": "joint"}, None, "qkv = 'joint': no attention found; known are q_proj/k_proj/v_proj"),
        (
            lambda: nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj")}),
            {"qkv": "joint"},
            lambda m, n: n != "k_proj",
            "k_proj: qkv = 'joint' needs it too",
        ),
    ],
)
def test_sigma_reparam_refuses_and_changes_nothing(make, config, filter_fn, message):
    broken = make()
    before = {key: value.clone() for key, value in broken.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        sigma_reparam(broken, SigmaReparamConfig(**config), filter_fn)
    assert "\n" not in str(error.value)
    after = broken.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) or before[key].isnan().any() for key in before)


def test_large_finite_weights_are_not_refused():
    layer = nn.Linear(70, 80)
    nn.init.constant_(layer.weight, 1e35)  # their sum is inf
    sigma_reparam(layer, SigmaReparamConfig(gamma_init="one"))
    assert torch.linalg.matrix_norm(layer.weight.detach(), 2).item() == pytest.approx(1, rel=1e-3)


def test_a_tied_output_projection_is_left_alone():
    left = sigma_reparam(tied())
    assert left[2].weight is left.embedding.weight
    assert "0.parametrizations.weight.0.gamma" in left.state_dict()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"gamma_init": "zero"}, "gamma_init = 'zero': allowed are 'one', 'spectral'"),
        ({"qkv": "qv"}, "qkv = 'qv': allowed are 'separate', 'joint', 'qk_joint'"),
        ({"kind": "batch"}, "kind = 'batch': allowed are"),
        ({"n_power_iterations": 0}, "n_power_iterations = 0: allowed are whole numbers from 1"),
        ({"n_power_iterations": 1.5}, "n_power_iterations = 1.5"),
        ({"stop_gradient": "no"}, "stop_gradient = 'no'"),
        ({"kind": "weight", "qkv": "joint"}, "qkv = 'joint': kind = 'weight' has no such setting"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        SigmaReparamConfig(**wrong)


@pytest.mark.parametrize("config", ["spectral", {}])
def test_a_config_of_another_type_is_refused(config):
    with pytest.raises(ValueError, match=f"config = {config!r}: allowed are None and a SigmaReparamConfig"):
        sigma_reparam(model(), config)


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="gama_init"):
        SigmaReparamConfig(gama_init="one")


def test_a_plain_state_dict_is_refused_in_one_line():
    with pytest.raises(
        ValueError, match=r"^0\.weight: the state dict holds a plain weight; load it into the plain model"
    ) as error:
        sigma_reparam(model()).load_state_dict(model().state_dict())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layers", [(-1, 6), (6, 1.5), (0, 0)])
def test_deepnorm_refuses_impossible_depths(layers):
    with pytest.raises(ValueError, match="layers"):
        deepnorm_scales(*layers)


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"weight_decay": -1}, {"gamma_lr_scale": float("nan")}])
def test_param_groups_refuses_impossible_values(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        param_groups(sigma_reparam(model()), **{"lr": 0.1, "weight_decay": 0.1, **wrong})
