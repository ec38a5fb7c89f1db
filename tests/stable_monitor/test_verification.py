"""`verify` on models whose remedies act, in all stacks, and on models that say they have one which does not."""

import copy
import math
import types

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.optim.swa_utils import AveragedModel

import hf_stable
from stable_core import SigmaReparamConfig, sigma_reparam
from stable_core.sigma_layers import sigma_layers
from stable_monitor import Monitor, QKClip, verify
from stable_monitor.records import PACE
from tests.engines import models as engines
from tests.stable_monitor.models import batch, gpt, train


def sigma_gpt(**settings) -> nn.Module:
    return sigma_reparam(gpt(**settings), SigmaReparamConfig(gamma_init="spectral"))


def look(model: nn.Module, *data, **settings):
    data = data or batch(0)
    return verify(model, lambda: model(*data), **settings)


def faults(report) -> dict[str, str]:
    assert report.ok == (not report.faults)
    return {row.name: row.verdict for row in report.faults}


def promised(report) -> dict[str, tuple[str, str]]:
    return {row.name: (row.remedy, row.promised) for row in report.rows if "logit" in row.measured}


# ---------------------------------------------------------------------------------------------- remedies that act


@pytest.mark.parametrize("kind", engines.KINDS)
def test_the_remedies_of_every_stack_act(kind):
    model = engines.build(kind)
    inputs = engines.batch(kind, 0)[0][:2]
    report = verify(model, lambda: engines.logits(kind, model, inputs))
    assert report.ok, report
    layers = [name for name, module in model.named_modules() if "Parametrized" in type(module).__name__]
    assert sorted(row.name for row in report.rows if row.name not in promised(report)) == sorted(layers)
    assert len(promised(report)) == 2
    assert {remedy for remedy, _ in promised(report).values()} == {
        "σReparam" if "sigma_vit" in kind or kind == "gpt2" else "QK-norm"
    }


VIT = {"img_size": 32, "patch_size": 8, "num_classes": 5, "depth": 1}  # 17 tokens, heads of 64


@pytest.mark.parametrize(
    "name, settings, bound",
    [
        ("stablevit_small", {}, 1.618 * math.log2(17)),  # [ST, eq. 3]
        ("stablevit_small", {"alpha": 0.5, "tau_scale": 2.0}, 2 * 1.618 * math.log2(17)),
        ("stablevit_small", {"attention": "qknorm"}, math.sqrt(64)),  # [ST, Theorem 3]
        ("vit_small_patch16_224", {"qk_norm": True}, math.sqrt(64)),  # timm's own, with LayerNorm
    ],
)
def test_the_bounds_of_norms_are_the_papers(name, settings, bound):
    model = timm.create_model(name, **VIT, **settings)
    report = look(model, torch.randn(2, 3, 32, 32))
    assert report.ok and promised(report) == {"blocks.0.attn": ("QK-norm", f"<= {bound:.4g}")}
    with torch.no_grad():  # gamma of both
        model.blocks[0].attn.q_norm.weight.mul_(torch.linspace(-3, 1, 64))
        model.blocks[0].attn.k_norm.weight.mul_(2)
    report = look(model, torch.randn(2, 3, 32, 32))
    assert report.ok and promised(report) == {"blocks.0.attn": ("QK-norm", f"<= {6 * bound:.4g}")}


@pytest.mark.parametrize("flash", [True, False])
def test_the_bound_of_sigma_reparam_is_that_of_gammas_and_inputs(flash):
    """LayerNorm gives tokens of length sqrt(32); heads are 8 wide."""
    model = sigma_reparam(gpt(flash=flash))
    with torch.no_grad():
        for block, (q, k) in zip(model.h, ((1.0, 1.0), (3.0, -0.5)), strict=True):
            block.attn.c_attn.bias.zero_()
            block.attn.c_attn.parametrizations.weight[0].gamma[:2] = torch.tensor([q, k])
            block.ln_1.eps = 1e-12
    report = look(model)
    assert report.ok, report
    expected = [f"<= {gammas * 32 / math.sqrt(8):.4g}" for gammas in (1.0, 1.5)]
    assert promised(report) == {f"h.{i}.attn": ("σReparam", expected[i]) for i in (0, 1)}
    with torch.no_grad():  # with biases of length 2 and 1
        model.h[0].attn.c_attn.bias[:64:32] = torch.tensor([2.0, 1.0])
    bound = (math.sqrt(32) + 2) * (math.sqrt(32) + 1) / math.sqrt(8)
    assert promised(look(model))["h.0.attn"] == ("σReparam", f"<= {bound:.4g}")


SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind, bound", [("Llama", None), ("Qwen3", math.sqrt(8)), ("StableLm", math.sqrt(8))])
def test_grouped_queries_of_transformers(kind, bound, implementation):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **{"qk_layernorm": True} if kind == "StableLm" else {})
    model = transformers.AutoModel.from_config(config, attn_implementation=implementation).train()
    tokens = torch.randint(3, 60, (2, 9))
    report = verify(model, lambda: model(input_ids=tokens))
    norm = {"layers.0.self_attn": ("QK-norm", f"<= {bound or 0:.4g}")}
    assert promised(report) == (norm if bound else {"layers.0.self_attn": ("none", "nothing")})
    assert report.ok == (bound is not None)
    hf_stable.sigma_reparam(model)
    report = verify(model, lambda: model(input_ids=tokens))
    assert report.ok and len(report.rows) == 8, report
    with torch.no_grad():  # which says that the bound is of this weight
        model.layers[0].self_attn.k_proj.parametrizations.weight[0].gamma.mul_(3)
    before, after = (
        float(promised(r)["layers.0.self_attn"][1][3:])
        for r in (report, verify(model, lambda: model(input_ids=tokens)))
    )
    assert after == pytest.approx(before * (1 if bound else 3), rel=2e-3)


@pytest.mark.parametrize("qkv", ["separate", "joint", "qk_joint"])
@pytest.mark.parametrize("kdim", [None, 24])
def test_torchs_attention(qkv, kdim):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, kdim=kdim, vdim=kdim, batch_first=True)

        def forward(self, x, y):
            return self.attention(x, y, y)

    torch.manual_seed(0)
    x = torch.randn(2, 5, 32)
    y = torch.randn(2, 7, kdim or 32)
    model = Model()
    assert faults(look(model, x, y)) == {"attention": "nothing bounds it"}
    if kdim and qkv != "separate":
        return  # refused, as their inputs differ in size
    sigma_reparam(model, SigmaReparamConfig(gamma_init="one", qkv=qkv))
    report = look(model, x, y)
    bound = x.norm(dim=-1).max() * y.norm(dim=-1).max() / math.sqrt(8)
    assert report.ok and promised(report) == {"attention": ("σReparam", f"<= {bound:.4g}")}


def test_cosine_attention_is_bounded_by_itself_and_l2_by_its_queries():
    model = timm.create_model(
        "swinv2_cr_tiny_ns_224", img_size=64, window_size=2, embed_dim=24, depths=(1, 1), num_heads=(2, 4)
    )
    report = look(model, torch.randn(2, 3, 64, 64))
    assert report.ok and {row[0] for row in promised(report).values()} == {"its own"}
    model = timm.create_model("stablevit_small", **VIT, attention="l2")
    x, queries = torch.randn(2, 3, 32, 32), []
    model.blocks[0].attn.qkv.register_forward_hook(
        lambda layer, args, y: queries.append(y[..., :384].unflatten(-1, (6, 64)))
    )
    model(x)
    longest = queries[0].square().sum(-1).max().item()
    assert promised(look(model, x)) == {"blocks.0.attn": ("L2", f"<= {longest / 8:.4g}")}


# ---------------------------------------------------------------------------------------------- remedies that do not act


def through(layer: nn.Module, forward) -> None:
    """Gives one layer another forward pass."""
    layer.forward = types.MethodType(forward, layer)


def original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


BYPASS = "bypassed: the output changes with the size of W"
UNREAD = "the forward pass does not read its weight"
WITHOUT_EFFECT = "the output does not depend on it"


@pytest.mark.parametrize("layer", ["attn.c_attn", "mlp.2"])
@pytest.mark.parametrize(
    "forward, verdict",
    [
        (lambda self, x: F.linear(x, original(self), self.bias), f"{UNREAD}; {BYPASS}"),
        (lambda self, x: F.linear(x, original(self) + 0 * self.weight, self.bias), f"{WITHOUT_EFFECT}; {BYPASS}"),
        (lambda self, x: F.linear(x, original(self) + self.weight, self.bias), BYPASS),
        (lambda self, x: F.linear(x, 0 * self.weight, self.bias), WITHOUT_EFFECT),
        (lambda self, x: F.linear(x, self.copy, self.bias), UNREAD),  # made once, as kernels that pack weights do
    ],
)
def test_a_weight_that_is_bypassed_is_named(layer, forward, verdict):
    model = sigma_gpt()
    module = model.h[1].get_submodule(layer)
    module.copy = module.weight.detach().clone()
    through(module, forward)
    found = faults(look(model))
    assert found.pop(f"h.1.{layer}") == verdict
    others = {}
    if verdict == WITHOUT_EFFECT and layer == "mlp.2":
        others = {"h.1.mlp.0": WITHOUT_EFFECT}  # whose output goes nowhere
    elif BYPASS in verdict and layer == "attn.c_attn":
        others = {"h.1.attn": "its logits exceed the bound"}
    assert found == others


