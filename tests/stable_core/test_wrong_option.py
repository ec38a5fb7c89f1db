"""What is told of a setting that is not allowed, here and in the process that asked another one."""

import pickle

import pytest

from stable_core.options import Options


@pytest.mark.parametrize(
    ("settings", "told", "flag"),
    [
        ({"alpha": 0.7}, "alpha = 0.7: allowed are numbers from 0 to 0.5", "--alpha 0.7: allowed are numbers from 0 to 0.5"),
        ({"tau_scale": 0}, "tau_scale = 0: allowed are positive numbers", "--tau-scale 0: allowed are positive numbers"),
        ({"residual": "none"}, "residual = 'none': allowed are 'pre-ln', 'post-ln', 'deepnorm'",
         "--residual none: allowed are 'pre-ln', 'post-ln', 'deepnorm'"),
    ],
)  # fmt: skip
def test_it_is_one_line(settings, told, flag):
    with pytest.raises(ValueError) as raised:
        Options(**settings)
    for error in (raised.value, pickle.loads(pickle.dumps(raised.value))):
        assert (str(error), error.args, error.as_flag()) == (told, (told,), flag)
