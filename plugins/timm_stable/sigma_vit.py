"""ViT-S/B/L/H with σReparam on every Linear and Conv layer, the patch embedding included [σ, Section 4.1, App. H].

Every keyword of timm's `VisionTransformer` works, and so does what timm does with one.
"""

import copy

import torch
from timm.models import adapt_input_conv, generate_default_cfgs, named_apply, register_model
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from timm.models.vision_transformer import checkpoint_filter_fn as timm_filter_fn
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from stable_core import SigmaReparamConfig, converge, fold
from stable_core import sigma_reparam as plain_sigma_reparam
from stable_core.folding import fold_state_dict
from stable_core.init_std import vit_init_std
from stable_core.layout import KEY
from stable_core.targets import FilterFn, layers

from .stablevit import cfg, create

__all__ = ["SigmaVisionTransformer"]  # and the entrypoints, which register_model adds

REPARAMS = ("sigma", "spectral", "weight")
TIMM_STD = 0.02  # of timm's truncated normal


class SigmaVisionTransformer(VisionTransformer):
    """timm's Vision Transformer with σReparam, and, as in the paper, without LayerNorm.

    Args:
        layer_norm: keep the pre-LN of timm's model, and its last norm.
        reparam: "sigma", or the baselines "spectral" (gamma = 1, not learned) and "weight" (which needs layer_norm: it
            diverges at once without [σ, Table 1]).
        gamma_init: "spectral", the paper's choice for vision, or "one".
        qkv: "separate", "joint" or "qk_joint".
        weight_std, patch_std: truncated normal of the Linear layers and of the patch embedding; left out, the paper's at its
            sizes and their spectral norm at others (`stable_core.init_std`). With another `weight_init` of timm's only what
            is given changes the Linear layers.
        **timm: as for timm's `VisionTransformer`.

    Raises:
        ValueError: another `reparam`; what `SigmaReparamConfig` refuses.
    """

    def __init__(
        self,
        *,
        layer_norm: bool = False,
        reparam: str = "sigma",
        gamma_init: str = "spectral",
        qkv: str = "separate",
        weight_std: float | None = None,
        patch_std: float | None = None,
        **timm,
    ) -> None:
        if reparam not in REPARAMS:
            raise ValueError(f"reparam = {reparam!r}: allowed are {', '.join(map(repr, REPARAMS))}")
        if reparam == "sigma":
            self.reparam = SigmaReparamConfig(gamma_init=gamma_init, qkv=qkv)
        else:
            self.reparam = SigmaReparamConfig(kind=reparam, qkv=qkv)
        for name, given in (("weight_std", weight_std), ("patch_std", patch_std)):
            if given is not None and not given > 0:
                raise ValueError(f"{name} = {given!r}: allowed are positive numbers")
        if not layer_norm:
            timm["norm_layer"] = nn.Identity
        mode = timm.pop("weight_init", "")
        if mode in ("skip", "reset"):
            super().__init__(weight_init="skip", **timm)
        else:
            with _FirstDraws() as first_draws:
                super().__init__(weight_init="skip", **timm)
            first_draws.make(self)
        weights, patches = vit_init_std(self.embed_dim, self.patch_embed.proj.weight[0].numel())
        self.given_std, self.weight_std, self.patch_std = weight_std, weight_std or weights, patch_std or patches
        if mode == "skip":
            sigma_reparam(self, self.reparam)
        else:
            self.weight_init_mode = mode
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's with the two deviations, and σReparam of the result."""
        if _is_reparametrised(self):  # materialised from the meta device: plain layers again, of whatever sound values
            with torch.no_grad():
                for tensor in (*self.parameters(), *self.buffers()):
                    tensor.fill_(1.0)
            fold(converge(self))
        mode = mode or self.weight_init_mode
        if mode:  # all but timm's own draw by width themselves
            super().init_weights(mode, needs_reset)
        else:
            self._init_as_timm(needs_reset)
        scale = ((self.given_std or TIMM_STD) if mode else self.weight_std) / TIMM_STD
        with torch.no_grad():
            for target in layers(self):
                if target.module is self.patch_embed.proj:
                    nn.init.trunc_normal_(target.weight, std=self.patch_std)
                elif scale != 1:  # as drawing them anew takes a third of the time of the build
                    target.weight.mul_(scale)
        sigma_reparam(self, self.reparam)

    def _init_as_timm(self, needs_reset: bool) -> None:
        """timm's own mode; its truncated normal, cut at 100 standard deviations, is a normal, which is drawn faster as such."""
        for tensor, std in ((self.pos_embed, TIMM_STD), (self.cls_token, 1e-6), (self.reg_token, 1e-6)):
            if tensor is not None:
                nn.init.normal_(tensor, std=std)

        def init(module: nn.Module, name: str) -> None:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=TIMM_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            else:
                init_weights_vit_timm(module, name, needs_reset)

        named_apply(init, self)
        if self.fix_init:
            self.fix_init_weight()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's; the new head is reparametrised like the old."""
        folded = not _is_reparametrised(self)
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0:
            nn.init.trunc_normal_(self.head.weight, std=self.weight_std)
            if not folded:
                config = SigmaReparamConfig(gamma_init=self.reparam.gamma_init, kind=self.reparam.kind)
                sigma_reparam(self, config, filter_fn=lambda module, name: module is self.head)
                self.head.train(self.training)

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """timm's; a patch embedding for patches of another size is reparametrised like the old."""
        old = self.patch_embed.proj
        super().set_input_size(img_size, patch_size)
        new = self.patch_embed.proj
        if new is not old and parametrize.is_parametrized(old):
            # timm asks W_hat, made without gradient, whether it learns
            new.weight.requires_grad_(next(old.parametrizations.parameters()).requires_grad)
            kind = self.reparam.kind
            config = SigmaReparamConfig(kind=kind, gamma_init="spectral" if kind == "sigma" else "one")
            sigma_reparam(self, config, filter_fn=lambda module, name: module is new)
            new.train(old.training)


