"""The note in a reparametrised model's config.json that stops transformers where hf_stable is not imported.

transformers only warns of a `quant_method` that it does not know, and goes on with random weights. The file of weights that
`transformers_weights` names it must have: a name that is none is an error before anything is loaded, with the name in it.
Where hf_stable is imported, the note is taken out while the file is read, and the weights are where they always are.
"""

import json
import os
import tempfile
from functools import wraps
from pathlib import Path

from transformers import PreTrainedConfig

METHOD = "sigma_reparam"
KEY = "transformers_weights"
NOTE = (
    "this model has σReparam: `import hf_stable` (stable-transformer) before from_pretrained, "
    "or save hf_stable.fold(model), which needs transformers alone"
)


def leave_notes() -> None:
    """From now on transformers writes the note with the config of a reparametrised model, and reads past it."""
    write, read = PreTrainedConfig.to_json_file, PreTrainedConfig._dict_from_json_file.__func__

    @wraps(write)
    def to_json_file(self, json_file_path, *args, **kwargs):
        write(self, json_file_path, *args, **kwargs)
        annotate(Path(json_file_path))

    @wraps(read)
    def _dict_from_json_file(cls, json_file):
        config = read(cls, json_file)
        return {key: value for key, value in config.items() if (key, value) != (KEY, NOTE)}

    PreTrainedConfig.to_json_file = to_json_file
    PreTrainedConfig._dict_from_json_file = classmethod(_dict_from_json_file)


def annotate(path: Path) -> bool:
    """Puts the note into a config.json that says that its model is reparametrised; returns whether it was missing."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if (config.get("quantization_config") or {}).get("quant_method") != METHOD or config.get(KEY) == NOTE:
        return False
    text = json.dumps({**config, KEY: NOTE}, indent=2, ensure_ascii=False) + "\n"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".config-") as scratch:
        whole = Path(scratch, path.name)
        whole.write_text(text, encoding="utf-8")
        os.replace(whole, path)
    return True
