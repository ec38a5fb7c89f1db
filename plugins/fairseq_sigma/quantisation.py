"""`--quantization-config-path`, fairseq's iterative product quantisation, which no reparametrised model can take."""

import functools

from fairseq.quantization_utils import Quantizer
from torch.nn.utils.parametrize import is_parametrized

from .blocks import NO_NOISE


@functools.cache
def refuse_reparametrised_models() -> None:
    """Refuses what would replace reparametrised layers by layers of codes, whatever arch they are in."""
    Quantizer.set_trainer = _refusing(Quantizer.set_trainer)


def _refusing(set_trainer):
    @functools.wraps(set_trainer)
    def wrapped(self, trainer):
        if any(is_parametrized(module) for module in trainer.get_model().modules()):
            raise ValueError(f"--quantization-config-path: allowed with --reparam none only. {NO_NOISE}")
        return set_trainer(self, trainer)

    return wrapped
