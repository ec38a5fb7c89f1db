"""The tables of this recipe, for `python -m recipes.tables`."""

from recipes.tables import Page, Section

from .alarms import by_log
from .figures import RESULTS, TITLES, described, rows_of

ON_A_GPU = " --device cuda --jobs 16"
COMMANDS = {  # after `python -m recipes.lr_sensitivity.run`; of gpt... also --data and --output
    "gpt": "gpt",
    "vit": "vit",
    "translation": "translation",
    "gpt-muon": "gpt-muon --variants plain qk-norm sigma stable-sigma",
    "gpt-longer": "gpt --updates 1000 --rates 1e-3 3e-3 1e-2 3e-2 1e-1 --variants plain sigma",
    "gpt-25m": f"gpt-25m --variants plain qk-norm sigma stable-sigma{ON_A_GPU}",
    "gpt-85m": f"gpt-85m --variants plain qk-norm sigma stable-sigma{ON_A_GPU}",
    "gpt-85m-low": f"gpt-85m --rates 3e-5 1e-4 --variants plain qk-norm sigma stable-sigma{ON_A_GPU}",
    "gpt-parts": "gpt --variants stable-norm stable-attention stable-init spectral weight no-norm-sigma-1 no-norm-sigma",
    "translation-residual": "translation --variants post-ln post-ln-sigma deepnorm deepnorm-sigma",
}


def section(name: str, title: str) -> Section:
    text = f"By `python -m recipes.lr_sensitivity.run {COMMANDS[name]}`."
    return Section(title, described(rows_of(RESULTS / f"{name}.jsonl")), text, (f"{name}.jsonl",), f"{name}.png")


def page() -> Page:
    return Page(
        "Every rate, every variant",
        "Mean validation loss of three seeds at each rate; best loss and sensitivity of seeds 1 / 2 / 3. One variant is less "
        "sensitive than another where every seed of it is below every seed of the other; of two that are alike that is so, one "
        "way or the other, once in ten times.",
        [
            *(section(*each) for each in TITLES.items()),
            Section("What the alarm hears", by_log([RESULTS / f"{name}.jsonl" for name in TITLES])),
        ],
    )
