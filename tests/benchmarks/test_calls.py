"""The count of operator calls, against models whose calls can be counted by hand."""

import json
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from benchmarks import calls
from benchmarks.families import Family, Step

CPU = torch.device("cpu")


class Doubled(nn.Module):
    def forward(self, W):
        return 2 * W


def two_layers(doubled: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for layer in model if doubled else ():
        parametrize.register_parametrization(layer, "weight", Doubled())
    return model


def counted(doubled: bool, autocast: bool = False) -> calls.StepCalls:
    family = Family(
        {"it": lambda: two_layers(doubled)},
        ["it"],
        lambda n, generator: (torch.randn(n, 3, generator=generator),),
        lambda model, batch: model(*batch).sum(),
        "rows",
        (5,),
    )
    return calls.count(Step(family, "it", 5, CPU, autocast, calls.adamw))


def test_two_layers_counted_by_hand():
    found = counted(False)
    assert found.forward == {"addmm": 2, "sum": 1}
    # Of the second layer the gradients of weight, bias and input, of the first one no input's; the sum's is a view of a one.
    assert found.backward == {"ones_like": 1, "mm": 3, "sum": 2}
    assert found.optimizer == {"_foreach_add_": 1, "_fused_adamw_": 1}  # its count of steps, and the update
    assert found.all().total() == 11


def test_a_parametrization_adds_its_own_calls_and_no_more():
    plain, doubled = counted(False), counted(True)
    assert doubled.forward - plain.forward == doubled.backward - plain.backward == {"mul": 2}
    assert doubled.optimizer == plain.optimizer


def test_autocast_adds_its_casts():
    """Of the input, and of weights and biases of both layers; what the second layer is given is of bfloat16 already."""
    assert counted(False, autocast=True).forward - counted(False).forward == {"_to_copy": 5}


def test_views_are_no_calls_and_allocations_are_told_apart():
    x = torch.zeros(2, 3)
    with calls.Calls() as found:
        x.t().reshape(6)[1:].unsqueeze(0).detach().expand(4, 5)  # only the transposed one is copied
        torch.empty_like(x)
        x.add_(1)
    assert found.by_name == {"clone": 1, "empty_like": 1, "add_": 1}


@pytest.mark.parametrize("depth", [1, 2])
def test_the_command_divides_by_the_weights(monkeypatch, tmp_path, depth):
    monkeypatch.setattr(sys, "argv", ["calls", "--depth", str(depth), "--out", str(tmp_path / "calls")])
    calls.main()
    rows = {(row["title"], row["name"]): row for row in json.loads((tmp_path / "calls.json").read_text())["rows"]}
    assert len(rows) == 8
    for (title, _), row in rows.items():
        plain = rows[title, "pre-LN"]
        assert row["values"] == [row["forward"] + row["backward"] + row["optimizer"]]
        if row is not plain:
            more = row["values"][0] - plain["values"][0]
            assert row["more a weight"] == pytest.approx(more / (4 * depth + 2))  # qkv, proj, fc1, fc2; patches, head
