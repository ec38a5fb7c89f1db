"""u follows its weight, whoever changes it and however: the norm of the effective weight, from an SVD, is gamma."""

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn.utils import parametrize

from stable_core import SigmaReparamConfig, advance, converge, fold, sigma_layers, sigma_reparam
from tests.stable_core.models import mlp, reparametrised


def ratios(model: nn.Module) -> list[float]:
    """Norm of the effective weight over gamma, of each layer that has a sigma to itself."""
    found = []
    for name, sigma in sigma_layers(model):
        W_hat = model.get_submodule(name).weight.detach().flatten(1).double()
        found.append((torch.linalg.svdvals(W_hat)[0] / sigma.gamma.detach().abs()).item())
    return found


def followed(model: nn.Module, step, updates: int = 300) -> bool:
    """Trains at a high rate and lets the weights rest at the end, when power iterations catch up if there are any."""
    generator = torch.Generator().manual_seed(1)
    for update in range(updates):
        x = torch.randn(32, 90, generator=generator)
        step(model, lambda x=x: (model(x) - x[:, :70].sin()).square().mean(), 1e-2 if update < updates // 2 else 1e-7)
    return ratios(model) == pytest.approx([1.0] * len(ratios(model)), rel=0.02)


class DataAdam(torch.optim.Adam):
    """Adam on copies, written back through `.data`, where no version counter sees it (fairseq's way)."""

    def step(self, closure=None):
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        super().step(closure)
        parameters = [p for group in self.param_groups for p in group["params"]]
        after = [p.detach().clone() for p in parameters]
        for p, old, new in zip(parameters, before, after, strict=True):
            p.data = old
            p.data.copy_(new)


class Clears(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


class Container:
    """What holds optimizers and is none."""

    def __init__(self, model):
        self.inner = [torch.optim.Adam([p], lr=1e-2) for p in model.parameters()]

    def step(self):
        for optimizer in self.inner:
            optimizer.step()

    @property
    def param_groups(self):
        return [group for optimizer in self.inner for group in optimizer.param_groups]


class Placeholder(torch.optim.Optimizer):
    """A wrapper whose own groups have a rate of 0, as of optimizers that schedule the inner one's."""

    def __init__(self, model):
        super().__init__(model.parameters(), {"lr": 0.0})
        self.rate, self.exp = 0.0, [torch.zeros_like(p) for p in model.parameters()]

    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.data.add_(p.grad.sign(), alpha=-self.rate)


OPTIMIZERS = {
    "subclass": lambda model: type(
        "Sub", (torch.optim.AdamW,), {"step": lambda s, c=None: torch.optim.AdamW.step(s, c)}
    )(model.parameters()),
    "data": lambda model: DataAdam(model.parameters()),
    "clears": lambda model: Clears(model.parameters(), lr=1e-2, momentum=0.9),
    "container": Container,
    "placeholder": Placeholder,
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_whatever_the_optimizer(kind):
    model = mlp()
    optimizer = OPTIMIZERS[kind](model)

    def step(model, loss, lr):
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if kind == "placeholder" else lr
        optimizer.rate = lr
        for p in model.parameters():
            p.grad = None
        loss().backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert followed(model, step)


def test_lbfgs_evaluates_in_its_step():
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def step(model, loss, lr):
        def closure():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.param_groups[0]["lr"] = 10 * lr
        optimizer.step(closure)

    assert followed(model, step, updates=80)


@pytest.mark.parametrize("hidden", [False, True])
def test_after_a_step_that_raised_half_way(hidden):
    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                if p.ndim == 2:
                    (p.data if hidden else p.detach()).copy_(torch.randn_like(p))
            raise KeyboardInterrupt

    model, other = mlp(), mlp(1)
    model(torch.randn(2, 90)).sum().backward()
    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
        warnings.simplefilter("error")
        Breaks(model.parameters(), lr=0.1).step()
    model(torch.randn(2, 90))
    assert ratios(model) == pytest.approx([1, 1], rel=1e-3)
    optimizer = torch.optim.Adam(other.parameters())  # and another optimizer works as ever

    def step(model, loss, lr):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    assert followed(other, step)


def test_in_the_backward_pass_and_beside_another_thread():
    def train(model, done):
        def stepper(p):
            optimizer = torch.optim.Adam([p])

            def update(p):
                optimizer.step()
                optimizer.zero_grad()

            p.register_post_accumulate_grad_hook(update)
            return optimizer

        optimizers = [stepper(p) for p in model.parameters()]

        def step(model, loss, lr):
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = lr
            loss().backward()

        done.append(followed(model, step))

    done, models = [], [mlp(seed) for seed in range(2)]
    threads = [threading.Thread(target=train, args=(model, done)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [True, True]


@pytest.mark.parametrize("when", ["before the first pass", "after a pass", "after a step"])
def test_a_write_to_data_is_put_right_and_told_once(when):
    model, x = mlp(), torch.randn(4, 90)
    if when != "before the first pass":
        model(x).sum().backward()
    if when == "after a step":
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    for layer in (model[0], model[2]):
        layer.parametrizations.weight.original.data.normal_(std=0.1)
    with pytest.warns(RuntimeWarning, match=r"0: its weight changed .* stable_core\.advance") as told:
        for _ in range(3):
            model(x)
    assert len(told) == 1
    assert ratios(model) == pytest.approx([1, 1], rel=1e-3)


def test_a_loop_without_an_optimizer_is_followed():
    model = mlp()

    def step(model, loss, lr):
        gradients = torch.autograd.grad(loss(), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.sub_(g.sign(), alpha=lr)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert followed(model, step)


def test_a_checkpoint_without_u():
    source, target = mlp(0, gamma_init="spectral"), mlp(1, gamma_init="spectral")
    target.load_state_dict({k: v for k, v in source.state_dict().items() if not k.endswith(".u")}, strict=False)
    x = torch.randn(3, 90)
    torch.testing.assert_close(target(x), source(x), rtol=1e-3, atol=1e-4)


def test_a_checkpoint_that_kept_v_too():
    source, target = mlp(0), mlp(1)
    state = source.state_dict()
    state |= {k[:-1] + "v": torch.randn(1, 7) for k in state if k.endswith(".u")}
    target.load_state_dict(state)
    x = torch.randn(3, 90)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("how", ["fold", "torch", "copy", "meta"])
def test_a_model_that_is_reparametrised_again_is_the_new_ones_alone(how):
    model = nn.Sequential(nn.Linear(90, 130), nn.GELU(), nn.Linear(130, 70))
    gc.disable()  # a cycle would keep the old one until it runs
    try:
        if how == "meta":
            with torch.device("meta"):
                model = mlp()
            model.to_empty(device="cpu")
            with torch.no_grad():
                for p in model.parameters():
                    p.normal_()
            converge(model)
        else:
            sigma_reparam(model)
        if how == "copy":
            model = copy.deepcopy(model)
        old = [weakref.ref(sigma) for _, sigma in sigma_layers(model)]
        if how == "torch":
            for layer in (model[0], model[2]):
                parametrize.remove_parametrizations(layer, "weight")
        else:
            fold(model)
        assert [link() for link in old] == [None, None]
        sigma_reparam(model, SigmaReparamConfig(gamma_init="spectral"))
        optimizer = torch.optim.Adam(model.parameters())

        def step(model, loss, lr):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        assert followed(model, step)
    finally:
        gc.enable()


def test_parameters_are_saved_and_loaded_as_torch_allows(tmp_path):
    """A weight knows its parametrization, which a file must not hold."""
    model = mlp()
    torch.save(dict(model.named_parameters()), tmp_path / "parameters.pt")
    loaded = torch.load(tmp_path / "parameters.pt", weights_only=True)
    for name, p in model.named_parameters():
        assert torch.equal(p, loaded[name])
    advance(loaded.values())  # nobody's weights any more


@pytest.mark.parametrize("scale", [1e-15, 1e-9, 1e6, 1e12])
def test_the_scale_of_a_weight_does_not_matter(scale):
    model = mlp()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.parametrizations.weight.original.mul_(scale)
    for _ in range(3):
        advance(model.parameters())
        assert ratios(model) == pytest.approx([1, 1], rel=1e-2)
        model(torch.randn(2, 90)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("learns", [-1.0, 0.5])
def test_a_gamma_that_has_passed_zero_is_told_at_the_next_evaluation_once(learns):
    """What the layer has to compute is so many times what it does: by SGD the sign of gamma changes before that of W does."""
    torch.manual_seed(1)
    model, x = sigma_reparam(nn.Sequential(nn.Linear(8, 1, bias=False))), torch.randn(64, 8)
    ((_, sigma),) = sigma_layers(model)
    target = learns * model(x).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(50):
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model.eval()
            model.train()
    told = [str(warning.message) for warning in caught]
    assert (sigma.gamma.item() < 0) == (learns < 0)
    assert len(told) == (1 if learns < 0 else 0)
    assert all(message.startswith("0: its gamma is negative") for message in told)


@pytest.mark.parametrize("transform", [False, True])
def test_training_other_tensors_in_the_weights_places_warns_with_a_way_out(transform):
    """As functional training loops and FSDP1 do: u is the weight's, and never moves."""
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(32, 90)
    target = x[:, :70].sin()
    small = {
        name: 0.05 * p if name.endswith("original") else p for name, p in model.named_parameters()
    }  # they turn faster
    parameters = {name: p.detach().clone() for name, p in small.items()}

    def loss(given):
        return (functional_call(model, given, (x,)) - target).square().mean()

    def step(given, way_out):
        if transform:
            gradients = grad(loss)(given)
        else:
            learning = {name: p.requires_grad_() for name, p in given.items()}
            gradients = dict(zip(given, torch.autograd.grad(loss(learning), list(learning.values())), strict=True))
        new = {name: (p - 3e-3 * gradients[name].sign()).detach() for name, p in given.items()}
        if way_out:
            model.load_state_dict(new, strict=False)
            advance(model.parameters())
        return new

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken = parameters
        for _ in range(20):
            taken = step(taken, way_out=True)
    model = mlp()
    with pytest.warns(RuntimeWarning, match="other tensors in place of its weight") as told:
        for _ in range(20):
            parameters = step(parameters, way_out=False)
    assert len([one for one in told if "in place of" in str(one.message)]) == 1


def test_zero_3_is_refused():
    """DeepSpeed marks its parameters, and gives each pass a tensor of its own."""
    model = mlp()
    for sigma in reparametrised(model):
        sigma.originals()[0].ds_id = 0
        sigma.register_forward_pre_hook(lambda module, given: (given[0] + 0,))
    with pytest.raises(
        ValueError, match=r"0: DeepSpeed's ZeRO-3 takes its weight away .* take stage 1 or 2, or fully_shard"
    ):
        model(torch.randn(4, 90))


@pytest.mark.parametrize("by", ["one", "two", "rarely", "late", "bf16", "before", "frozen"])
def test_a_gamma_that_no_optimizer_holds_is_told(by):
    """As where the optimizer was built before sigma_reparam: W is the parameter that it has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizers = [torch.optim.AdamW(model.parameters())]
    sigma_reparam(model)
    if by == "bf16":  # in which gamma rounds back to what it was
        model.bfloat16()
    gammas = [sigma.gamma for _, sigma in sigma_layers(model)]
    if by in ("one", "bf16"):
        optimizers = [torch.optim.AdamW(model.parameters())]
    elif by in ("two", "rarely", "late"):
        optimizers += [torch.optim.SGD(gammas, lr=0.0 if by == "late" else 0.1)]
    elif by == "frozen":
        for gamma in gammas:
            gamma.requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for update in range(60):
            model(torch.randn(4, 8, dtype=gammas[0].dtype)).square().mean().backward()
            for optimizer in optimizers if by != "rarely" or update % 4 == 3 else optimizers[:1]:
                optimizer.step()
            model.zero_grad()
    told = [str(warning.message) for warning in caught if "no optimizer holds it" in str(warning.message)]
    assert len(told) == (1 if by == "before" else 0)
    assert all(message.startswith("0: its weight learns") for message in told)


def test_a_closure_is_called_as_its_optimizer_calls_it_and_may_follow_a_write():
    """Line searches give closures arguments; sharpness-aware steps write to the weights and then call them."""

    class Searching(torch.optim.SGD):
        def step(self, closure):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.data.mul_(1.01)
            assert closure(backward=False) == closure.__doc__
            return super().step()

    model = mlp()

    def closure(backward=True):
        """model"""
        model(torch.randn(4, 90))
        assert not backward
        return "model"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for parameters in (model.parameters(), nn.Linear(2, 2).parameters()):
            Searching(parameters, lr=0.1).step(closure)
