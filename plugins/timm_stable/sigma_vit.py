"""ViT-S/B/L/H with σReparam on every Linear and Conv layer, the patch embedding included [σ, Section 4.1, App. H].

Every keyword of timm's `VisionTransformer` works, and so does what timm does with one.
"""

import copy

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as timm_filter_fn
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stable_core import SigmaReparamConfig, converge, fold, sigma_reparam
from stable_core.targets import layers

from .stablevit import cfg, create

__all__ = ["SigmaVisionTransformer"]  # and the entrypoints, which register_model adds

TIMM_STD = 0.02  # of timm's truncated normal


class SigmaVisionTransformer(VisionTransformer):
    """timm's Vision Transformer with σReparam, and, as in the paper, without LayerNorm.

    Args:
        layer_norm: keep the pre-LN of timm's model, and its last norm.
        reparam: "sigma", or the baselines "spectral" (gamma = 1, not learned) and "weight" (which needs layer_norm: it
            diverges at once without [σ, Table 1]).
        gamma_init: "spectral", the paper's choice for vision, or "one".
        qkv: "separate", "joint" or "qk_joint".
        weight_std, patch_std: truncated normal of the Linear layers and of the patch embedding; 0.02, and for ViT-L 0.01 and
            0.0025 [σ, App. H].
        **timm: as for timm's `VisionTransformer`.

    Raises:
        ValueError: what `SigmaReparamConfig` refuses.
    """

    def __init__(
        self,
        *,
        layer_norm: bool = False,
        reparam: str = "sigma",
        gamma_init: str = "spectral",
        qkv: str = "separate",
        weight_std: float = 0.02,
        patch_std: float = 0.02,
        **timm,
    ) -> None:
        if reparam == "sigma":
            self.reparam = SigmaReparamConfig(gamma_init=gamma_init, qkv=qkv)
        else:
            self.reparam = SigmaReparamConfig(kind=reparam, qkv=qkv)
        self.weight_std, self.patch_std = weight_std, patch_std
        if not layer_norm:
            timm["norm_layer"] = nn.Identity
        super().__init__(**timm)
        if not _is_reparametrised(self):  # weight_init="skip"
            sigma_reparam(self, self.reparam)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's with the two deviations, and σReparam of the result."""
        if _is_reparametrised(self):  # materialised from the meta device: plain layers again, of whatever sound values
            with torch.no_grad():
                for tensor in (*self.parameters(), *self.buffers()):
                    tensor.fill_(1.0)
            fold(converge(self))
        super().init_weights(mode, needs_reset)
        with torch.no_grad():
            for target in layers(self):
                if target.module is self.patch_embed.proj:
                    nn.init.trunc_normal_(target.weight, std=self.patch_std)
                elif self.weight_std != TIMM_STD:  # scaled, as drawing them anew takes as long as building the model
                    target.weight.mul_(self.weight_std / TIMM_STD)
        sigma_reparam(self, self.reparam)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's; the new head is reparametrised like the old."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0:
            nn.init.trunc_normal_(self.head.weight, std=self.weight_std)
            config = SigmaReparamConfig(gamma_init=self.reparam.gamma_init, kind=self.reparam.kind)
            sigma_reparam(self, config, filter_fn=lambda module, name: module is self.head)


def _is_reparametrised(model: nn.Module) -> bool:
    return any(parametrize.is_parametrized(module) for module in model.modules())


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: SigmaVisionTransformer) -> dict[str, Tensor]:
    """A checkpoint of timm's plain ViT as one of `model`, its function kept (gamma = sigma); one of `model` as it is.

    What does not fit, such as the head for other classes, stays as it is in the model.
    """
    if any("parametrizations." in name for name in state_dict):
        return timm_filter_fn(state_dict, model)
    plain = fold(copy.deepcopy(model))
    own = plain.state_dict()
    fitting = timm_filter_fn(state_dict, plain)
    plain.load_state_dict(
        {name: x for name, x in fitting.items() if name in own and x.shape == own[name].shape}, strict=False
    )
    return sigma_reparam(plain, SigmaReparamConfig(gamma_init="spectral", qkv=model.reparam.qkv)).state_dict()


SIZES = {
    "small_patch16": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "base_patch16": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "large_patch16": {
        "patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, "weight_std": 0.01, "patch_std": 0.0025
    },
    "huge_patch14": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}  # fmt: skip
default_cfgs = generate_default_cfgs(
    {f"sigma_vit_{size}_224{variant}": cfg() for size in SIZES for variant in ("", "_preln")}
)


def _register(size: str, variant: str) -> None:
    name = f"sigma_vit_{size}_224{variant}"

    def entrypoint(pretrained: bool = False, **kwargs) -> SigmaVisionTransformer:
        args = {**SIZES[size], "layer_norm": variant == "_preln", **kwargs}
        return create(SigmaVisionTransformer, checkpoint_filter_fn, name, pretrained, **args)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"ViT {size.replace('_', ', ')}, σReparam, {'pre-LN' if variant else 'no LayerNorm'}."
    globals()[name] = register_model(entrypoint)


for size in SIZES:
    for variant in ("", "_preln"):
        _register(size, variant)
