"""A checkpoint of another arch ends in one line that says what to do, where torch would list every key of every layer."""

import functools
import re

from fairseq.trainer import Trainer
from torch import nn

from stable_core import unfold_state_dict
from stable_core.layout import KEY
from stable_core.sigma_layers import sigma_layers

PLAIN = (
    "the checkpoint holds plain weights and the model is reparametrised: use --reparam none, "
    "or --reparam sigma --gamma-init spectral, which keep what it computes"
)
REPARAMETRISED = (
    "the checkpoint is reparametrised and the model is not: use the arch and --reparam it was trained with, "
    "or fold it with python -m fairseq_sigma.export"
)


def fitted(model: nn.Module, loaded: dict, layers: bool = True) -> dict:
    """`loaded` as the model loads it: plain weights become those of its σReparam where gamma = sigma keeps the function.

    Raises:
        ValueError: as `check_fits`; plain weights are of another shape than the model's, or not finite.
    """
    configs = [sigma.config for _, sigma in sigma_layers(model)]
    if configs and all(config.keeps_function for config in configs):
        loaded = unfold_state_dict(model, loaded)
    check_fits(model.state_dict(), loaded, layers)
    return loaded


def check_fits(own: dict, loaded: dict, layers: bool = True) -> None:
    """Raises ValueError: the state dict `loaded` is not for a model whose own is `own`; `layers`: their number counts too."""
    loaded_sigma = any("parametrizations." in key for key in loaded)
    own_sigma = any("parametrizations." in key for key in own)
    if own_sigma != loaded_sigma:
        raise ValueError(REPARAMETRISED if loaded_sigma else PLAIN)
    for side in ("encoder", "decoder") if layers else ():
        mine, theirs = (
            {m[1] for key in keys if (m := re.match(rf"{side}\.layers\.(\d+)\.", key))} for keys in (own, loaded)
        )
        if len(mine) != len(theirs):
            raise ValueError(
                f"the checkpoint has {len(theirs)} {side} layers and the model {len(mine)}: use --{side}-layers {len(theirs)}"
            )
    for one, other, holder in ((own, loaded, "model"), (loaded, own, "checkpoint")):
        if norms := sorted(_norms(one) - _norms(other)):
            raise ValueError(
                f"{norms[0]}: only the {holder} has it: use the --norm, --attention and --residual of the checkpoint"
            )
    for key in own.keys() & loaded.keys():
        compared_on_loading = f"{key.rpartition('.')[0]}.{KEY}" in loaded
        if own[key].shape != loaded[key].shape and not compared_on_loading:
            raise ValueError(
                f"{key}: the checkpoint has shape {tuple(loaded[key].shape)}, the model {tuple(own[key].shape)}"
            )


def _norms(state: dict) -> set[str]:
    """What the state dict has of norms, whichever layers those are in."""
    return {re.sub(r"\.\d+\.", ".N.", key) for key in state if re.search(r"(_norm|q_norm|k_norm)\.\w+$", key)}


@functools.cache
def name_what_does_not_fit() -> None:
    """Ends fairseq-train with that line, where its trainer says of any error that the architectures must match."""
    Trainer.load_checkpoint = _with_the_cause(Trainer.load_checkpoint)


def _with_the_cause(load_checkpoint):
    @functools.wraps(load_checkpoint)
    def wrapped(self, filename, *args, **kwargs):
        try:
            return load_checkpoint(self, filename, *args, **kwargs)
        except Exception as error:
            cause = error.__context__
            if isinstance(cause, ValueError):
                raise ValueError(f"{filename}: {cause}") from None
            if isinstance(cause, RuntimeError) and "parametrizations." in str(cause):  # into an arch of fairseq's own
                raise ValueError(f"{filename}: {REPARAMETRISED}") from None
            raise

    return wrapped
