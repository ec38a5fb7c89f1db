"""Verifies that something bounds the logits of each attention, by letting W_q and W_k grow.

    W_q, W_k -> f W_q, f W_k       the logits must stay under what is promised (promises.py): else nothing bounds them
    QK-clip, at those weights      must bring them down to its threshold: else it does not reach them

Attention is uniform in these passes, so that each layer is given the same tokens before and after. What grows is what training
makes grow: plain rows of queries and keys, W under σReparam, the lengths of weight norm; for QK-clip gamma, too.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stable_core.layers import chain_of, find_projections, is_transposed, matrix_shape, rows_of
from stable_core.qk_clip import clip_heads, query_and_key_places

from .interception import without_wrappers
from .projections import is_sigma_reparam
from .qk_clip import QKClip
from .trial import UNSTEADY, Attention, Forward, Trial, put_back

GROWTH, MOST = 32.0, 1024.0  # f, at least and at most; logits grow by its square where nothing bounds them
STILL = 4.0  # up to so many times what they were, logits have not grown
ROUNDING = 0.01  # of logits, relative; that of bfloat16

Trials = dict[str, Attention]


class Attentions:
    """The attentions of a model, in passes with different weights.

    Args:
        model: without wrappers, inside of `as_it_was`.
        forward: runs it.
        first: an ordinary pass.
        clip: the QKClip of the run.
    """

    def __init__(self, model: nn.Module, forward: Forward, first: Trial, clip: QKClip | None) -> None:
        self._model, self._forward, self._first, self._clip = model, forward, first, clip
        before = self._again()
        modules = [seen.module for seen in before.values()]
        weights = [p for module in modules for p in module.parameters()]
        clipped = {name: seen for name, seen in before.items() if clip is not None and clip.clips(seen.module)}
        with put_back(weights):
            factors = {name: _growth(seen, clip if name in clipped else None) for name, seen in before.items()}
            _multiply({seen.module: factors[name] for name, seen in before.items()}, clip)
            self._grown = self._again()
            if clip is not None:
                for name in clipped:
                    clip_heads(self._grown[name].module, self._grown[name].logits, clip.threshold, clip.alpha)
            self._clipped = self._again() if clipped else {}
        still = {name for name, seen in before.items() if abs(self._grown[name].largest) <= STILL * abs(seen.largest)}
        still = {name for name in still if before[name].promise.bound == math.inf and name not in clipped}
        with put_back(weights):  # are these weights what its logits are made of?
            _multiply({before[name].module: 0.0 for name in still}, clip)
            muted = self._again() if still else before
        self._still = {name for name in still if not torch.equal(muted[name].logits, before[name].logits)}

    def _again(self) -> Trials:
        found = Trial(self._model, self._forward, uniform=True).attentions
        if found.keys() != self._first.attentions.keys():
            raise ValueError(UNSTEADY)
        return found

    def verdicts(self) -> Iterator[tuple[nn.Module, str, str, str, str, str]]:
        """(module, name, remedy, measured, promised, what is wrong) of each attention, seen or not."""
        for name, seen in self._first.attentions.items():
            measured = f"logit {seen.largest:.4g}, grown {self._grown[name].largest:.4g}"
            if name in self._clipped and self._clip is not None and self._clip.clips(seen.module):
                measured += f", clipped {self._clipped[name].largest:.4g}"
                remedy, promised, fault = "QK-clip", f"<= {self._clip.threshold:g}", self._of_clip(name, self._clip)
            else:
                remedy, promised, fault = self._of_promise(name)
            yield seen.module, name, remedy, measured, promised, fault
        known = {seen.module for seen in self._first.attentions.values()}
        for path, module in self._model.named_modules():
            if find_projections(module) and module not in known:
                ran = module in self._first.inputs
                fault = "not seen: a kernel that torch does not dispatch" if ran else "the forward pass does not run it"
                yield module, without_wrappers(path), "unknown", "", "nothing", fault

    def _of_clip(self, name: str, clip: QKClip) -> str:
        if clip.asleep():
            return clip.asleep()
        if not self._grown[name].largest > clip.threshold:
            return f"not tried: its weights bring no logit above {clip.threshold:g}"
        reached = self._clipped[name].largest <= clip.threshold * (1 + ROUNDING)
        return "" if reached else "the clip does not reach its logits"

    def _of_promise(self, name: str) -> tuple[str, str, str]:
        seen = self._first.attentions[name]
        remedy, bound, fault = seen.promise.remedy, seen.promise.bound, seen.promise.fault or seen.order
        if fault:
            return remedy, "", fault
        if bound < math.inf:
            kept = all(at.largest <= at.promise.bound * (1 + ROUNDING) for at in (seen, self._grown[name]))
            return remedy, f"<= {bound:.4g}", "" if kept else "its logits exceed the bound"
        if name in self._still:
            return "its own", "they do not grow", ""
        unknown = "" if find_projections(seen.module) else ": its projections have no known names"
        return "none", "nothing", f"nothing bounds it{unknown}"


def _growth(seen: Attention, clip: QKClip | None) -> float:
    """How far to grow, that logits must exceed what bounds them if it does not: also where one of W_q and W_k grows alone."""
    logit, bound = max(abs(seen.largest), 1e-6), seen.promise.bound
    wanted = 4 * bound / logit if bound < math.inf else 0.0
    if clip is not None:
        wanted = 2 * math.sqrt(clip.threshold / logit)
    return min(max(GROWTH, wanted), MOST)


def _multiply(factors: dict[nn.Module, float], clip: QKClip | None) -> None:
    """Multiplies what is learned of the size of W_q and W_k of attentions, each weight once."""
    done: set[int] = set()
    for attention, factor in factors.items():
        by_gamma = clip is not None and clip.clips(attention)
        for held, (layer, tensor) in query_and_key_places(attention).items():
            for x, rows in _sizes(attention, held, layer, tensor, by_gamma):
                if id(x) not in done and x.is_floating_point():
                    (x.data.T if rows is not ... and is_transposed(layer) else x.data)[rows] *= factor
                done.add(id(x))


def _sizes(attention: nn.Module, held: str, layer: nn.Module, tensor: str, by_gamma: bool) -> list[tuple[Tensor, Any]]:
    """(tensor, which of its rows) to multiply for one projection; by gamma, what QK-clip multiplies under σReparam."""
    chain = chain_of(layer, tensor)
    if chain is None:
        found = rows_of(attention, held, matrix_shape(layer, tensor)) or {}
        rows = [x.flatten() for role, x in found.items() if role != "v"]
        return [(getattr(layer, tensor), torch.cat(rows) if rows else ...)]
    if is_sigma_reparam(chain):
        leader = chain[0].leader()
        return [(x, ...) for x in ([leader.gamma] if by_gamma else leader.originals())]
    return [(chain.original if chain.is_tensor else chain.original0, ...)]