def test_weights_that_share_a_sigma_are_named_together():
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 32), torch.randn(2, 7, 32)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))
            self.num_heads = 1

        def forward(self, x, y):
            k = F.linear(y, original(self.k_proj)) if self.raw else self.k_proj(y)
            return F.scaled_dot_product_attention(self.q_proj(x), k, self.v_proj(y))

    model = sigma_reparam(Attention(), SigmaReparamConfig(qkv="joint"))
    for raw, names in ((False, []), (True, ["k_proj", "q_proj", "v_proj"])):
        model.raw = raw
        found = faults(look(model, x, y))
        assert sorted(name for name, verdict in found.items() if BYPASS in verdict) == names
        assert [name for name, verdict in found.items() if UNREAD in verdict] == (["k_proj"] if raw else [])


def test_a_weight_that_is_tied_to_another_module_is_named():
    model = sigma_gpt()
    model.wte.weight = original(model.lm_head)
    assert faults(look(model)) == {"lm_head": BYPASS}


def test_a_layer_that_is_never_used_is_named():
    model = gpt()
    model.spare = nn.Linear(32, 32)
    sigma_reparam(model)
    assert faults(look(model)) == {"spare": UNREAD}


def test_layers_are_found_to_be_used_where_there_is_no_gradient():
    """Reentrant checkpointing has none for what is inside, and forward passes may have a no_grad of their own."""
    for wrap in (
        lambda forward: lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=True),
        torch.no_grad(),
    ):
        model = sigma_gpt()
        model.h[0].forward = wrap(model.h[0].forward)
        assert look(model).ok
        through(model.h[0].mlp[2], lambda self, x: 0 * F.linear(x, self.weight))
        assert faults(look(model)) == {"h.0.mlp.0": WITHOUT_EFFECT, "h.0.mlp.2": WITHOUT_EFFECT}


@pytest.mark.parametrize("training", [True, False])
def test_a_stale_u_is_named(training):
    model = sigma_gpt()
    train(model, 5)
    model.train(training)
    assert look(model).ok
    sigma = model.h[0].mlp[0].parametrizations.weight[0]
    u, _, _ = torch.linalg.svd(original(model.h[0].mlp[0]).detach())
    with torch.no_grad():
        sigma.u.copy_(u[:, 20])  # of a smaller singular value
        sigma.watch.forget()  # as after a checkpoint that holds it
    found = faults(look(model))
    singular = torch.linalg.svdvals(original(model.h[0].mlp[0]))
    assert found == {"h.0.mlp.0": f"stale: |W_hat| is {(singular[0] / singular[20] - 1).item():.0%} off gamma"}
    assert torch.equal(sigma.u, u[:, 20]) and look(model, lag=1e9).ok


def test_a_moving_average_is_sound():
    """Its u is an average of several, or that of the model; in evaluation it finds its own."""
    for buffers in (False, True):
        model = sigma_gpt()
        average = AveragedModel(model, use_buffers=buffers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
        for step in range(8):
            train(model, 1, optimizer=optimizer, first=step)
            average.update_parameters(model)
        report = look(average.eval(), lag=5e-3)
        assert report.ok, report


class Normed(nn.Module):
    """An attention with QK-norm; `core` says what becomes of it."""

    def __init__(self, core) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))
        self.q_norm, self.k_norm, self.num_heads, self.core = nn.RMSNorm(32), nn.RMSNorm(32), 1, core

    def forward(self, x):
        q, k = self.core(self, self.q_proj(x), self.k_proj(x))
        return F.scaled_dot_product_attention(q, k, self.v_proj(x))


