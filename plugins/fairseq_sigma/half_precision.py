"""u under --fp16 and --bf16, whose optimizer steps fp32 copies and then writes them back into the model."""

import functools

from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin

from stable_core import advance


@functools.cache
def advance_after_write_back() -> None:
    """Has u advance when the model's own weights change; the optimizer's step hook comes one moment too early."""
    write_back = _FP16OptimizerMixin._sync_fp32_params_to_fp16

    @functools.wraps(write_back)
    def wrapped(self):
        write_back(self)
        advance(self.fp16_params)

    _FP16OptimizerMixin._sync_fp32_params_to_fp16 = wrapped
