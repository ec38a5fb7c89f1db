"""fairseq plugin: `fairseq-train --user-dir plugins/fairseq_sigma --arch sigma_transformer_18l ...`."""

from . import mend

mend.apply()

from . import (  # noqa: E402  on a mended fairseq; models and tasks register themselves
    half_precision,
    language_model,  # noqa: F401
    monitor,
    optim,
    speech_task,  # noqa: F401
    transformer,  # noqa: F401
)

half_precision.advance_after_write_back()
monitor.install()
optim.scale_learning_rates()
