"""QK-clip in training: measures each head's largest attention logit, and scales down weights of heads above a threshold.

The scaling is in stable_core/qk_clip.py; this file finds the logits.
"""

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stable_core.layers import find_added_biases, find_projections
from stable_core.qk_clip import check_attention, check_heads, clip_heads, weights_to_clip
from stable_core.targets import FilterFn

from .calls import Call, SoftmaxCall, padding
from .compiled import TrainingInterception, unwrap
from .interception import UNSEEN, without_wrappers
from .optimizers import Optimizers, after_steps, listed, short
from .row_order import RowOrder

log = logging.getLogger("stable_monitor")
VAIN = 2  # clips in a row without effect on a logit far above the threshold before a warning


class QKClip:
    """After an update, scales down W_q and W_k of each head whose largest attention logit was above a threshold [Kimi K2].

        clip = QKClip(model, threshold=100.0, optimizer=optimizer)  # clips after each step of the optimizer

    or, without an optimizer,

        clip = QKClip(model, threshold=100.0)
        ...
        loss.backward()
        optimizer.step()
        clip.step()

    W_q of a head is multiplied by (t / S)^alpha and its W_k by (t / S)^(1 - alpha). S is the head's largest scaled q.k, without
    the values of additive masks, in the forward passes in training mode since the last update: the maximum over all
    accumulated batches, and over all processes, each of which must hold the same model and have a QKClip. Where softmax is
    written out, S includes learned position biases such as Swin's; ALiBi's and T5's raise ValueError there.
    stable_core/qk_clip.py says how grouped queries, latent attention, biases of layers and σReparam are treated.

    Call the model itself, not a part of it. Only the clipped weights are changed, and there is no state to save. Logits are
    formed, in chunks, only for heads where |q| |k| allows one above the threshold. A compiled model runs forward once more for
    each batch, eagerly and without gradient, as its attention cannot be seen otherwise; use every=10 there. Do not use it
    with an optimizer of copies of the weights (fp32 masters), which would overwrite the clipped weights.

    Args:
        model: the module that the training loop calls: plain, compiled, or wrapped for distribution.
        threshold: t, a logit above 0; 100 in Kimi K2.
        alpha: share of the queries in the factor, from 0 to 1.
        every: logits are measured in every n-th update only, after which heads are clipped.
        optimizer: heads are clipped after its steps; of several in a list (Muon and AdamW), when all have made a step.
        filter_fn: filter_fn(module, name) -> bool picks attention modules; by default all.

    Raises:
        ValueError: a setting that is not allowed; an attention that cannot be clipped, by name (QK-norm, unknown projections);
            an optimizer that does not step a weight that would be clipped. In the first forward pass: an attention whose
            logits are not q.k of its weights, or that packs them in another order than [q; k; v].
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float = 100.0,
        alpha: float = 0.5,
        every: int = 1,
        *,
        optimizer: Optimizers | None = None,
        filter_fn: FilterFn = lambda module, name: True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model = {short(model)}: allowed are torch modules")
        given: tuple[Any, Any] = threshold, alpha  # numpy has real numbers that are no floats
        if not isinstance(given[0], Real) or not 0 < threshold < math.inf:
            raise ValueError(f"threshold = {threshold!r}: allowed are positive numbers")
        if not isinstance(given[1], Real) or not 0 <= alpha <= 1:
            raise ValueError(f"alpha = {alpha!r}: allowed are numbers from 0 to 1")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every = {every!r}: allowed are whole numbers from 1")
        if not callable(filter_fn):
            raise ValueError(f"filter_fn = {filter_fn!r}: allowed are functions filter_fn(module, name) -> bool")
        self.threshold, self.alpha, self.every, self.updates = float(threshold), float(alpha), every, 0
        self._model, self._filter = unwrap(model), filter_fn
        self._sites = {
            name: module
            for path, module in self._model.named_modules()
            if find_projections(module) and filter_fn(module, name := without_wrappers(path))
        }
        for name, module in self._sites.items():
            check_attention(name, module)
        self._interception = _WithRows(model, self._model, self._see, unmeasured=self._failed, every_call=True)
        self._interception.unknown = self._unknown
        self._armed = ExitStack()
        self._handles: list[RemovableHandle] = []
        self._warned: set[str] = set()
        self._vain: dict[str, tuple[float, int]] = {}  # by layer: largest logit, clips in a row without effect
        self._closed = False
        self._watched_by: Any = None  # hooks, or a probe
        self._fit: set[str] = set()  # layers whose logits are known to be q.k of their weights
        if optimizer is not None:
            self._follow(listed(optimizer))
        self._prepare()

    def step(self) -> dict[str, list[float]]:
        """Counts one update and clips.

        Returns {layer: S of each head} of the clipped layers; S is -inf for heads that cannot have exceeded the threshold."""
        clipped: dict[str, list[float]] = {}
        if self._watched_by is not None:
            for name, S in self._over_ranks(self._largest).items():
                if any(self.threshold < s < math.inf for s in S.tolist()):
                    clip_heads(self._sites[name], S, self.threshold, self.alpha)
                    clipped[name] = S.tolist()
            if not self._seen:
                self._warn(f"{UNSEEN}. QKClip must be given what the loop calls, in training mode")
            self._look_for_vain(clipped)
        self.updates += 1
        self._prepare()
        return clipped

    def close(self) -> None:
        """Ends clipping, and removes the hooks from the model and the optimizer."""
        self._closed = True
        self._prepare()
        for handle in self._handles:
            handle.remove()

    def clips(self, attention: nn.Module) -> bool:
        """Whether an attention is one of those that it clips."""
        return any(attention is site for site in self._sites.values())

    def asleep(self) -> str:
        """Why it clips nothing: it was closed, or nothing calls its step; "" where it does."""
        if self._closed:
            return "QKClip is closed"
        idle = not self._handles and not self.updates
        return "QKClip has made no step: give it the optimizer, or call clip.step() after each update" if idle else ""

    def __enter__(self) -> "QKClip":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _prepare(self) -> None:
        """Prepares for the next update: resets S, and installs or removes what measures it."""
        self._largest: dict[str, Tensor] = {}  # by layer: S of each head
        self._seen, before, self._watched_by = False, self._watched_by, None
        if not self._closed and (self.updates + 1) % self.every == 0:
            self._watched_by = "probe" if self._interception.needs_probe() else "hooks"
        if self._watched_by == before:
            return
        self._armed.close()
        if self._watched_by is not None:
            self._armed.enter_context(self._interception.of_training())

    def _failed(self, error: Exception) -> None:
        if isinstance(error, ValueError):
            raise error
        self._warn(f"the compiled model was not seen: {type(error).__name__}: {error}")

    @torch.no_grad()
    def _see(self, call: Call) -> Call:
        name, module = call.site.name, call.site.module
        # Not in the backward pass, where activation checkpointing computes the same attention again.
        if not self._model.training or torch._C._current_graph_task_id() != -1:
            return call
        self._seen = True
        if self._sites.get(name) is not module:
            if self._filter(module, name):
                check_attention(name, module)
                raise ValueError(
                    f"{name}: its weights were not there when QKClip was made; make it after the model is complete, and shard "
                    "with fully_shard, as FSDP1 keeps them flat"
                )
            return call
        if not weights_to_clip(module):
            return call
        rows = call.largest_logits(above=self.threshold)
        largest = rows.amax((0, 2))
        if name not in self._fit:
            check_heads(name, module, len(largest), call.head_dim)
            if error := self._interception.rows.error(call):
                raise ValueError(f"{name}: {error}")
            self._interception.rows.leave(module)
            added: list[str] = find_added_biases(module, call.site.arguments()) if isinstance(call, SoftmaxCall) else []
            if added:
                raise ValueError(
                    f"{name}: it adds a bias ({', '.join(added)}) to its logits, which is not told from q.k where softmax is "
                    "written out; use scaled_dot_product_attention (attn_implementation='sdpa'), or leave it out with filter_fn"
                )
            self._fit.add(name)
        if (largest > self.threshold).any() and (unseen := padding(call)) is not None:
            largest = rows.masked_fill(unseen, -math.inf).amax((0, 2))
        largest = largest.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        self._largest[name] = torch.maximum(self._largest.get(name, largest), largest)
        return call

    def _over_ranks(self, largest: dict[str, Tensor]) -> dict[str, Tensor]:
        """The maximum of each S over all processes; a layer may have been used in some of them only."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return largest
        device = next(self._model.parameters()).device
        heads = torch.tensor([len(largest.get(name, ())) for name in self._sites], device=device)
        dist.all_reduce(heads, op=dist.ReduceOp.MAX)
        sizes = heads.tolist()
        nothing = [torch.full((size,), -math.inf, device=device) for size in sizes]
        every = torch.cat([largest.get(name, none) for name, none in zip(self._sites, nothing, strict=True)])
        dist.all_reduce(every, op=dist.ReduceOp.MAX)
        return {name: S for name, S in zip(self._sites, every.split(sizes), strict=True) if len(S)}

    def _follow(self, optimizers: list[Any]) -> None:
        """Hooks the optimizers, so that `step` is called when each of them has made a step."""
        stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        for name, module in self._sites.items():
            if any(id(W) not in stepped for W in weights_to_clip(module)):
                raise ValueError(
                    f"optimizer = {short(optimizers)}: it does not step {name}'s queries and keys themselves; give all "
                    "optimizers in a list, and build them after sigma_reparam and fully_shard"
                )
        self._handles = after_steps(optimizers, self.step, torch.optim.Optimizer.register_step_post_hook)

    def _unknown(self) -> list[nn.Module]:
        """Those whose logits are not known to be q.k of their weights: no pass has used them yet."""
        return [module for name, module in self._sites.items() if name not in self._fit and weights_to_clip(module)]

    def _look_for_vain(self, clipped: dict[str, list[float]]) -> None:
        """Warns where a logit above 1.5 times the threshold does not fall by a tenth in VAIN clips in a row."""
        now = {name: max(s for s in S if s < math.inf) for name, S in clipped.items()}
        before, self._vain = self._vain, {}
        for name, worst in now.items():
            if worst > 1.5 * self.threshold:
                last, times = before.get(name, (0.0, 0))
                self._vain[name] = worst, times + 1 if worst > 0.9 * last > 0 else 0
        for name, (_, times) in self._vain.items():
            if times == VAIN:
                self._warn(
                    f"{name}: its largest logit does not fall though it is clipped: something between the "
                    "projections and softmax undoes it (a norm, a bias, another scale); leave it out with filter_fn"
                )

    def _warn(self, message: str) -> None:
        """Logs a warning, once for each message."""
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message)


class _WithRows(TrainingInterception):
    """Looks at the order of packed rows too, in the attentions that are not known yet."""

    unknown: Callable[[], list[nn.Module]]
    rows = RowOrder(())  # until hooks are installed

    def _install(self) -> None:
        super()._install()
        self.rows = RowOrder(self.unknown())

    def stop(self) -> None:
        super().stop()
        self.rows.close()
