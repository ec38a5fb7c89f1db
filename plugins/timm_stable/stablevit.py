"""StableViT: timm's Vision Transformer with StableNorm, StableAtten and StableInit [ST, Table 1, App. F, G].

Every keyword of timm's `VisionTransformer` works, and so does what timm does with one.
"""

from collections.abc import Callable
from functools import partial

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from stable_core import StableNorm, stable_init_
from stable_core.attentions import L2Kernel, stable_qk_norms
from stable_core.targets import layers

__all__ = ["StableVisionTransformer"]  # and the entrypoints, which register_model adds

CHOICES = {
    "norm": ("stable", "layernorm", "rmsnorm"),
    "attention": ("stable", "dot", "qknorm", "l2", "l2_tied"),
    "init": ("stable", "timm", "xavier"),
}


class L2Attention(Attention):
    """timm's attention with -|q - k|^2 / sqrt(d1) for logits [ST, App. N]."""

    tied = False

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop.p if self.training else 0.0
        y = L2Kernel()(q, q if self.tied else k, v, attn_mask, dropout, is_causal)
        return self.proj_drop(self.proj(self.norm(y.transpose(1, 2).flatten(2))))


class TiedL2Attention(L2Attention):
    """The same with Wk = Wq, which is Lipschitz continuous; the weights of k are there and unused."""

    tied = True


class StableVisionTransformer(VisionTransformer):
    """timm's Vision Transformer with the parts of Stable-Transformer, or of the baselines it is held against.

    Args:
        alpha: of StableNorm, in the blocks and in StableAtten; the paper takes 0.25 for StableViT-g.
        tau_scale: multiple of StableAtten's tau, which is that of the number of tokens that img_size gives.
        norm: "stable", "layernorm" or "rmsnorm".
        attention: "stable", "dot", "qknorm", "l2" or "l2_tied".
        init: "stable", "timm" or "xavier", of Linear and Conv layers.
        **timm: as for timm's `VisionTransformer`. With norm="layernorm", attention="dot" and init="timm" it is one.

    Raises:
        ValueError: another norm, attention or init; alpha or tau_scale out of range.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.25,
        tau_scale: float = 1.0,
        norm: str = "stable",
        attention: str = "stable",
        init: str = "stable",
        **timm,
    ) -> None:
        for name, given in (("norm", norm), ("attention", attention), ("init", init)):
            if given not in CHOICES[name]:
                raise ValueError(f"{name} = {given!r}: allowed are {', '.join(map(repr, CHOICES[name]))}")
        self.init = init
        norms = {"stable": partial(StableNorm, alpha=alpha), "layernorm": None, "rmsnorm": "rmsnorm"}
        timm.setdefault("norm_layer", norms[norm])
        if attention.startswith("l2"):
            timm["attn_layer"] = TiedL2Attention if attention == "l2_tied" else L2Attention
        super().__init__(**timm)
        made = {name: timm.get(name) for name in ("device", "dtype")}
        tokens = self.patch_embed.num_patches + self.num_prefix_tokens
        for attn in (module for module in self.blocks.modules() if hasattr(module, "q_norm")):  # whatever block_fn is
            if attention == "stable":
                attn.q_norm, attn.k_norm = stable_qk_norms(attn.head_dim, tokens, alpha, tau_scale, **made)
            elif attention == "qknorm":
                attn.q_norm, attn.k_norm = (nn.RMSNorm(attn.head_dim, eps=1e-5, **made) for _ in range(2))

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's, and then the chosen one of Linear and Conv layers."""
        super().init_weights(mode, needs_reset)
        self._draw(self)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's; the new head is drawn like the rest."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0:
            self._draw(self.head)

    def _draw(self, module: nn.Module) -> None:
        if self.init == "stable":
            stable_init_(module)
        elif self.init == "xavier":
            for target in layers(module):
                nn.init.xavier_normal_(target.weight.flatten(1))  # a view


def create(model_cls: type, filter_fn: Callable, variant: str, pretrained: bool, **kwargs) -> VisionTransformer:
    """timm's builder, for an entrypoint."""
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


def cfg(**kwargs) -> dict:
    """A pretrained_cfg in timm's form; there are no weights to download."""
    return {
        "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": None, "crop_pct": 0.9,
        "interpolation": "bicubic", "fixed_input_size": True, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj", "classifier": "head", **kwargs,
    }  # fmt: skip


_create = partial(create, StableVisionTransformer, checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(
    {f"stablevit_{size}": cfg() for size in ("small", "base", "large", "huge", "giant", "200")}
)


@register_model
def stablevit_small(pretrained: bool = False, **kwargs) -> StableVisionTransformer:
    """12 blocks of width 384, 6 heads, patch 16."""
    args = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("stablevit_small", pretrained, **{**args, **kwargs})


@register_model
def stablevit_base(pretrained: bool = False, **kwargs) -> StableVisionTransformer:
    """12 blocks of width 768, 12 heads, patch 16."""
    args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("stablevit_base", pretrained, **{**args, **kwargs})


@register_model
def stablevit_large(pretrained: bool = False, **kwargs) -> StableVisionTransformer:
    """24 blocks of width 1024, 16 heads, patch 16: 304M [ST, Table 1: 307M]."""
    args = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _create("stablevit_large", pretrained, **{**args, **kwargs})


@register_model
def stablevit_huge(pretrained: bool = False, **kwargs) -> StableVisionTransformer:
    """32 blocks of width 1280, 16 heads, patch 14: 632M [ST, Table 1]."""
    args = {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}
    return _create("stablevit_huge", pretrained, **{**args, **kwargs})


@register_model
def stablevit_giant(pretrained: bool = False, **kwargs) -> StableVisionTransformer:
    """40 blocks of width 1408 and MLPs of 6144, 16 heads, patch 14: 1011M [ST, Table 1]."""
    args = {"patch_size": 14, "embed_dim": 1408, "mlp_ratio": 48 / 11, "depth": 40, "num_heads": 16}
    return _create("stablevit_giant", pretrained, **{**args, **kwargs})


@register_model
def stablevit_200(pretrained: bool = False, **kwargs) -> StableVisionTransformer:
    """200 blocks of width 768, 12 heads, patch 14: 1419M [ST, Table 1: 1439M, and no patch]."""
    args = {"patch_size": 14, "embed_dim": 768, "depth": 200, "num_heads": 12}
    return _create("stablevit_200", pretrained, **{**args, **kwargs})
