"""The blocks against stock fairseq, against their equations written out, and against one another."""

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.transformer import TransformerModel, base_architecture
from torch import nn
from torch.nn.utils import parametrize

import fairseq_sigma  # noqa: F401  registers the archs
from stable_core import deepnorm_scales, fold
from stable_core.sigma_reparam import SigmaReparam


class Task:
    source_dictionary = target_dictionary = Dictionary()


for letter in "abcdefgh":
    Task.source_dictionary.add_symbol(letter)


def namespace(**overrides):
    from argparse import Namespace

    sizes = {
        "encoder_embed_dim": 16,
        "encoder_ffn_embed_dim": 32,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    return Namespace(**{**sizes, "dropout": 0.0, **overrides})


def build(arch: str, **overrides) -> TransformerModel:
    args = namespace(**overrides)
    ARCH_CONFIG_REGISTRY[arch](args)
    torch.manual_seed(0)
    return ARCH_MODEL_REGISTRY[arch].build_model(args, Task)


def stock(**overrides) -> TransformerModel:
    args = namespace(encoder_layers=2, decoder_layers=2, **overrides)
    base_architecture(args)
    torch.manual_seed(0)
    return TransformerModel.build_model(args, Task)


def sentence():
    return {
        "src_tokens": torch.tensor([[4, 5, 6, 7, 2], [8, 9, 2, 1, 1]]),
        "src_lengths": torch.tensor([5, 3]),
        "prev_output_tokens": torch.tensor([[2, 7, 6, 5], [2, 9, 8, 1]]),
    }


@pytest.mark.parametrize("arch", ["deepnorm_transformer_6l", "postln_transformer_6l", "preln_transformer_6l"])
def test_with_sigma_reparam_a_plain_arch_starts_as_it_is(arch):
    plain, sigma = build(arch).eval(), build(arch, reparam="sigma").eval()
    assert len([m for m in sigma.modules() if isinstance(m, SigmaReparam)]) == 6 * 6 + 6 * 10
    torch.testing.assert_close(sigma(**sentence())[0], plain(**sentence())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [6, 18, 50, 100])
@pytest.mark.parametrize(
    "family, residual, reparam",
    [
        ("sigma_transformer", "deepnorm", "sigma"),
        ("sigma_postln_transformer", "post-ln", "sigma"),
        ("deepnorm_transformer", "deepnorm", "none"),
        ("postln_transformer", "post-ln", "none"),
        ("preln_transformer", "pre-ln", "none"),
    ],
)
def test_every_arch_has_the_sizes_of_the_paper(depth, family, residual, reparam):
    from argparse import Namespace

    args = Namespace()
    ARCH_CONFIG_REGISTRY[f"{family}_{depth}l"](args)
    assert (args.residual, args.reparam) == (residual, reparam)
    assert (args.gamma_init, args.init_std) == (("one", 0.1) if reparam == "sigma" else ("spectral", None))
    for side in ("encoder", "decoder"):
        sizes = [
            getattr(args, f"{side}_{what}") for what in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")
        ]
        assert sizes == [depth, 512, 2048, 8]
        assert getattr(args, f"{side}_normalize_before") == (residual == "pre-ln")


@pytest.mark.parametrize("arch, before", [("postln_transformer_6l", False), ("preln_transformer_6l", True)])
def test_without_reparametrisation_it_is_stock_fairseq(arch, before):
    ours = build(arch, encoder_layers=2, decoder_layers=2)
    theirs = stock(encoder_normalize_before=before, decoder_normalize_before=before)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours(**sentence())[0], theirs(**sentence())[0])


@pytest.mark.parametrize("kind", ["sigma", "spectral", "weight"])
def test_folded_it_is_stock_fairseq(kind):
    ours = build("sigma_postln_transformer_6l", encoder_layers=2, decoder_layers=2, reparam=kind)
    expected = ours(**sentence())[0]
    theirs = stock()
    theirs.load_state_dict(fold(ours).state_dict())
    torch.testing.assert_close(theirs(**sentence())[0], expected)


