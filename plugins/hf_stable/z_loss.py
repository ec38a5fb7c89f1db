"""z-loss in transformers' models: `model.loss_function`, which they compute their loss by, with the term added."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from stable_core.z_loss import check_coefficient, z_loss

# transformers' cross-entropies of tokens and classes.
SOFTMAX = ("ForCausalLM", "ForMaskedLM", "ForTokenClassification", "ForSequenceClassification")
IGNORED = -100  # transformers' ignore_index, where none is given


def add_z_loss(model: PreTrainedModel, coefficient: float = 1e-4) -> PreTrainedModel:
    """Adds coefficient * mean(log(Z)^2) to the loss that a model returns, in place; Trainer needs no more.

    It is of the labels that the loss counts, and divided as the loss is, by the items of the whole update where Trainer tells
    them. Without gradients, as in an evaluation, the loss is the cross-entropy alone. Saved folders know nothing of it: call it
    again after loading. (Models of this library have a setting of the same meaning, z_loss, which is saved.)

    Trainer passes by a model's own loss where it has a label_smoothing_factor or a compute_loss_func; add `stable_core.z_loss`
    in the latter.

    Returns:
        The model.

    Raises:
        ValueError: a coefficient below 0 or not finite; a model that has z-loss already, that computes its loss otherwise, as
            transformers' older ones do, or whose loss is not one of SOFTMAX.
    """
    check_coefficient(coefficient)
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or "loss_function" not in _names_in(type(model).forward):
        raise ValueError(
            f"{name}: its forward does not call self.loss_function; override Trainer.compute_loss, and add "
            "stable_core.z_loss(outputs.logits, mask=labels != -100) to the loss there"
        )
    if isinstance(model.loss_function, LossWithZLoss):
        raise ValueError(f"{name}: it has z-loss already, with coefficient = {model.loss_function.coefficient!r}")
    model.loss_function = LossWithZLoss(model.loss_function, coefficient, name)
    return model


def _names_in(forward: Callable) -> tuple[str, ...]:
    return inspect.unwrap(forward).__code__.co_names


class LossWithZLoss:
    """A loss function of transformers', called as it is. `model` is the name that errors give."""

    def __init__(self, loss_function: Callable[..., Tensor], coefficient: float, model: str) -> None:
        if loss_function not in map(LOSS_MAPPING.get, SOFTMAX):
            raise ValueError(f"{model}: loss_function = {loss_function}: allowed are {', '.join(SOFTMAX)}")
        self.loss_function, self.coefficient, self.model = loss_function, coefficient, model
        self.names = tuple(inspect.signature(loss_function).parameters)

    def __call__(self, *args, **kwargs) -> Tensor:
        loss = self.loss_function(*args, **kwargs)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        # Of a sequence's class; beside it some models give the logits of every token, which the loss does not read.
        logits = given["pooled_logits" if "pooled_logits" in self.names else "logits"]
        if not logits.requires_grad:
            return loss
        if getattr(given.get("config"), "problem_type", None) in ("regression", "multi_label_classification"):
            raise ValueError(f"{self.model}: problem_type = {given['config'].problem_type!r} has no softmax: no z-loss")
        labels, ignored = given.get("shift_labels"), given.get("ignore_index", IGNORED)
        if labels is None:
            labels = given["labels"]
            if "shift_labels" in self.names:  # a language model's: each position has the next token's
                labels = nn.functional.pad(labels, (0, 1), value=ignored)[..., 1:]
        logits = logits.reshape(-1, logits.shape[-1])
        mask = (labels != ignored).reshape(-1).to(logits.device)
        items = given.get("num_items_in_batch")
        if items is None:
            return loss + z_loss(logits, self.coefficient, mask)
        return loss + z_loss(logits, self.coefficient, mask, reduction="sum") / torch.as_tensor(
            items, device=loss.device
        )
