"""The first weights of a ViT that is reparametrised: timm's, drawn in less time, and scaled to the papers' by their width."""

from timm.models import named_apply
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import nn
from torch.overrides import TorchFunctionMode

TIMM_STD = 0.02  # of timm's truncated normal


class FirstDraws(TorchFunctionMode):
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


def init_as_timm(vit: VisionTransformer, needs_reset: bool) -> None:
    """timm's own mode; its truncated normal, cut at 100 standard deviations, is a normal, which is drawn faster as such."""
    for tensor, std in ((vit.pos_embed, TIMM_STD), (vit.cls_token, 1e-6), (vit.reg_token, 1e-6)):
        if tensor is not None:
            nn.init.normal_(tensor, std=std)

    def init(module: nn.Module, name: str) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=TIMM_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            init_weights_vit_timm(module, name, needs_reset)

    named_apply(init, vit)
    if vit.fix_init:
        vit.fix_init_weight()