def test_every_linear_layer_of_the_blocks_and_nothing_else():
    model = build("sigma_transformer_6l")
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    changed = {name for name, m in model.named_modules() if parametrize.is_parametrized(m)}
    assert changed == {name for name in linear if ".layers." in name}
    assert len(changed) == 6 * 6 + 6 * 10
    for name in changed:
        assert torch.linalg.svdvals(model.get_submodule(name).weight.detach())[0] == pytest.approx(1, rel=1e-3)


def test_deepnorm_layer_follows_its_equation():
    """Post-LN with alpha on the residual: x <- LN(alpha x + f(x)), for self-attention, cross-attention and feed-forward."""
    model = build("deepnorm_transformer_18l", encoder_layers=3, decoder_layers=5)
    scales = deepnorm_scales(3, 5)
    torch.manual_seed(0)
    memory, x = torch.randn(7, 2, 16), torch.randn(4, 2, 16)

    def attend(attention, query, key):  # one softmax(q k^T / sqrt(d)) v at a time
        q, k, v = attention.q_proj(query), attention.k_proj(key), attention.v_proj(key)
        heads = []
        for part in torch.arange(16).split(8):
            logits = torch.einsum("tbc,sbc->bts", q[..., part], k[..., part]) / 8**0.5
            heads.append(torch.einsum("bts,sbc->tbc", logits.softmax(-1), v[..., part]))
        return attention.out_proj(torch.cat(heads, dim=-1))

    def feed(layer, x):
        return layer.fc2(layer.fc1(x).relu())

    layer, alpha = model.encoder.layers[0], scales.encoder.alpha
    expected = layer.self_attn_layer_norm(alpha * memory + attend(layer.self_attn, memory, memory))
    expected = layer.final_layer_norm(alpha * expected + feed(layer, expected))
    torch.testing.assert_close(layer(memory, None), expected)

    layer, alpha = model.decoder.layers[0], scales.decoder.alpha
    expected = layer.self_attn_layer_norm(alpha * x + attend(layer.self_attn, x, x))
    expected = layer.encoder_attn_layer_norm(alpha * expected + attend(layer.encoder_attn, expected, memory))
    expected = layer.final_layer_norm(alpha * expected + feed(layer, expected))
    torch.testing.assert_close(layer(x, memory)[0], expected)


def test_deepnorm_scales_the_initial_weights_of_v_out_and_feed_forward():
    plain, scaled = (
        build(f"{arch}_transformer_18l", encoder_layers=3, decoder_layers=5) for arch in ("postln", "deepnorm")
    )
    betas = {side: getattr(deepnorm_scales(3, 5), side).beta for side in ("encoder", "decoder")}
    for (name, a), b in zip(plain.state_dict().items(), scaled.state_dict().values(), strict=True):
        touched = ".layers." in name and name.endswith(
            tuple(f"{m}.weight" for m in ("v_proj", "out_proj", "fc1", "fc2"))
        )
        torch.testing.assert_close(b, a * betas[name.split(".")[0]] if touched else a)


def test_initialisation_of_the_paper():
    model = build("sigma_postln_transformer_6l", encoder_embed_dim=64, encoder_ffn_embed_dim=256)
    for name, parameter in model.named_parameters():
        if name.endswith("original"):
            assert parameter.std().item() == pytest.approx(0.1, rel=0.05), name
        if name.endswith("gamma"):
            assert parameter.item() == 1


def test_without_layer_norm():
    model = build("sigma_transformer_6l", norm="none", residual="pre-ln")
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    layer = model.encoder.layers[0]
    x = torch.randn(5, 2, 16)
    y = x + layer.self_attn(x, x, x)[0]
    torch.testing.assert_close(layer(x, None), y + layer.fc2(layer.fc1(y).relu()))


