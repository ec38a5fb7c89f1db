"""fairseq plugin: `fairseq-train --user-dir plugins/fairseq_sigma --arch sigma_transformer_18l ...`."""

from . import mend

mend.apply()

from . import transformer  # noqa: E402, F401  registers the model and its archs, on a mended fairseq
