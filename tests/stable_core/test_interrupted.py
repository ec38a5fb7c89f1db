"""What is done where a forward pass ends in an error, whatever its kind and whatever else is on the model."""

import copy
import pickle

import pytest
import torch
from torch import nn

from stable_core.interrupted import compiled_call, on_error


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.error, self.weight = None, nn.Parameter(torch.ones(2))

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return self.weight * x


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), GeneratorExit(), ValueError()], ids=repr)
def test_every_listener_hears_of_every_error_until_it_is_removed(error):
    model, heard = Failing(), []
    handles = [on_error(model, lambda e, i=i: heard.append((i, e))) for i in range(2)]
    assert torch.equal(model(3), torch.full((2,), 3.0)) and heard == []
    model.error = error
    for expected in ([(0, error), (1, error)], [(1, error)], []):
        heard.clear()
        with pytest.raises(type(error)):
            model(3)
        assert heard == expected
        if handles:
            handles.pop(0).remove()
    assert "_compiled_call_impl" not in vars(model)


def test_it_goes_with_no_copy_and_no_pickle():
    model, heard = Failing(), []
    on_error(model, heard.append)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.error = ValueError()
        with pytest.raises(ValueError):
            other(1)
    assert heard == []


def test_a_compiled_model_stays_compiled():
    model, calls = Failing(), []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    model.compile(backend=backend)
    compiled = model._compiled_call_impl
    handle = on_error(model, calls.append)
    assert compiled_call(model) is compiled
    model(torch.ones(2))
    assert len(calls) == 1
    handle.remove()
    assert model._compiled_call_impl is compiled
    handle = on_error(model, calls.append)
    model.compile(backend="eager")  # meanwhile
    newer = model._compiled_call_impl
    handle.remove()
    assert model._compiled_call_impl is newer
