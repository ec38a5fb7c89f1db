"""A Trainer that leaves gamma out of weight decay."""

from torch import nn

from stable_core import sigma_layers


class UndecayedGamma:
    """For any Trainer class: `class MyTrainer(hf_stable.UndecayedGamma, Trainer): pass`.

    Trainer decays what is no bias and of no norm, so gamma, the spectral norm of its layer, too, and would pull it to zero.
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return without_gammas(model, super().get_decay_parameter_names(model))


def without_gammas(model: nn.Module, names: list[str]) -> list[str]:
    """The names of parameters without those of gammas."""
    gammas = {id(sigma.gamma) for _, sigma in sigma_layers(model)}
    parameters = dict(model.named_parameters())
    return [name for name in names if id(parameters.get(name)) not in gammas]
