"""transformers' attention interface under any name: its record is that of the same model with attn_implementation="eager".

test_monitor.py holds the numbers of that against transformers' own attention weights.
"""

import sys
import types

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import hub_kernels
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stable_monitor import Monitor, attention_temperature, references
from tests.stable_monitor import stand_ins

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
HUB = "kernels-community/flash-attn2"


def build(implementation: str, kind: str = "Llama", **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.config._attn_implementation = implementation  # after construction, where the package is asked for
    with torch.no_grad():
        for p in model.parameters():  # for entropies that differ
            p.mul_(6 if p.ndim > 1 else 1)
    return model.train()


def inputs(padded: bool = True) -> dict[str, torch.Tensor]:
    tokens = torch.randint(5, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(tokens)
    seen[1, 8:] = 0 if padded else 1
    return {"input_ids": tokens, "attention_mask": seen}


def record(model, **given) -> dict:
    with Monitor(model, 1) as monitor:
        model(**given)
        return monitor.step()["layers"]


def alike(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys() and got
    for name, layer in expected.items():
        assert got[name]["kind"] == layer["kind"]
        for key in ("keys", "entropy", "entropy_min", "bound", "max_logit"):
            assert got[name][key] == pytest.approx(layer[key], abs=3e-4), (name, key)


class Unknown(torch.autograd.Function):
    """The kernel of a function of the user, of which nothing is known; what it returns is none of this test's business."""

    @staticmethod
    def forward(ctx, q, v):
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx, grad):
        return None, None


def unknown(module, query, key, value, attention_mask, **kwargs):
    return Unknown.apply(query, value), None


@pytest.fixture
def kernels(monkeypatch):
    """flash-attn as transformers would import it, and a hub of kernels."""
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    for name in ("_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(flash, name, None, raising=False)
    for name in ("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(flash, name, None, raising=False)
    hub = types.ModuleType("flash_attn2_0123abc")
    hub.flash_attn_func, hub.flash_attn_varlen_func = stand_ins.flash_attn_func, stand_ins.flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, hub.__name__, hub)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *args, **kwargs: hub)
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True, raising=False)
    monkeypatch.setattr(hub_kernels, "_kernels_available", True, raising=False)  # where transformers is older
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", HUB])
def test_flash_attention_by_way_of_transformers(name, padded, kernels, monkeypatch):
    if name != HUB:

        def imported(*args, **kwargs):
            from tests.stable_monitor.stand_ins import flash_attn_func, flash_attn_varlen_func  # as from flash_attn

            return flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input

        monkeypatch.setattr(flash, "_lazy_imports", imported)
    else:
        hub_kernels.load_and_register_attn_kernel(HUB)
    model, eager, given = build(name), build("eager"), inputs(padded)
    alike(record(model, **given), record(eager, **given))
    with attention_temperature(model, 0.5), attention_temperature(eager, 0.5):
        logits, expected = (m(**given).logits for m in (model, eager))
    real = given["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention():
    model, eager, given = build("flex_attention").requires_grad_(False), build("eager"), inputs()
    with torch.compiler.set_stance("force_eager"):
        alike(record(model, **given), record(eager, **given))
    with attention_temperature(model, 0.5), attention_temperature(eager, 0.5):
        logits, expected = (m(**given).logits for m in (model, eager))
    real = given["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("masks", [None, sdpa_mask])
def test_a_function_of_the_user_with_a_kernel_that_is_not_known(masks, kernels):
    AttentionInterface.register("mine", unknown)
    if masks is not None:  # without, the function gets no mask, and module.is_causal says it
        AttentionMaskInterface.register("mine", masks)
    given = inputs(padded=masks is not None)
    first = "model.layers.0.self_attn"
    model = build("mine")
    got = record(model, **given)
    assert len(got) == 2
    alike({first: got[first]}, {first: record(build("eager"), **given)[first]})
    refused = pytest.raises(ValueError, match="the kernel of its attention function is not known")
    with refused, attention_temperature(model, 0.5):
        model(**given)
    with attention_temperature(model):
        model(**given)


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("Gemma2", {"attn_logit_softcapping": 2.0, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2}),
        ("Mistral", {"sliding_window": 4}),
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 2}),
    ],
)
def test_windows_soft_caps_and_sinks(kind, settings, kernels):
    AttentionInterface.register("mine", unknown)
    model, eager, given = build("mine", kind, **settings), build("eager", kind, **settings), inputs(padded=False)
    first = "model.layers.0.self_attn"
    got, expected = record(model, **given), record(eager, **given)
    if kind == "GptOss":  # written out, the sink hides that attention is causal, and the largest logit is subtracted
        expected[first] |= {"kind": "decoder", "max_logit": got[first]["max_logit"]}
    alike({first: got[first]}, {first: expected[first]})


def test_a_function_of_the_user_that_ends_in_what_is_seen_is_seen_there(kernels):
    def colder(module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, 2 * query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("colder", colder)
    model, sdpa, given = build("colder"), build("sdpa"), inputs(padded=False)
    got = record(model, **given)
    with attention_temperature(sdpa, 0.5):
        alike(got, record(sdpa, **given))
    assert AttentionInterface._global_mapping["colder"] is colder


def test_a_function_that_is_registered_anew_in_the_pass(kernels):
    """As transformers does when it loads a kernel at its first call; the new function stays registered afterwards."""

    def first(*args, **kwargs):
        AttentionInterface.register("mine", second)
        return unknown(*args, **kwargs)

    def second(*args, **kwargs):
        return unknown(*args, **kwargs)

    AttentionInterface.register("mine", first)
    AttentionMaskInterface.register("mine", sdpa_mask)
    assert len(record(build("mine"), **inputs())) == 2
    assert AttentionInterface._global_mapping["mine"] is second


def test_a_module_in_the_place_of_another_is_searched_anew(monkeypatch):
    """Python often gives a new module the id of the one that is gone."""
    name = "flash_attn2_0123abc"
    monkeypatch.setitem(sys.modules, name, None)  # which is undone at the end
    for _ in range(20):
        sys.modules[name] = hub = None
        sys.modules[name] = hub = types.ModuleType(name)
        hub.flash_attn_func = stand_ins.flash_attn_func
        held = references.hold(torch.nn.Identity(), lambda *_: None)
        assert isinstance(hub.flash_attn_func, references.StandIn)
        references.release(held)
        assert hub.flash_attn_func is stand_ins.flash_attn_func
