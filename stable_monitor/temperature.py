"""Attention at another temperature: an intervention that causes an entropy collapse, to see what follows from it."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .calls import Call
from .chosen import Chosen, choose
from .interception import UNSEEN, Interception


class attention_temperature:  # a context manager, used as a function
    """A context in which every attention of `model` computes softmax(a / tau) in place of softmax(a) [σ, App. B.1, eq. 22].

    A low tau lowers the entropy: tau = 0.1 is the paper's intervention. tau can be changed within the context, so that one
    context around the training loop can intervene at any step:

        with attention_temperature(model) as temperature:
            for step, batch in enumerate(loader):
                temperature.tau = 0.1 if step >= 1000 else 1.0

    Run backward passes inside the context, too, as activation checkpointing computes attention again in them. Compiled models
    run eagerly within the context.

    `attention` is that of `Monitor`; "softmax" only, as what a function reads cannot be changed.

    Raises:
        ValueError: tau is not a positive finite number; in the forward pass, a kernel whose logits cannot be changed.
        RuntimeError: at the end, if the model ran but no attention was seen, so that tau had no effect.
    """

    def __init__(self, model: nn.Module, tau: float = 1.0, *, attention: Chosen | None = None) -> None:
        self.tau = tau
        self._ran = self._seen = False
        self._interception = Interception(model, self._divide, finished=self._finished, chosen=choose(model, attention))
        self._eager = ExitStack()

    @property
    def tau(self) -> float:
        """The temperature that logits are divided by."""
        return self._tau

    @tau.setter
    def tau(self, tau: float) -> None:
        if not 0 < tau < float("inf"):
            raise ValueError(f"tau = {tau!r}: allowed are positive numbers")
        self._tau = tau

    def _finished(self, output: Any) -> None:
        self._ran = True

    def _divide(self, call: Call) -> Call:
        self._seen = True
        return call if self._tau == 1 else call.at_temperature(self._tau)

    def __enter__(self) -> "attention_temperature":
        self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        self._interception.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._interception.stop()
        self._eager.close()
        if self._ran and not self._seen and exception[0] is None:
            raise RuntimeError(UNSEEN)