@pytest.mark.parametrize(
    "core, verdict",
    [
        (lambda self, q, k: (self.q_norm(q), self.k_norm(k)), None),
        (lambda self, q, k: (q, k), "q_norm is there, and not called"),
        (lambda self, q, k: (self.q_norm(q), k), "k_norm is there, and not called"),
        (lambda self, q, k: (self.q_norm(q) * 0 + q, self.k_norm(k) * 0 + k), "its logits exceed the bound"),
        (lambda self, q, k: (q + 0 * self.q_norm(q), self.k_norm(k)), "its logits exceed the bound"),
    ],
)
def test_a_qk_norm_that_is_ignored_is_named(core, verdict):
    torch.manual_seed(0)
    model = nn.Sequential(Normed(core))
    assert faults(look(model, 0.1 * torch.randn(2, 5, 32))) == ({"0": verdict} if verdict else {})
    if verdict is None:  # what does not normalise is no norm, whatever its name
        model[0].q_norm = nn.Linear(32, 32)
        assert faults(look(model, torch.randn(2, 5, 32))) == {"0": "nothing bounds it"}
        model[0].q_norm = nn.Identity()
        assert faults(look(model, torch.randn(2, 5, 32))) == {"0": "nothing bounds it"}


def test_clips_that_do_not_act_are_named():
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clip = QKClip(model, 5.0, optimizer=optimizer)
    report = look(model, clip=clip)
    assert report.ok and promised(report) == {f"h.{i}.attn": ("QK-clip", "<= 5") for i in (0, 1)}
    clip.close()
    assert set(faults(look(model, clip=clip)).values()) == {"QKClip is closed"}

    clip = QKClip(model, 5.0, filter_fn=lambda module, name: "0" in name)
    unstepped = "QKClip has made no step: give it the optimizer, or call clip.step() after each update"
    assert faults(look(model, clip=clip)) == {"h.0.attn": unstepped, "h.1.attn": "nothing bounds it"}
    model(*batch(0))[1].backward()
    clip.step()
    assert faults(look(model, clip=clip)) == {"h.1.attn": "nothing bounds it"}

    with pytest.raises(ValueError, match="clip: it clips no attention of this model"):
        look(copy.deepcopy(model), clip=clip)


def test_a_clip_that_does_not_reach_the_logits_is_named():
    model = gpt()
    clip = QKClip(model, 5.0, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2))
    packed = [block.attn.c_attn.weight.detach().clone() for block in model.h]
    through(model.h[0].attn.c_attn, lambda self, x: F.linear(x, packed[0], self.bias))
    through(model.h[1].attn.c_attn, lambda self, x: F.linear(x, self.weight, self.bias) + 20)
    assert faults(look(model, clip=clip)) == {
        "h.0.attn": "not tried: its weights bring no logit above 5",
        "h.1.attn": "the clip does not reach its logits",
    }


class Adapted(nn.Module):
    """A layer with a low-rank addition, as LoRA's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(32, 2), nn.Linear(2, 96)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_a_wrapped_projection_is_named():
    model = sigma_gpt()
    model.h[1].attn.c_attn = Adapted(model.h[1].attn.c_attn)
    assert faults(look(model)) == {"h.1.attn": "nothing bounds it: its projections have no known names"}


def test_a_packed_copy_of_plain_weights_is_not_taken_for_a_bound():
    """Its logits do not grow with W_q and W_k either."""
    model = gpt()
    copied = model.h[0].attn.c_attn.weight.detach().clone()
    through(model.h[0].attn.c_attn, lambda self, x: F.linear(x, copied, self.bias))
    assert faults(look(model)) == {"h.0.attn": "nothing bounds it", "h.1.attn": "nothing bounds it"}


def test_layers_that_were_picked_and_attentions_that_nothing_reaches_are_named():
    model = gpt()
    sigma_reparam(model, filter_fn=lambda module, name: "h.0" in name)
    assert faults(look(model)) == {"h.1.attn": "nothing bounds it"}
    assert faults(look(model, filter_fn=lambda module, name: "mlp" in name)) == {
        f"h.1.mlp.{i}": "picked, and not reparametrised" for i in (0, 2)
    }
    report = look(model, filter_fn=lambda module, name: "h.0" in name)
    assert report.ok and "nothing bounds it; not picked" in str(report)


def test_an_attention_that_is_not_seen_is_named():
    model = gpt()

    def by_hand(self, x):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        weights = (q @ k.mT).exp()
        return self.c_proj((weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))

    through(model.h[0].attn, by_hand)
    model.spare = copy.deepcopy(model.h[1].attn)
    assert faults(look(model)) == {
        "h.0.attn": "not seen: a kernel that torch does not dispatch",
        "h.1.attn": "nothing bounds it",
        "spare": "the forward pass does not run it",
    }


# ---------------------------------------------------------------------------------------------- what it leaves behind


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_what_it_was_and_trains_on_bitwise(training):
    """With a clip that clips, and a monitor that waits for the next forward pass."""
    runs = []
    for looks in (False, True):
        model = sigma_gpt()
        model.h[1].mlp[0].requires_grad_(False)
        model.register_buffer("calls", torch.zeros(()))
        model.register_forward_hook(lambda model, args, y: model.calls.add_(1) and None)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        clip = QKClip(model, 0.5, optimizer=optimizer)
        monitor = Monitor(model, every=1, optimizer=optimizer)
        losses, steps = [], Steps(monitor)
        for step in range(4):
            losses += train(model, 1, optimizer=optimizer, first=step, monitor=lambda *_, steps=steps: steps)
            model.train(training)
            if looks:
                before, random, hooks = copy.deepcopy(model.state_dict()), torch.get_rng_state(), _hooks(model)
                look(model, clip=clip)
                assert torch.equal(torch.get_rng_state(), random) and _hooks(model) == hooks
                assert {module.training for module in model.modules()} == {training}
                assert not any(p.grad is not None for p in model.parameters())
                assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
            model.train()
        runs.append((losses, steps.records, model.state_dict()))
        monitor.close()
    assert runs[0][:2] == runs[1][:2] and all(record["layers"] for record in runs[0][1])
    assert all(torch.equal(x, runs[1][2][name]) for name, x in runs[0][2].items())


class Steps:
    """A monitor whose records are kept, without the time of day and how long things took."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor, self.records = monitor, []

    def step(self, loss):
        record = self.monitor.step(loss)
        self.records.append({key: record[key] for key in record if key not in ("time", *PACE)})


