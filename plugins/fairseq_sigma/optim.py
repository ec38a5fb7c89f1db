"""LARS for fairseq, and learning rates of their own for single parameters, which no fairseq optimizer has."""

import functools
from dataclasses import dataclass, field

from fairseq import optim
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin
from omegaconf import II


@dataclass
class LarsConfig(FairseqDataclass):
    momentum: float = field(default=0.9, metadata={"help": "momentum factor"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay"})
    trust_coefficient: float = field(default=0.001, metadata={"help": "size of an update, for a weight of norm 1"})
    lr: list[float] = field(default=II("optimization.lr"))


@register_optimizer("lars", dataclass=LarsConfig)
class FairseqLars(FairseqOptimizer):
    """timm's LARS, which adapts the rate of each tensor to its norm, here also without weight decay (You et al. 2017)."""

    def __init__(self, cfg: LarsConfig, params) -> None:
        super().__init__(cfg)
        for flag, value in (("trust-coefficient", cfg.trust_coefficient), ("lr", cfg.lr[0])):
            if not value > 0:
                raise ValueError(f"--{flag} {value}: allowed are positive numbers")
        if not 0 <= cfg.momentum < 1:
            raise ValueError(f"--momentum {cfg.momentum}: allowed are numbers from 0, below 1")
        from timm.optim import Lars  # seconds to import, which runs with other optimizers need not pay

        # timm's Lars is plain SGD without weight decay, unless it is told to adapt always.
        self._optimizer = Lars(params, **self.optimizer_config, always_adapt=True)

    @property
    def optimizer_config(self) -> dict:
        return {
            "lr": self.cfg.lr[0],
            "momentum": self.cfg.momentum,
            "weight_decay": self.cfg.weight_decay,
            "trust_coeff": self.cfg.trust_coefficient,
        }


@functools.cache
def scale_learning_rates() -> None:
    """Has every fairseq optimizer multiply its rate by `parameter.optim_overrides["optimizer"]["lr_scale"]`.

    The attribute is fairseq's own, for its composite optimizer, which knows no command line. Parameters that have it get a
    group of their own, and learning rate schedules, which set one rate for all groups, scale it.
    """
    optim.build_optimizer = _with_groups(optim.build_optimizer)
    FairseqOptimizer.set_lr = _set_lr
    _FP16OptimizerMixin.build_fp32_params = classmethod(_not_flat(_FP16OptimizerMixin.build_fp32_params.__func__))


def _lr_scale(parameter) -> float:
    return getattr(parameter, "optim_overrides", {}).get("optimizer", {}).get("lr_scale", 1)


def _with_groups(build_optimizer):
    @functools.wraps(build_optimizer)
    def wrapped(cfg, params, *args, **kwargs):
        optimizer = build_optimizer(cfg, params, *args, **kwargs)
        group, *others = list(optimizer.param_groups)
        scales = sorted({_lr_scale(p) for p in group["params"]} - {1})
        if scales and not others:  # the composite optimizer, with several, reads the attribute itself
            members = group["params"]
            group["params"] = [p for p in members if _lr_scale(p) == 1]
            for scale in scales:
                scaled = [p for p in members if _lr_scale(p) == scale]
                optimizer.optimizer.add_param_group({**group, "params": scaled, "lr_scale": scale})
        return optimizer

    return wrapped


def _set_lr(self, lr: float) -> None:
    for group in self.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1)


def _not_flat(build_fp32_params):
    @functools.wraps(build_fp32_params)
    def wrapped(cls, args, params, flatten=True):
        params = list(params)
        if flatten and any(_lr_scale(p) != 1 for p in params):
            raise ValueError("--gamma-lr-scale with --fp16 or --bf16 needs --fp16-no-flatten-grads; --amp does not")
        return build_fp32_params(cls, args, params, flatten)

    return wrapped
