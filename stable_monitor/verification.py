"""Verifies that a remedy acts: not that a model has it, but that its forward pass does what the method promises.

It changes weights for the length of a forward pass, and looks at what the model makes of it:

    W -> 2 W under σReparam or weight norm  no output may change: else W is read beside W_hat (fused kernels, tied layers)
    W_hat -> 2 W_hat, its gradient          the output must change: else the layer is not used
    |W_hat| in the forward pass             must be gamma: else u is stale
    W_q, W_k -> f W_q, f W_k                the logits must stay under the bound (promises.py): else nothing bounds them
    QK-clip's step, at those weights        the logits must come down to the threshold: else it does not reach the weights

While W_q and W_k are grown, attention is uniform, so that each layer sees the same tokens before and after.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from stable_core.layers import chain_of, find_projections, is_transposed, matrix_shape, rows_of
from stable_core.power_iteration import top_singular_vectors
from stable_core.qk_clip import clip_heads, query_and_key_places
from stable_core.sharding import is_sharded
from stable_core.sigma_layers import sigma_layers
from stable_core.targets import FilterFn, layers, matrix
from stable_core.watching import versions

from .calls import Call
from .compiled import unnoticed, unwrap
from .interception import UNSEEN, Interception, without_wrappers
from .projections import is_sigma_reparam
from .promises import Input, Promise, promise
from .qk_clip import QKClip

Forward = Callable[[], Any]
GROWTH = 32.0  # f; logits grow by its square where nothing bounds them
ROUNDING = 0.01  # of logits, relative; in bfloat16
SAME = 1e-5  # of outputs, relative: a factor of 2 is exact
UNSTEADY = (
    "forward: it differs from call to call; give it one batch, and where layers are skipped at random call model.eval()"
)
UNIFORM = 1e30  # a temperature at which attention is uniform


@dataclass(frozen=True)
class Row:
    """What was found of one layer or attention. `verdict` is "acts", or what is wrong, or why nothing has to act."""

    name: str
    remedy: str
    measured: str
    promised: str
    verdict: str
    ok: bool


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `str()` is the table.

    Attributes:
        rows: one a reparametrised or picked layer, one an attention, in the model's order.
    """

    rows: tuple[Row, ...]

    @property
    def faults(self) -> list[Row]:
        """The rows of what does not act."""
        return [row for row in self.rows if not row.ok]

    @property
    def ok(self) -> bool:
        """Whether all remedies act."""
        return not self.faults

    def __str__(self) -> str:
        cells = [("", "remedy", "measured", "promised", "verdict")]
        cells += [(row.name, row.remedy, row.measured, row.promised, row.verdict) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        count = f"{len(self.faults)} of {len(self.rows)} do not act" if self.faults else f"all {len(self.rows)} act"
        return "\n".join([*lines, count])


def verify(
    model: nn.Module,
    forward: Forward,
    *,
    clip: QKClip | None = None,
    filter_fn: FilterFn | None = None,
    lag: float = 0.5,
) -> Verification:
    """Whether each remedy in a model acts: σReparam and weight norm of layers; σReparam, QK-norm, StableAtten, L2 and QK-clip
    of attentions, whose logits must be bounded.

        report = verify(model, lambda: model(batch), clip=clip)
        assert report.ok, report

    Between two updates; the model is afterwards what it was, bit for bit. It takes about six forward passes, one of them with a
    graph, and more for each layer that is at fault. Each process looks at its own copy.

    Args:
        model: what the training loop calls: plain, compiled, or in DistributedDataParallel.
        forward: runs the model on one batch, a small one will do, the same at each call, and without a backward pass. Where the
            model skips layers at random, call model.eval() before.
        clip: the QKClip of the run.
        filter_fn: filter_fn(module, name) -> bool picks layers that must be reparametrised, and attentions whose logits must be
            bounded; by default no layer must, and every attention.
        lag: the largest part by which |W_hat| may be off gamma. One power iteration an update is behind by 0.4 in the first
            updates of a small model at a high learning rate, and a u of another weight by far more.

    Raises:
        ValueError: the forward pass shows nothing, is not the same twice, or gives NaN; weights that are cut up over processes;
            a clip of another model.
    """
    inner = unwrap(model)
    if any(map(is_sharded, inner.parameters())):
        raise ValueError("model: its weights are cut up over processes; verify it before fully_shard")
    if clip is not None and not any(map(clip.clips, inner.modules())):
        raise ValueError("clip: it clips no attention of this model; make it after the model is complete")
    with _as_it_was(model, inner):
        look = _Verifier(inner, forward, lag)
        rows = [*look.layers(), *look.plain(filter_fn), *look.attentions(clip, filter_fn)]
    if not rows:
        raise ValueError(f"{UNSEEN}, and no layer is reparametrised")
    order = {without_wrappers(name): i for i, (name, _) in enumerate(inner.named_modules())}
    rows.sort(key=lambda row: order.get(row.name, order.get(row.name.rpartition(".")[0], 0)))
    return Verification(tuple(rows))


@dataclass
class _Attention:
    """One attention in one forward pass: the largest logit of each head, and what its remedy promised."""

    module: nn.Module
    logits: Tensor
    promise: Promise

    @property
    def largest(self) -> float:
        return self.logits.max().item()


class _Pass:
    """One forward pass: the model's outputs, what was called with which input, and its attentions."""

    def __init__(self, model: nn.Module, forward: Forward, uniform: bool = False, graph: bool = False) -> None:
        self.inputs: dict[nn.Module, Input] = {}
        self.attentions: dict[str, _Attention] = {}
        self._uniform, found = uniform, []  # type: ignore[var-annotated]
        interception = Interception(model, self._see, finished=found.append, alone=True)
        with ExitStack() as stack:
            for module in model.modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    hook = module.register_forward_pre_hook(self._note, with_kwargs=True)
                    stack.callback(hook.remove)
            stack.callback(interception.stop)
            interception.start()
            if graph:  # only inside of the model: a monitor of the run would take the pass for one of training
                hook = model.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(True) and None)
                stack.callback(hook.remove)
                hook = model.register_forward_hook(lambda *_: torch.set_grad_enabled(False) and None)
                stack.callback(hook.remove)
            with unnoticed(model):
                found.append(forward())
        self.outputs = [x for x in tree_leaves(found) if isinstance(x, Tensor) and x.is_floating_point()]

    def same(self, other: "_Pass") -> bool:
        """Whether the outputs are those of another pass, up to rounding."""
        if [x.shape for x in self.outputs] != [y.shape for y in other.outputs]:
            return False
        scales = [SAME * x.nan_to_num(0, 0, 0).abs().max().item() if x.numel() else 0.0 for x in self.outputs]
        pairs = zip(self.outputs, other.outputs, scales, strict=True)
        return all(torch.allclose(x, y, rtol=0, atol=scale) for x, y, scale in pairs)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if x is not None and x.is_floating_point() and x.numel() and x.ndim:
            self.inputs[module] = Input.of(x)

    @torch.no_grad()
    def _see(self, call: Call) -> Call:
        logits, promised = call.largest_logits(above=-math.inf).amax((0, 2)), promise(call, self.inputs)
        new = _Attention(call.site.module, logits, promised)
        old = self.attentions.get(call.site.name)
        if old is None or old.largest / old.promise.bound < new.largest / promised.bound:
            self.attentions[call.site.name] = new
        return call.at_temperature(UNIFORM) if self._uniform else call


