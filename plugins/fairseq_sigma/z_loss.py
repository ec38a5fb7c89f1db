"""`fairseq-train --z-loss 1e-4`: z-loss in fairseq's own criteria of a softmax over words, of any architecture.

It is a field of the criteria, so that fairseq-hydra-train names it too (`criterion.z_loss=1e-4`). fairseq's losses are sums
over words, which its trainer divides by their number, and so is this one.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

from fairseq.criterions import (
    CRITERION_DATACLASS_REGISTRY,
    CRITERION_REGISTRY,
    FairseqCriterion,
    adaptive_loss,
    cross_entropy,
    ctc,
    label_smoothed_cross_entropy,
)
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from hydra.core.config_store import ConfigStore
from torch import Tensor, nn

from stable_core.z_loss import check_coefficient, z_loss


@dataclass
class ZLossConfig(FairseqDataclass):
    z_loss: float = field(default=0.0, metadata={"help": "adds this times log(Z)^2 of the output softmax (PaLM: 1e-4)"})


class WithZLoss(FairseqCriterion):
    """Adds z-loss to what is trained on, and logs it by itself: loss, nll_loss and ppl stay the cross-entropy's."""

    z_loss = 0.0

    @classmethod
    def build_criterion(cls, cfg: FairseqDataclass, task):
        check_coefficient(cfg.z_loss, "--z-loss")
        criterion = super().build_criterion(cfg, task)
        criterion.z_loss = cfg.z_loss
        return criterion

    def forward(self, model: nn.Module, sample: dict, reduce: bool = True):
        if not (self.z_loss and model.training and reduce):  # fairseq trains on sums
            return super().forward(model, sample, reduce)
        outputs: list = []
        hook = self.before_softmax(model).register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            loss, sample_size, logged = super().forward(model, sample, reduce)
        finally:
            hook.remove()
        parts = self.softmaxes(outputs[0], sample["target"])
        penalty = sum(z_loss(logits, self.z_loss, mask, reduction="sum") for logits, mask in parts)
        return loss + penalty, sample_size, {**logged, "z_loss": penalty.detach()}

    def before_softmax(self, model: nn.Module) -> nn.Module:
        """The module whose output has the logits."""
        if getattr(getattr(model, "decoder", None), "adaptive_softmax", None) is not None:
            raise ValueError(
                f"--z-loss {self.z_loss}: this model's softmax is adaptive: allowed is --criterion adaptive_loss"
            )
        return model

    def softmaxes(self, output: tuple, target: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The logits (..., words) of each softmax, and which of its positions (...) count."""
        start = getattr(self, "ignore_prefix_size", 0)
        yield output[0][:, start:], target[:, start:] != self.padding_idx

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict]) -> None:
        super().reduce_metrics(logging_outputs)
        if any("z_loss" in logged for logged in logging_outputs):
            total, size = (sum(logged.get(name, 0) for logged in logging_outputs) for name in ("z_loss", "sample_size"))
            metrics.log_scalar("z_loss", total / size, size, round=6)


@dataclass
class CrossEntropyConfig(ZLossConfig, cross_entropy.CrossEntropyCriterionConfig):
    pass


class CrossEntropyCriterion(WithZLoss, cross_entropy.CrossEntropyCriterion):
    pass


@dataclass
class LabelSmoothedConfig(ZLossConfig, label_smoothed_cross_entropy.LabelSmoothedCrossEntropyCriterionConfig):
    pass


class LabelSmoothedCrossEntropyCriterion(WithZLoss, label_smoothed_cross_entropy.LabelSmoothedCrossEntropyCriterion):
    pass


@dataclass
class AdaptiveLossConfig(ZLossConfig, adaptive_loss.AdaptiveLossConfig):
    pass


class AdaptiveLoss(WithZLoss, adaptive_loss.AdaptiveLoss):
    """A word has the Z of the softmax over frequent words and bands and, if it is a rare one, the Z of its band as well."""

    def before_softmax(self, model: nn.Module) -> nn.Module:
        return model.decoder.adaptive_softmax

    def softmaxes(self, output: tuple, target: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        (frequent, *bands), (words, *_) = output
        yield frequent, words != self.padding_idx
        yield from ((logits, None) for logits in bands if logits is not None)


@dataclass
class CtcConfig(ZLossConfig, ctc.CtcCriterionConfig):
    pass


class CtcCriterion(ctc.CtcCriterion):
    """Has the flag in order to refuse it: frames are no words, and CTC's loss is not a sum over their softmaxes."""

    @classmethod
    def build_criterion(cls, cfg: FairseqDataclass, task):
        if cfg.z_loss:
            raise ValueError(
                f"--z-loss {cfg.z_loss}: --criterion ctc has a softmax for each frame and none for a word: allowed is 0"
            )
        return super().build_criterion(cfg, task)


@functools.cache
def install() -> None:
    """Puts these criteria, with the names and classes' names of fairseq's, in the place of fairseq's."""
    for name, criterion, config in (
        ("cross_entropy", CrossEntropyCriterion, CrossEntropyConfig),
        ("label_smoothed_cross_entropy", LabelSmoothedCrossEntropyCriterion, LabelSmoothedConfig),
        ("adaptive_loss", AdaptiveLoss, AdaptiveLossConfig),
        ("ctc", CtcCriterion, CtcConfig),
    ):
        setattr(criterion, "__dataclass", config)
        CRITERION_REGISTRY[name], CRITERION_DATACLASS_REGISTRY[name] = criterion, config
        node = config()
        node._name = name
        ConfigStore.instance().store(name=name, group="criterion", node=node, provider="fairseq")
