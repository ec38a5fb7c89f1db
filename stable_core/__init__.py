"""The methods of σReparam and Stable-Transformer, for any torch model. Needs torch and nothing else."""

from .advancing import advance
from .attention_entropy import attention_entropy, attention_statistics
from .deepnorm import deepnorm_scales
from .folding import fold, fold_state_dict
from .param_groups import muon_param_groups, param_groups
from .recomputing import recompute
from .sigma_layers import sigma_layers
from .sigma_reparam import SigmaReparamConfig, converge, sigma_reparam
from .stable_attention import StableAttention
from .stable_init import stable_init_
from .stable_norm import StableNorm
from .theory import (
    adam_update_norm_bound,
    entropy_lower_bound,
    qk_norm_logit_bound,
    stable_attention_logit_bound,
)
from .z_loss import WithZLoss, z_loss

__version__ = "0.1.0"

__all__ = [
    "SigmaReparamConfig",
    "StableAttention",
    "StableNorm",
    "WithZLoss",
    "adam_update_norm_bound",
    "advance",
    "attention_entropy",
    "attention_statistics",
    "converge",
    "deepnorm_scales",
    "entropy_lower_bound",
    "fold",
    "fold_state_dict",
    "muon_param_groups",
    "param_groups",
    "qk_norm_logit_bound",
    "recompute",
    "sigma_layers",
    "sigma_reparam",
    "stable_attention_logit_bound",
    "stable_init_",
    "z_loss",
]
