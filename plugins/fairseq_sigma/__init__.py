"""fairseq plugin: `fairseq-train --user-dir plugins/fairseq_sigma --arch sigma_transformer_18l ...`."""

from stable_core.extras import extra

with extra("fairseq"):
    from . import mend

    mend.apply()

    from . import (  # on a mended fairseq; models and tasks register themselves
        checkpoints,
        ema,
        half_precision,
        language_model,  # noqa: F401
        monitor,
        optim,
        qk_clip,
        quantisation,
        resume,
        speech_task,  # noqa: F401
        transformer,  # noqa: F401
        z_loss,
    )

resume.install()
checkpoints.name_what_does_not_fit()
ema.follow_the_model()
half_precision.advance_after_write_back()
monitor.install()
optim.scale_learning_rates()
qk_clip.install()
quantisation.refuse_reparametrised_models()
z_loss.install()
