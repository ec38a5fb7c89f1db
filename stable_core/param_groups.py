"""Parameter groups for optimizers: for a single one (`param_groups`), or for Muon and AdamW together (`muon_param_groups`)."""

from typing import Any

from torch import nn

from .layers import is_transposed
from .sigma_layers import sigma_layers
from .targets import FilterFn

# Names of heads, which map to tokens or classes: a layer with one of them as a part of its path is not Muon's.
HEADS = ("head", "heads", "lm_head", "classifier", "output_projection", "adaptive_softmax", "score")
EMBEDDING = "embed"  # the same for a path that contains it, as in embed_tokens, patch_embed, embeddings


def param_groups(model: nn.Module, lr: float, weight_decay: float, gamma_lr_scale: float = 1.0) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: all gammas at lr * gamma_lr_scale without weight decay, and all other parameters.

    Weight decay would pull gamma, the spectral norm of its layer, to zero. For large-scale speech the paper doubles the
    learning rate of gamma [σ, App. E].

    Raises:
        ValueError: a learning rate or scale that is not positive, or a negative weight decay.
    """
    return _groups(model, lr, weight_decay, gamma_lr_scale, set())


def muon_param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    gamma_lr_scale: float = 1.0,
    *,
    muon_lr: float | None = None,
    filter_fn: FilterFn | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups for torch.optim.Muon, which takes matrices only, and groups for AdamW: each trainable parameter is in one.

        muon, adamw = muon_param_groups(model, lr=6e-4, weight_decay=0.1)
        optimizers = torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(adamw)

    Muon gets the weights (out, in) of linear layers inside blocks, which are the members of an `nn.ModuleList` or
    `nn.Sequential`; of a reparametrised layer the learned W (under weight norm the direction, `original1`). AdamW gets all
    others, grouped as by `param_groups`: gammas, norms, biases, embeddings, position tables, convolutions, and heads. Heads
    are layers outside the blocks, those that share an embedding's weight, and those with a name of HEADS in their path.

    A packed projection of query, key and value is one matrix to Muon. transformers' Conv1D keeps (in, out); of torch's
    adjust_lr_fn only "match_rms_adamw" scales by the larger side, and so treats a matrix and its transpose alike.

    Args:
        lr: AdamW's learning rate, and Muon's without muon_lr, which is right for "match_rms_adamw".
        weight_decay: of both optimizers.
        gamma_lr_scale: as for `param_groups`.
        muon_lr: Muon's learning rate; with torch's default adjust_lr_fn ten or more times AdamW's.
        filter_fn: filter_fn(module, fully_qualified_name) -> bool picks Muon's linear layers, in place of the rule above.

    Raises:
        ValueError: as `param_groups`; a muon_lr that is not positive; nothing is Muon's; filter_fn cannot be called so, or
            picks a layer that shares its weight with one that it does not pick, or with an embedding.
    """
    if muon_lr is not None:
        _check_positive("muon_lr", muon_lr)
    matrices = _matrices(model, filter_fn)
    adamw = _groups(model, lr, weight_decay, gamma_lr_scale, {id(p) for p in matrices})
    return [{"params": matrices, "lr": muon_lr or lr, "weight_decay": weight_decay}], adamw


def _groups(
    model: nn.Module, lr: float, weight_decay: float, gamma_lr_scale: float, taken: set[int]
) -> list[dict[str, Any]]:
    """A group of gammas and one of the other parameters, without those whose id is in `taken`."""
    _check_positive("lr", lr)
    _check_positive("gamma_lr_scale", gamma_lr_scale)
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay = {weight_decay!r}: allowed are numbers from 0")
    gammas = [sigma.gamma for _, sigma in sigma_layers(model) if isinstance(sigma.gamma, nn.Parameter)]
    taken = taken | {id(gamma) for gamma in gammas}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups = [
        {"params": gammas, "lr": lr * gamma_lr_scale, "weight_decay": 0.0},
        {"params": others, "lr": lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} = {value!r}: allowed are positive numbers")


def _matrices(model: nn.Module, filter_fn: FilterFn | None) -> list[nn.Parameter]:
    """Muon's parameters, in the order of the model; one that several modules share only if all of them make it Muon's."""
    modules = dict(model.named_modules(remove_duplicate=False))
    picked: dict[nn.Parameter, str] = {}  # parameter: layer
    left: dict[nn.Parameter, str] = {}
    linear: list[str] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        layer = _layer(name)
        is_matrix = parameter.requires_grad and _is_linear(modules[layer]) and parameter.ndim == 2
        if is_matrix and not name.endswith(".original0"):  # g of weight norm, (out, 1)
            linear.append(layer)
            is_muons = _is_hidden(layer, modules) if filter_fn is None else _ask(filter_fn, modules[layer], layer)
        else:
            is_muons = False
        (picked if is_muons else left)[parameter] = layer
    if not picked:
        what = (
            "no linear layer inside of a block, pick by filter_fn" if filter_fn is None else "filter_fn matches nothing"
        )
        names = ", ".join([*linear[:3], *["..."] * (len(linear) > 3)]) or "none"
        raise ValueError(f"{type(model).__name__}: {what}; its linear layers: {names}")
    for parameter in picked.keys() & left.keys() if filter_fn is not None else ():
        raise ValueError(f"{picked[parameter]}: {left[parameter]} has the same weight; leave it out with filter_fn")
    return [parameter for parameter in picked if parameter not in left]


def _layer(name: str) -> str:
    """`h.0.fc1` of h.0.fc1.weight, and of h.0.fc1.parametrizations.weight.original."""
    layer, mark, _ = name.partition("parametrizations.")
    return layer.removesuffix(".") if mark else name.rpartition(".")[0]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.MultiheadAttention) or is_transposed(module)


def _is_hidden(layer: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a layer is inside a member of an nn.ModuleList or nn.Sequential, and is not part of a head or embedding."""
    parts = layer.split(".")
    if any(part in HEADS or EMBEDDING in part for part in parts):
        return False
    around = (modules[".".join(parts[:i])] for i in range(len(parts) - 1))
    return any(isinstance(module, nn.ModuleList | nn.Sequential) for module in around)


def _ask(filter_fn: FilterFn, module: nn.Module, name: str) -> bool:
    try:
        return bool(filter_fn(module, name))
    except TypeError as error:
        allowed = "allowed are functions filter_fn(module, name) -> bool"
        raise ValueError(f"filter_fn = {filter_fn!r}: {allowed} ({error})") from error