def test_joint_qkv_reaches_the_attention():
    model = build("sigma_transformer_6l", qkv="joint")
    attention = model.decoder.layers[0].encoder_attn
    stacked = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).detach()
    assert torch.linalg.svdvals(stacked)[0] == pytest.approx(1, rel=1e-3)
    assert sum(isinstance(m, SigmaReparam) for m in attention.modules()) == 2  # qkv and out_proj


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"residual": "rezero"}, "--residual rezero: allowed are 'pre-ln', 'post-ln', 'deepnorm'"),
        ({"reparam": "gamma"}, "--reparam gamma: allowed are 'none', 'sigma', 'spectral', 'weight'"),
        ({"norm": "batch"}, "--norm batch: allowed are 'layernorm', 'rmsnorm', 'stable', 'none'"),
        ({"norm": "none"}, "--residual deepnorm: it says where the norm is, and norm is none: allowed is pre-ln"),
        ({"norm": None, "residual": "none"}, "--residual none: allowed are 'pre-ln', 'post-ln', 'deepnorm'"),
        ({"alpha": 0.6}, "--alpha 0.6: allowed are numbers from 0 to 0.5"),
        ({"methods": "no_such_module"}, "--methods no_such_module: allowed are modules that Python finds"),
        ({"init_std": -1.0}, "--init-std -1.0: allowed are positive numbers"),
        ({"init_std": 0.0}, "--init-std 0.0: allowed are positive numbers"),
        ({"init_std": 0.1, "init": "stable"}, "--init-std 0.1: allowed with --init stable is none"),
        ({"n_power_iterations": 0}, "n_power_iterations = 0: allowed are whole numbers from 1"),
        ({"gamma_init": "two"}, "gamma_init = 'two': allowed are 'one', 'spectral'"),
        ({"encoder_normalize_before": True}, "--encoder-normalize-before contradicts --residual deepnorm"),
        ({"norm": "stable", "layernorm_embedding": True}, "--layernorm-embedding contradicts --norm stable"),
        (
            {"attention": "l2_tied", "norm": "layernorm", "decoder_embed_dim": 32},
            "--attention l2_tied: .* the encoder is 16 wide, the decoder 32",
        ),
        ({"quant_noise_pq": 0.1}, "--quant-noise-pq 0.1: allowed with --reparam sigma is 0"),
        (
            {"quant_noise_scalar": 0.5, "reparam": "weight"},
            "--quant-noise-scalar 0.5: allowed with --reparam weight is 0",
        ),
    ],
)
def test_wrong_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        build("sigma_transformer_6l", **overrides)


def test_a_plain_model_may_be_trained_with_quantisation_noise():
    model = build("deepnorm_transformer_6l", quant_noise_pq=0.5, quant_noise_pq_block_size=8, encoder_layers=1)
    layer = model.encoder.layers[0].fc1
    layer(torch.randn(2, 16))
    assert (layer.weight.view(-1, 8) == 0).all(dim=1).float().mean().item() == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize(
    "arch, other, message",
    [
        ("sigma_transformer_6l", {"reparam": "none"}, "holds plain weights and the model is reparametrised: use"),
        ("deepnorm_transformer_6l", {"reparam": "sigma"}, "the checkpoint is reparametrised and the model is not"),
        ("sigma_transformer_6l", {"encoder_layers": 4}, "has 4 encoder layers and the model 6"),
        (
            "sigma_transformer_6l",
            {"encoder_ffn_embed_dim": 64},
            r"fc\d.*: the checkpoint has shape .*64.*, the model .*32",
        ),
        ("sigma_transformer_6l", {"qkv": "joint"}, r"(?:q|k)_proj: the state dict has sigmas of 48 rows"),
    ],
)
def test_a_checkpoint_of_another_arch_is_refused_in_one_line(arch, other, message):
    with pytest.raises(ValueError, match=message) as error:
        build(arch).load_state_dict(build(arch, **other).state_dict())
    assert "\n" not in str(error.value)


def test_a_checkpoint_from_before_layouts_loads():
    model, other = (build("sigma_transformer_6l", qkv="joint") for _ in range(2))
    state = {key: x for key, x in model.state_dict().items() if not key.endswith("_extra_state")}
    assert len(state) < len(model.state_dict())
    other.load_state_dict(state)
    assert all(torch.equal(x, other.state_dict()[key]) for key, x in model.state_dict().items())
