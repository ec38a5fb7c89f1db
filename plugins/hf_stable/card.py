"""The README.md of a converted folder: what its config.json says, how to load it, and what became of the run it comes from."""

import json
from pathlib import Path

from stable_core import __version__
from stable_core.options import NAMES
from stable_monitor.diagnose import diagnose
from stable_monitor.records import FILE_NAME


def records_beside(checkpoint: str | Path) -> Path | None:
    """The folder with the monitor's records: the checkpoint itself, or the one it lies in."""
    checkpoint = Path(checkpoint)
    near = (checkpoint, checkpoint.parent) if checkpoint.exists() else ()
    return next((folder for folder in near if (folder / FILE_NAME).is_file()), None)


def verdict_of(run: Path) -> str:
    """A sentence on the run; raises OSError or ValueError where it cannot be read."""
    return f"The monitor's verdict on the training run {run.absolute().name}: {diagnose(run)[0]}."


def card(config: dict, name: str, verdict: str = "") -> str:
    """Markdown with the head that the Hub reads."""
    auto, *_ = [key for key in reversed(config.get("auto_map") or {}) if key != "AutoConfig"] or ["AutoModel"]
    trust = ", trust_remote_code=True" if config.get("auto_map") else ""
    methods = [f"{option} {config[option]!r}" for option in NAMES if option in config]
    lines = [
        f"---\nlibrary_name: transformers\ntags:\n- {config['model_type']}\n- stable-transformer\n---",
        f"# {name}",
        f"{' '.join(config.get('architectures') or [config['model_type']])}, converted by stable-transformer {__version__}.",
        f"```python\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained({name!r}{trust})\n```",
        f"Methods: {', '.join(methods)}." if methods else "",
        verdict,
    ]
    return "\n\n".join(filter(None, lines)) + "\n"


def write_card(folder: Path, verdict: str = "") -> None:
    """Writes README.md into a folder that has none."""
    if not (folder / "README.md").exists():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "README.md").write_text(card(config, folder.absolute().name, verdict), encoding="utf-8")