def sigma_reparam(model: nn.Module, config: SigmaReparamConfig, filter_fn: FilterFn | None = None) -> nn.Module:
    """stable_core's, of layers that timm's `reparameterize_model` (validate.py --reparam) then folds."""
    plain_sigma_reparam(model, config, filter_fn)
    for module in model.modules():
        if parametrize.is_parametrized(module):
            type(module).reparameterize = fold  # a class of its own, from torch, which folding takes off it again
    return model


class _FirstDraws(TorchFunctionMode):
    """Puts off the draws that a layer's constructor makes with kaiming_uniform_: those of Linear layers are drawn over.

    They take a third of the time that building timm's model takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.init.kaiming_uniform_:
            self.calls.append(kwargs)
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))

    def make(self, model: nn.Module) -> None:
        """All but those of the Linear layers of `model`."""
        drawn_over = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
        for call in self.calls:
            if call["tensor"] not in drawn_over:
                nn.init.kaiming_uniform_(**call)


def _is_reparametrised(model: nn.Module) -> bool:
    return any(parametrize.is_parametrized(module) for module in model.modules())


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: SigmaVisionTransformer) -> dict[str, Tensor]:
    """A checkpoint of timm's plain ViT as one of `model`, its function kept (gamma = sigma); one of `model` as it is.

    Both are fitted as timm fits them: position embeddings to the image size, the patch embedding to patches and channels. A
    head for other classes is left out. What else is missing, too much or of another shape is for the loading to refuse.
    """
    for key in ("model", "state_dict"):
        state_dict = state_dict.get(key, state_dict)
    own, trained = model.state_dict(), any(_PARAMETRIZED in name for name in state_dict)
    if _shapes(state_dict) == _shapes(own):
        return state_dict
    given = timm_filter_fn(fold_state_dict(state_dict) if trained else state_dict, model)
    stem, head = given.get("patch_embed.proj.weight"), given.get("head.bias")
    if stem is not None and stem.shape[1] != model.in_chans:
        given["patch_embed.proj.weight"] = adapt_input_conv(model.in_chans, stem, stem.shape[1])
    if head is not None and len(head) != model.num_classes:
        given = _without_head(given)
    plain = fold(copy.deepcopy(model))
    missing, unexpected = plain.load_state_dict(given, strict=False)
    kind = model.reparam.kind  # weight norm keeps the function by itself
    config = model.reparam if kind == "weight" else SigmaReparamConfig(gamma_init="spectral", qkv=model.reparam.qkv)
    fitted = plain_sigma_reparam(plain, config).state_dict()
    if trained:  # where nothing had to be fitted W stays as it was trained, whose size the function does not show
        other = {_layer(name) for name, x in state_dict.items() if name not in own or x.shape != own[name].shape}
        fitted |= {name: x for name, x in state_dict.items() if _PARAMETRIZED in name and _layer(name) not in other}
    absent = {*missing, *(name.removesuffix(".weight") for name in missing)}
    fitted = {name: x for name, x in fitted.items() if _layer(name) not in absent}
    return fitted | {name: given[name] for name in unexpected}


_PARAMETRIZED = ".parametrizations."


def _shapes(state_dict: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Without the layouts, which a checkpoint from before lacks."""
    return {name: x.shape for name, x in state_dict.items() if not name.endswith(KEY)}


def _layer(name: str) -> str:
    return name.partition(_PARAMETRIZED)[0]


def _without_head(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in state_dict.items() if not name.startswith("head.")}


def _pretrained_filter_fn(state_dict: dict[str, Tensor], model: SigmaVisionTransformer) -> dict[str, Tensor]:
    """The same for `pretrained=True`, where timm leaves out a head for other classes by the names it has in a plain model."""
    fitted = checkpoint_filter_fn(state_dict, model)
    return fitted if model.num_classes == model.pretrained_cfg["num_classes"] else _without_head(fitted)


SIZES = {
    "small_patch16": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "base_patch16": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "large_patch16": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge_patch14": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}
default_cfgs = generate_default_cfgs(
    {f"sigma_vit_{size}_224{variant}": cfg() for size in SIZES for variant in ("", "_preln")}
)


def _register(size: str, variant: str) -> None:
    name = f"sigma_vit_{size}_224{variant}"

    def entrypoint(pretrained: bool = False, **kwargs) -> SigmaVisionTransformer:
        args = {**SIZES[size], "layer_norm": variant == "_preln", **kwargs}
        return create(SigmaVisionTransformer, _pretrained_filter_fn, name, pretrained, **args)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"ViT {size.replace('_', ', ')}, σReparam, {'pre-LN' if variant else 'no LayerNorm'}."
    globals()[name] = register_model(entrypoint)


for size in SIZES:
    for variant in ("", "_preln"):
        _register(size, variant)
