"""The methods of σReparam and Stable-Transformer, for any torch model. Needs torch and nothing else.

What each file is for, in the order in which to read them:

    reference.py            every equation, slow and plain: what all the rest computes

    options.py              what a user chooses: one dataclass, from which each stack makes its keywords and flags
    registry.py             the methods by name, and how to add one of your own
    norms.py                the norms of a block: LayerNorm, RMSNorm, StableNorm, none
    stable_norm.py          StableNorm
    attentions.py           what softmax sees: dot products, QK-norm, StableAtten, L2
    stable_attention.py     StableAtten as a module of its own
    residuals.py            pre-LN, post-LN, DeepNorm
    deepnorm.py             DeepNorm's alpha and beta
    inits.py                the first weights: the stack's own, StableInit, Xavier
    stable_init.py          StableInit
    init_std.py             the papers' standard deviations, by width
    reparams.py             σReparam, spectral norm and weight norm by name
    z_loss.py               a term of the loss that keeps the output's logits in place

    sigma_reparam.py        σReparam: W_hat = gamma / sigma(W) W, and what happens to a layer that has it
    targets.py              which weights of a model have it, and which of them share a sigma
    layers.py               the catalogue: what attention modules call their projections, and how these are packed
    scale_by_sigma.py       sigma, W_hat and their gradients
    power_iteration.py      u and v, the top singular vectors
    advancing.py            one power iteration after each step of an optimizer
    watching.py             how a weight that changed without a step is noticed
    originals.py            where W is kept, and how W tells which parametrization it belongs to
    layout.py               what the state dict says of a sigma, beside its numbers
    sharding.py             weights that are cut up over processes
    recomputing.py          training without a copy of every weight
    together.py             sigma of all layers at once, on a GPU
    kernels.py              the same arithmetic in Triton; kernels_sigma.py has the kernels
    sigma_layers.py         finds the layers that have σReparam
    param_groups.py         optimizer groups: gamma without weight decay, Muon's matrices
    unfolding.py            a plain checkpoint for a model with σReparam
    folding.py              back to plain layers; fold_checkpoint.py is the command, checkpoint_file.py reads the file

    attention_entropy.py    attention entropy without the attention matrix; kernels_attention.py has it in Triton
    theory.py               the papers' bounds: least entropy, largest logit, size of an Adam update
    qk_clip.py              QK-clip: smaller weights for heads whose logits grew too large
    bounding.py             σReparam for queries and keys whose entropy has collapsed, with gamma in bounds
    interrupted.py          what is undone where a forward pass ends in an error
    extras.py               what to install where an import fails
"""

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
from .unfolding import unfold_optimizer_state, unfold_state_dict
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
    "unfold_optimizer_state",
    "unfold_state_dict",
    "z_loss",
]
