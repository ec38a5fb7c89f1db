"""timm's Vision Transformer with the methods of `stable_core.options.Options`: the class of every model of this plugin."""

from collections.abc import Callable, Mapping

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stable_core import converge, fold
from stable_core.init_std import vit_init_std
from stable_core.inits import init_
from stable_core.options import Options, take
from stable_core.reparams import reparametrise
from stable_core.residuals import scale_branches_
from stable_core.targets import FilterFn, layers
from stable_core.unfolding import is_plain, unfold_state_dict

from .sigma_init import TIMM_STD, FirstDraws, init_as_timm
from .slots import fill_in, put_in


class StableVisionTransformer(VisionTransformer):
    """timm's Vision Transformer with a choice of norm, attention, residual, first weights and reparametrisation.

    Every keyword of timm's works, and so does what timm does with one. With norm="layernorm", attention="dot", init="stock",
    residual="pre-ln" and reparam="none" it is timm's model, bit for bit.

    Args:
        weight_std, patch_std: normal distribution of a reparametrised model's Linear layers and of its patch embedding; left
            out, the paper's at its sizes and their spectral norm at others (`stable_core.init_std`). With another
            `weight_init` of timm's only what is given changes the Linear layers.
        **settings: the fields of `stable_core.options.Options`, and the keywords of timm's `VisionTransformer`. N of
            StableAtten's tau is the number of tokens that img_size gives.

    Raises:
        ValueError: a setting that is not allowed; weight_std or patch_std where init or reparam has no use for it.
    """

    def __init__(self, *, weight_std: float | None = None, patch_std: float | None = None, **settings) -> None:
        options = take(settings, alpha=0.25)
        self.draws_by_width = options.reparam != "none" and options.init == "stock"
        for name, given in (("weight_std", weight_std), ("patch_std", patch_std)):
            if given is not None and not given > 0:
                raise ValueError(f"{name} = {given!r}: allowed are positive numbers")
            if given is not None and not self.draws_by_width:
                what = f"reparam = {options.reparam!r} and init = {options.init!r}"
                raise ValueError(
                    f"{name} = {given!r}: {what} have no use for it; it is for a reparam with init = 'stock'"
                )
        self.options = options
        mode = settings.pop("weight_init", "")
        fill_in(settings, options)
        if self.draws_by_width and mode not in ("skip", "reset"):
            with FirstDraws() as first_draws:
                super().__init__(weight_init="skip", **settings)
            first_draws.make(self)
        else:
            super().__init__(weight_init="skip", **settings)
        self.beta = put_in(self, options, device=settings.get("device"), dtype=settings.get("dtype"))
        weights, patches = vit_init_std(self.embed_dim, self.patch_embed.proj.weight[0].numel())
        self.given_std, self.weight_std, self.patch_std = weight_std, weight_std or weights, patch_std or patches
        if mode == "skip":
            self._reparametrise()
        else:
            self.weight_init_mode = mode
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's, or what the options say, and the reparametrisation of the result."""
        if is_reparametrised(self):  # materialised from the meta device: plain layers again, of whatever sound values
            with torch.no_grad():
                for tensor in (*self.parameters(), *self.buffers()):
                    tensor.fill_(1.0)
            fold(converge(self))
        mode = mode or self.weight_init_mode
        if mode or not self.draws_by_width:
            super().init_weights(mode, needs_reset)
        else:
            init_as_timm(self, needs_reset)
        if self.draws_by_width:
            # timm's other modes draw by width themselves.
            self._rescale(((self.given_std or TIMM_STD) if mode else self.weight_std) / TIMM_STD)
        init_(self, self.options)
        for block in self.blocks:
            scale_branches_(block, self.beta)
        self._reparametrise()

    @torch.no_grad()
    def _rescale(self, scale: float) -> None:
        # Not trunc_normal_, whose cut at 2 is at hundreds of std: older torch draws -2 once in 2^24 numbers, and in bfloat16 2
        # or -2 once in 500.
        for target in layers(self):
            if target.module is self.patch_embed.proj:
                nn.init.normal_(target.weight, std=self.patch_std)
            elif scale != 1:  # as drawing them anew takes a third of the time of the build
                target.weight.mul_(scale)

    def _reparametrise(self, filter_fn: FilterFn | None = None, **changed) -> None:
        """Of layers that timm's `reparameterize_model` (validate.py --reparam) then folds."""
        reparametrise(self, Options(**{**vars(self.options), **changed}), filter_fn)
        for module in self.modules():
            if parametrize.is_parametrized(module):
                type(module).reparameterize = fold  # a class of its own, from torch, which folding takes off it again

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args, **kwargs):
        """torch's; a plain state dict goes into a model with σReparam too (`stable_core.unfold_state_dict`)."""
        if self.options.reparam == "sigma" and is_reparametrised(self) and is_plain(state_dict):
            state_dict = unfold_state_dict(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's; the new head is drawn and reparametrised like the old."""
        folded = not is_reparametrised(self)
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0:
            if self.draws_by_width:
                nn.init.normal_(self.head.weight, std=self.weight_std)
            init_(self.head, self.options)
            if not folded:
                self._reparametrise(lambda module, name: module is self.head, qkv="separate")
                self.head.train(self.training)

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """timm's; a patch embedding for patches of another size is reparametrised like the old, its function kept."""
        old = self.patch_embed.proj
        super().set_input_size(img_size, patch_size)
        new = self.patch_embed.proj
        if new is not old and parametrize.is_parametrized(old):
            # timm asks W_hat, made without gradient, whether it learns
            new.weight.requires_grad_(next(old.parametrizations.parameters()).requires_grad)
            self._reparametrise(lambda module, name: module is new, qkv="separate", gamma_init="spectral")
            new.train(old.training)


def is_reparametrised(model: nn.Module) -> bool:
    """Whether any layer of a model is."""
    return any(parametrize.is_parametrized(module) for module in model.modules())


def create(filter_fn: Callable, variant: str, pretrained: bool, **kwargs) -> StableVisionTransformer:
    """timm's builder, for an entrypoint."""
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        StableVisionTransformer,
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
