"""fairseq plugin: `fairseq-train --user-dir plugins/fairseq_sigma --arch sigma_transformer_18l ...`."""

from . import mend

mend.apply()

from . import half_precision, monitor, transformer  # noqa: E402, F401  on a mended fairseq; the last registers archs

half_precision.advance_after_write_back()
monitor.install()