def _hooks(model: nn.Module) -> list[int]:
    return [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + (m._compiled_call_impl is not None) for m in model.modules()
    ]


def test_an_error_leaves_the_model_as_it_was():
    model, calls = sigma_gpt(), []

    def forward():
        calls.append(model(*batch(0)))
        if len(calls) == 2:  # while W is twice what it was
            raise KeyboardInterrupt

    before, hooks = copy.deepcopy(model.state_dict()), _hooks(model)
    with pytest.raises(KeyboardInterrupt):
        verify(model, forward)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert _hooks(model) == hooks and look(model).ok
    assert all("is_due" not in vars(sigma.watch) for _, sigma in sigma_layers(model))


def test_a_compiled_model():
    model = sigma_gpt()
    compiled = torch.compile(model, backend="eager")
    assert str(look(compiled)) == str(look(model))
    model.compile(backend="eager")
    assert look(model).ok


def test_a_model_in_ddp_waits_for_no_other_process(tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = sigma_gpt()
        called = nn.parallel.DistributedDataParallel(model)
        called(*batch(0))[1].backward()
        with monkeypatch.context() as patch:
            patch.setattr(called, "_sync_buffers", lambda: pytest.fail("it has waited"))
            with pytest.raises(pytest.fail.Exception):
                called(*batch(0))
            assert look(called).ok
        gradient = original(model.lm_head).grad.clone()
        called(*batch(0))[1].backward()  # goes on as it did
        assert not torch.equal(gradient, original(model.lm_head).grad)
    finally:
        dist.destroy_process_group()


def test_what_is_wrong_is_one_line():
    model = sigma_gpt()
    steps = iter(range(99))
    for error, forward in (
        ("forward: it differs from call to call", lambda: model(*batch(next(steps)))),
        ("forward: it gives no tensors", lambda: None),
    ):
        with pytest.raises(ValueError, match=error):
            verify(model, forward)
    plain = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"no attention was seen: .* no layer is reparametrised"):
        verify(plain, lambda: plain(torch.ones(2, 3)))
    with torch.no_grad():
        model.wte.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="its outputs are not numbers"):
        look(model)


def test_the_table():
    model = sigma_reparam(gpt(), filter_fn=lambda module, name: name.startswith("h.0.attn"))
    lines = str(look(model)).splitlines()
    assert lines[0].split() == ["remedy", "measured", "promised", "verdict"]
    assert [line.split()[0] for line in lines[1:-1]] == ["h.0.attn", "h.0.attn.c_attn", "h.0.attn.c_proj", "h.1.attn"]
    assert lines[2].endswith("acts") and lines[4].endswith("nothing bounds it") and lines[-1] == "1 of 4 do not act"
