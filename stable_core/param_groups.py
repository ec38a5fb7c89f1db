"""Optimizer groups for a model with σReparam."""

from torch import nn

from .sigma_layers import sigma_layers


def param_groups(model: nn.Module, lr: float, weight_decay: float, gamma_lr_scale: float = 1.0) -> list[dict]:
    """Groups for any torch optimizer: every gamma at lr * gamma_lr_scale without weight decay, then all the rest.

    Decay would pull a gamma, which is the spectral norm of its layer, to zero; large-scale speech wants twice the learning
    rate on it [σ, App. E].

    Raises:
        ValueError: a learning rate or scale that is not positive, or a negative weight decay.
    """
    for name, value in (("lr", lr), ("gamma_lr_scale", gamma_lr_scale)):
        if not value > 0:
            raise ValueError(f"{name} = {value!r}: allowed are positive numbers")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay = {weight_decay!r}: allowed are numbers from 0")
    gammas = [sigma.gamma for _, sigma in sigma_layers(model) if isinstance(sigma.gamma, nn.Parameter)]
    ids = {id(gamma) for gamma in gammas}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups = [
        {"params": gammas, "lr": lr * gamma_lr_scale, "weight_decay": 0.0},
        {"params": others, "lr": lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]