class _Verifier:
    def __init__(self, model: nn.Module, forward: Forward, lag: float) -> None:
        self.model, self.forward, self.lag = model, forward, lag
        self.chains = dict(_reparametrised(model))
        sigmas = [sigma for _, sigma in sigma_layers(model)]
        if model.training:  # in evaluation the model finds the u of an average by itself
            _look_away(sigmas)
        self.weights: dict[Any, Tensor] = {}
        with self._hooked(dict.fromkeys(self.chains, self._keep)):
            self.first = _Pass(model, forward)
        _look_away(sigmas)
        if not self.first.outputs:
            raise ValueError("forward: it gives no tensors; it must call the model")
        if any(x.isnan().any() for x in self.first.outputs):
            raise ValueError("forward: its outputs are not numbers; go back to a sound checkpoint")

    # ------------------------------------------------------------------------------------------------ layers

    def layers(self) -> Iterator[Row]:
        """A row for each reparametrised weight."""
        bypassed, used = self._bypassed(list(self._groups())), self._used()
        for name, chain in self.chains.items():
            sigma = is_sigma_reparam(chain)
            measured, promised, off = self._norm(chain) if sigma and chain in self.weights else ("", "", 0.0)
            faults = []
            if chain not in self.weights:
                faults.append("the forward pass does not read its weight")
            elif name not in used:
                faults.append("the output does not depend on it")
            if name in bypassed:
                faults.append("bypassed: the output changes with the size of W")
            if not off <= self.lag:
                faults.append(f"stale: |W_hat| is {off:.0%} off gamma")
            remedy = "σReparam" if sigma else "weight norm"
            yield Row(name, remedy, measured, promised, "; ".join(faults) or "acts", not faults)

    def plain(self, filter_fn: FilterFn | None) -> Iterator[Row]:
        """A row for each layer that was picked and is not reparametrised."""
        for target in layers(self.model) if filter_fn else ():
            if target.tensor_name in target.module._parameters and filter_fn(target.module, target.module_name):
                yield Row(without_wrappers(target.name), "none", "", "", "picked, and not reparametrised", False)

    def _keep(self, chain: nn.Module, args: Any, W_hat: Tensor) -> None:
        self.weights[chain] = W_hat.detach()

    @contextmanager
    def _hooked(self, hooks: dict[str, Callable[..., Tensor | None]]) -> Iterator[None]:
        """A context in which hooks see, or change, the effective weights."""
        handles = [self.chains[name].register_forward_hook(hook) for name, hook in hooks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _groups(self) -> Iterator[tuple[list[str], list[Tensor]]]:
        """(names, W) of weights that share a sigma; scaled together, they leave the model what it is."""
        by_owner: dict[int, tuple[list[str], list[Tensor]]] = {}
        for name, chain in self.chains.items():
            owner = chain[0].leader() if is_sigma_reparam(chain) else chain
            names, originals = by_owner.setdefault(id(owner), ([], []))
            names.append(name)
            originals.append(chain.original if chain.is_tensor else chain.original1)
        yield from by_owner.values()

    def _bypassed(self, groups: list[tuple[list[str], list[Tensor]]]) -> set[str]:
        """The layers where the output changes with W -> 2 W, by halves."""
        weights = [W for _, originals in groups for W in originals]
        with _put_back(weights):
            for W in {id(W): W for W in weights}.values():
                W.data.mul_(2)
            if not groups or self.first.same(_Pass(self.model, self.forward)):
                return set()
        if len(groups) == 1:
            return set(groups[0][0])
        if len(groups) == len(list(self._groups())) and not self.first.same(_Pass(self.model, self.forward)):
            raise ValueError(UNSTEADY)
        half = len(groups) // 2
        return self._bypassed(groups[:half]) | self._bypassed(groups[half:])

    def _used(self) -> set[str]:
        """The layers on whose W_hat the output depends: by its gradient, and where that is zero or fails by doubling W_hat."""
        read = {name: chain for name, chain in self.chains.items() if chain in self.weights}
        leaves: list[tuple[str, Tensor]] = []

        def cut(name: str) -> Callable[..., Tensor]:
            def hook(chain: nn.Module, args: Any, W_hat: Tensor) -> Tensor:
                leaves.append((name, W_hat.detach().requires_grad_()))
                return leaves[-1][1]

            return hook

        used: set[str] = set()
        with self._hooked({name: cut(name) for name in read}):
            outputs = [y for y in _Pass(self.model, self.forward, graph=True).outputs if y.requires_grad]
        if outputs:
            with torch.enable_grad():
                total = sum((y.float().flatten() @ torch.arange(y.numel(), device=y.device).cos()) for y in outputs)
            with suppress(RuntimeError):  # reentrant checkpointing, which has no such gradients
                gradients = torch.autograd.grad(total, [leaf for _, leaf in leaves], allow_unused=True)
                used = {name for (name, _), g in zip(leaves, gradients, strict=True) if g is not None and g.any()}
        for name in read.keys() - used:
            with self._hooked({name: lambda chain, args, W_hat: 2 * W_hat}):
                if not self.first.same(_Pass(self.model, self.forward)):
                    used.add(name)
        return used

    def _norm(self, chain: Any) -> tuple[str, str, float]:
        """(|W_hat|, gamma, how far they are apart) of the block where that is most."""
        leader = chain[0].leader()
        made = [self.weights[member] for member in leader.members() if member in self.weights]
        if len(made) < len(leader.members()):
            return "", "", 0.0
        blocks = torch.cat([matrix(W_hat, leader.transposed) for W_hat in made]).float().split(leader.rows)
        found = []
        for W_hat, gamma in zip(blocks, leader.gamma.detach().abs().tolist(), strict=True):
            u, v = top_singular_vectors(W_hat)
            norm = torch.dot(u, W_hat @ v).item()
            found.append((abs(norm - gamma) / max(gamma, 1e-30), norm, gamma))
        off, norm, gamma = max(found)
        return f"|W_hat| {norm:.4g}", f"{gamma:.4g}", off

    # ------------------------------------------------------------------------------------------------ attentions

    def attentions(self, clip: QKClip | None, filter_fn: FilterFn | None) -> Iterator[Row]:
        """A row for each attention, seen or not."""
        clips = clip.clips if clip is not None else lambda module: False
        before = _Pass(self.model, self.forward, uniform=True)
        modules = {name: seen.module for name, seen in before.attentions.items()}
        after = grown = own = before
        with _put_back([p for module in modules.values() for p in module.parameters()]):
            factors = dict.fromkeys(modules, GROWTH)
            for name, seen in before.attentions.items():
                if clip is not None and clips(seen.module):
                    factors[name] = max(GROWTH, 2 * math.sqrt(clip.threshold / max(abs(seen.largest), 1e-6)))
            _multiply(modules, factors, clips)
            grown = self._again(before)
            if clip is not None:
                for seen in grown.attentions.values():
                    if clips(seen.module):
                        clip_heads(seen.module, seen.logits, clip.threshold, clip.alpha)
                after = self._again(before)
        with _put_back([p for module in modules.values() for p in module.parameters()]):
            kept = {n: m for n, m in modules.items() if _keeps(before.attentions[n], grown.attentions[n])}
            _multiply(kept, dict.fromkeys(kept, 0.0), clips)
            own = self._again(before) if kept else before
        for name, seen in self.first.attentions.items():
            large = grown.attentions[name]
            measured = f"logit {seen.largest:.4g}, grown {large.largest:.4g}"
            if clip is not None and clips(seen.module):
                measured += f", clipped {after.attentions[name].largest:.4g}"
                remedy, promised = "QK-clip", f"<= {clip.threshold:g}"
                fault = clip.asleep() or _fault_of_clip(large.largest, after.attentions[name].largest, clip.threshold)
            else:
                remedy, promised, fault = seen.promise.remedy, f"<= {seen.promise.bound:.4g}", seen.promise.fault
                if not fault and seen.promise.bound < math.inf:
                    kept_to = all(x.largest <= x.promise.bound * (1 + ROUNDING) for x in (seen, large))
                    fault = "" if kept_to else "its logits exceed the bound"
                elif not fault and name in kept and not torch.equal(own.attentions[name].logits, large.logits):
                    remedy, promised = "its own", "they do not grow"
                elif not fault:
                    unknown = "" if find_projections(seen.module) else ": its projections have no known names"
                    promised, fault = "nothing", f"nothing bounds it{unknown}"
            picked = filter_fn is None or filter_fn(seen.module, name)
            verdict = fault if picked or not fault else f"{fault}; not picked"
            yield Row(name, remedy, measured, promised, verdict or "acts", not fault or not picked)
        known = {id(seen.module) for seen in self.first.attentions.values()}
        for path, module in self.model.named_modules():
            if find_projections(module) and id(module) not in known:
                ran = module in self.first.inputs
                why = "not seen: a kernel that torch does not dispatch" if ran else "the forward pass does not run it"
                yield Row(without_wrappers(path), "unknown", "", "", why, False)

    def _again(self, before: "_Pass") -> "_Pass":
        """A pass with uniform attention, with the weights as they are now."""
        now = _Pass(self.model, self.forward, uniform=True)
        if not now.attentions.keys() == before.attentions.keys() == self.first.attentions.keys():
            raise ValueError(UNSTEADY)
        return now


def _keeps(before: _Attention, grown: _Attention) -> bool:
    """Whether logits stay where they are, with nothing known that bounds them, though W_q and W_k grow."""
    return grown.promise.bound == math.inf and abs(grown.largest) <= 4 * abs(before.largest)


def _fault_of_clip(grown: float, clipped: float, threshold: float) -> str:
    if grown <= threshold:
        return f"not tried: its weights bring no logit above {threshold:g}"
    return "" if clipped <= threshold * (1 + ROUNDING) else "the clip does not reach its logits"


def _multiply(modules: dict[str, nn.Module], factors: dict[str, float], clips: Callable[[nn.Module], bool]) -> None:
    """Multiplies what is learned of W_q and W_k, each weight once: plain rows; W, of whose size σReparam makes nothing, or, for
    a QK-clip to have something to clip, gamma; the lengths of weight norm."""
    done: set[int] = set()
    for name, attention in modules.items():
        for held, (layer, tensor) in query_and_key_places(attention).items():
            chain = chain_of(layer, tensor)
            if chain is None:
                found = rows_of(attention, held, matrix_shape(layer, tensor)) or {
                    "all": torch.arange(matrix_shape(layer, tensor)[0])
                }
                rows = torch.cat([x.flatten() for role, x in found.items() if role != "v"])
                changed = [getattr(layer, tensor)]
            else:
                rows, leader = slice(None), chain[0].leader() if is_sigma_reparam(chain) else None
                plain = [chain.original if chain.is_tensor else chain.original0]
                changed = plain if leader is None else [leader.gamma] if clips(attention) else leader.originals()
            for x in changed:
                if id(x) not in done and x.is_floating_point():
                    view = x.data.T if chain is None and is_transposed(layer) else x.data
                    view[rows] *= factors[name]
                done.add(id(x))


def _reparametrised(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, torch's ParametrizationList) of every weight under σReparam or weight norm."""
    for path, layer in model.named_modules():
        for tensor, chain in getattr(layer, "parametrizations", {}).items():
            if is_sigma_reparam(chain) or not chain.is_tensor:
                tail = "" if tensor == "weight" else tensor
                yield without_wrappers(".".join(part for part in (path, tail) if part)), chain


def _look_away(sigmas: list[Any]) -> None:
    """From now on no forward pass compares sigma with what was, nor puts u right, until `_as_it_was` ends."""
    for sigma in sigmas:
        vars(sigma.watch)["is_due"] = lambda originals: False


@contextmanager
def _as_it_was(model: nn.Module, inner: nn.Module) -> Iterator[None]:
    """A context after which the model is what it was: buffers, random numbers, and what σReparam and wrappers remember."""
    before = []
    for _, sigma in sigma_layers(inner):
        current = sigma.watch._seen == versions(sigma.originals())
        before.append((sigma, dict(vars(sigma)), dict(vars(sigma.watch)), current))
    wrappers: list[Any] = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    flags = [(wrapper, wrapper.require_forward_param_sync) for wrapper in wrappers]
    for wrapper in wrappers:  # each process looks at its own copy, and waits for no other
        wrapper.require_forward_param_sync = False
    try:
        with unnoticed(inner):
            yield
    finally:
        for wrapper, flag in flags:
            wrapper.require_forward_param_sync = flag
        for sigma, own, watch, current in before:
            vars(sigma).update(own)
            vars(sigma.watch).clear()
            vars(sigma.watch).update(watch)
            if current:  # QK-clip's step has moved version counters
                sigma.watch.rebind(sigma.originals())


@contextmanager
def _put_back(weights: list[Any]) -> Iterator[None]:
    """A context after which the weights have their values again, without a trace in their version counters."""
    before = [(W, W.detach().clone()) for W in {id(W): W for W in weights}.values()]
    try:
        yield
    finally:
        for W, value in before:
            W.data.copy_(value)
