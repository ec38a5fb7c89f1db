"""The methods of σReparam and Stable-Transformer, for any torch model. Needs torch and nothing else."""

from .deepnorm import deepnorm_scales
from .folding import fold, fold_state_dict
from .param_groups import param_groups
from .sigma_reparam import SigmaReparamConfig, advance, converge, sigma_reparam

__all__ = [
    "SigmaReparamConfig",
    "advance",
    "converge",
    "deepnorm_scales",
    "fold",
    "fold_state_dict",
    "param_groups",
    "sigma_reparam",
]
