"""Verifies that the forward pass uses the effective weights W_hat of σReparam and weight norm, and that they are right.

W -> 2 W                          no output may change: else W is read beside W_hat (fused kernels, tied layers)
W_hat -> 2 W_hat, its gradient    the output must change: else the layer is not used
|W_hat| in the forward pass       must be gamma: else u is stale
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from stable_core.power_iteration import top_singular_vectors
from stable_core.targets import matrix

from .interception import without_wrappers
from .projections import is_sigma_reparam
from .trial import UNSTEADY, Forward, Trial, look_away, put_back

Group = tuple[list[str], list[Tensor]]  # names and originals of weights that share a sigma


class Layers:
    """The reparametrised weights of a model, and what a first forward pass does with them.

    Args:
        model: without wrappers, inside of `as_it_was`.
        forward: runs it.
    """

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        self._model, self._forward = model, forward
        self.chains = dict(_reparametrised(model))
        self._made: dict[Any, Tensor] = {}  # W_hat that the pass has read
        if model.training:  # in evaluation the model finds the u of an average by itself
            look_away(model)
        with self._hooked(dict.fromkeys(self.chains, lambda chain, args, W_hat: self._made.update({chain: W_hat}))):
            self.first = Trial(model, forward)
        look_away(model)

    def verdicts(self, lag: float) -> Iterator[tuple[str, str, str, str, str]]:
        """(name, remedy, measured, promised, what is wrong) of each weight."""
        groups: dict[Any, Group] = {}
        for name, chain in self.chains.items():
            names, originals = groups.setdefault(chain[0].leader() if is_sigma_reparam(chain) else chain, ([], []))
            names.append(name)
            originals.append(chain.original if chain.is_tensor else chain.original1)
        bypassed, used = self._bypassed(list(groups.values())), self._used()
        for name, chain in self.chains.items():
            remedy = "σReparam" if is_sigma_reparam(chain) else "weight norm"
            measured, promised, off = self._norm(chain) if remedy == "σReparam" else ("", "", 0.0)
            faults = {
                "the forward pass does not read its weight": chain not in self._made,
                "the output does not depend on it": chain in self._made and name not in used,
                "bypassed: the output changes with the size of W": name in bypassed,
                f"stale: |W_hat| is {off:.0%} off gamma": not off <= lag,
            }
            yield name, remedy, measured, promised, "; ".join(fault for fault, found in faults.items() if found)

    @contextmanager
    def _hooked(self, hooks: dict[str, Callable[..., Tensor | None]]) -> Iterator[None]:
        """A context in which hooks see, or change, the effective weights."""
        with ExitStack() as stack:
            for name, hook in hooks.items():
                stack.callback(self.chains[name].register_forward_hook(hook).remove)
            yield

    def _bypassed(self, groups: list[Group]) -> set[str]:
        """The layers where W -> 2 W, which is exact in floating point, changes the output; found by halves."""
        if not groups:
            return set()
        weights = {id(W): W for _, originals in groups for W in originals}.values()
        with put_back(weights):
            for W in weights:
                W.data.mul_(2)
            if self.first.same(Trial(self._model, self._forward)):
                return set()
        if not self.first.same(Trial(self._model, self._forward)):
            raise ValueError(UNSTEADY)
        half = len(groups) // 2
        return self._bypassed(groups[:half]) | self._bypassed(groups[half:]) if half else set(groups[0][0])

    def _used(self) -> set[str]:
        """The layers on whose W_hat the output depends: by its gradient, and where that is zero or fails by doubling W_hat."""
        read = {name for name, chain in self.chains.items() if chain in self._made}
        if not read:
            return set()
        leaves: list[tuple[str, Tensor]] = []

        def leaf(name: str) -> Callable[..., Tensor]:
            def hook(chain: nn.Module, args: Any, W_hat: Tensor) -> Tensor:
                leaves.append((name, W_hat.detach().requires_grad_()))
                return leaves[-1][1]

            return hook

        used: set[str] = set()
        with self._hooked({name: leaf(name) for name in read}):
            outputs = [y for y in Trial(self._model, self._forward, graph=True).outputs if y.requires_grad]
        if outputs:
            with torch.enable_grad():
                parts = [y.float().flatten() @ torch.arange(y.numel(), device=y.device).cos() for y in outputs]
                total = torch.stack(parts).sum()
            with suppress(RuntimeError):  # reentrant checkpointing has no such gradients
                gradients = torch.autograd.grad(total, [W_hat for _, W_hat in leaves], allow_unused=True)
                used = {name for (name, _), g in zip(leaves, gradients, strict=True) if g is not None and g.any()}
        for name in read - used:
            with self._hooked({name: lambda chain, args, W_hat: 2 * W_hat}):
                if not self.first.same(Trial(self._model, self._forward)):
                    used.add(name)
        return used

    def _norm(self, chain: Any) -> tuple[str, str, float]:
        """(|W_hat|, gamma, how far they are apart) of the block where that is most; nothing where W_hat was not read."""
        leader = chain[0].leader()
        made = [matrix(self._made[W], leader.transposed) for W in leader.members() if W in self._made]
        if len(made) < len(leader.members()):
            return "", "", 0.0
        found = []
        for W_hat, gamma in zip(torch.cat(made).float().split(leader.rows), leader.gamma.abs().tolist(), strict=True):
            u, v = top_singular_vectors(W_hat)
            norm = torch.dot(u, W_hat @ v).item()
            found.append((abs(norm - gamma) / max(gamma, 1e-30), norm, gamma))
        off, norm, gamma = max(found)
        return f"|W_hat| {norm:.4g}", f"{gamma:.4g}", off


def _reparametrised(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, torch's ParametrizationList) of every weight under σReparam or weight norm."""
    for path, layer in model.named_modules():
        for tensor, chain in getattr(layer, "parametrizations", {}).items():
            if is_sigma_reparam(chain) or not chain.is_tensor:
                parts = path, "" if tensor == "weight" else tensor
                yield without_wrappers(".".join(filter(None, parts))), chain
