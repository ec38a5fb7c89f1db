"""The language model: against stock fairseq, against its equations written out, and under fairseq's commands."""

import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.data import Dictionary, data_utils
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from omegaconf import OmegaConf
from torch import nn
from torch.nn.functional import log_softmax, normalize
from torch.nn.utils import parametrize

import fairseq_sigma  # noqa: F401  registers the archs
from fairseq_sigma.blocks import DecoderLayer
from stable_core import deepnorm_scales
from tests.stable_core.models import count_advances

from .conftest import USER_DIR, call

SIGMA, PRE_LN, POST_LN = (f"{family}_transformer_lm_wiki103" for family in ("sigma", "preln", "postln"))
TINY = {
    "decoder_embed_dim": 16, "decoder_ffn_embed_dim": 32, "decoder_attention_heads": 2, "decoder_layers": 2,
    "adaptive_input_cutoff": "10,16", "adaptive_softmax_cutoff": "10,16", "adaptive_softmax_dropout": 0.0,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
}  # fmt: skip


def words(number: int) -> Dictionary:
    dictionary = Dictionary()
    for i in range(number - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    return dictionary


def task(dictionary: Dictionary):
    return SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)


TASK = task(words(24))


def build(arch: str, **overrides):
    args = Namespace(**{**TINY, "tokens_per_sample": 8, **overrides})
    ARCH_CONFIG_REGISTRY[arch](args)
    torch.manual_seed(0)
    return ARCH_MODEL_REGISTRY[arch].build_model(args, TASK)


def sample() -> dict:
    stream = torch.randint(4, 24, (3, 9), generator=torch.Generator().manual_seed(0))
    return {"net_input": {"src_tokens": stream[:, :-1]}, "target": stream[:, 1:].contiguous()}


def log_probs(model, batch: dict) -> torch.Tensor:
    """(batch, length, words)"""
    output = model(**batch["net_input"])
    return model.get_normalized_probs(output, log_probs=True)


# ------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("suffix, layers", [("", 16), ("_32l", 32)])
@pytest.mark.parametrize(
    "arch, norm, before, reparam",
    [(SIGMA, "none", False, "sigma"), (PRE_LN, "layernorm", True, "none"), (POST_LN, "layernorm", False, "none")],
)
def test_every_arch_has_the_sizes_of_the_paper(arch, norm, before, reparam, suffix, layers):
    args = Namespace()
    ARCH_CONFIG_REGISTRY[arch + suffix](args)
    assert (args.norm, args.reparam, args.init_std, args.gamma_init) == (
        norm,
        reparam,
        None,
        "one" if reparam == "sigma" else "spectral",
    )
    sizes = (args.decoder_layers, args.decoder_embed_dim, args.decoder_ffn_embed_dim, args.decoder_attention_heads)
    assert sizes == (layers, 1024, 4096, 8)
    assert args.decoder_normalize_before == before
    assert args.adaptive_input and args.tie_adaptive_weights and args.tie_adaptive_proj
    stock = Namespace(decoder_layers=layers)
    ARCH_CONFIG_REGISTRY["transformer_lm_wiki103"](stock)
    ours = {key: value for key, value in vars(args).items() if hasattr(stock, key)}
    assert {**vars(stock), "decoder_normalize_before": before} == ours


def test_pre_ln_is_stock_fairseq_bit_for_bit():
    """Names, initial weights, and with every dropout of the recipe the loss and its gradients."""
    dropouts = {name: 0.3 for name in TINY if name.endswith("dropout")}
    results = []
    for arch in (PRE_LN, "transformer_lm_wiki103"):
        model = build(arch, **dropouts)
        names = [*model.state_dict()]
        weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
        loss, size, _ = AdaptiveLoss(TASK, sentence_avg=False)(model, sample())
        loss.backward()
        results.append((names, weights, loss, {name: p.grad for name, p in model.named_parameters()}))
    (names, weights, loss, grads), (their_names, their_weights, their_loss, their_grads) = results
    assert names == their_names
    for ours, theirs in ((weights, their_weights), (grads, their_grads)):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    assert torch.equal(loss, their_loss)
    assert size == 24


def slow_log_probs(model, tokens: torch.Tensor) -> torch.Tensor:
    """(length,) -> (length, words): the model of the paper without LayerNorm, one head and one band at a time."""
    state = model.state_dict()

    def hat(name: str) -> torch.Tensor:  # W_hat = gamma / sigma(W) W
        kept = f"{name}.parametrizations.weight"
        W = state[f"{kept}.original"]
        return state[f"{kept}.0.gamma"] / torch.linalg.svdvals(W)[0] * W

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ hat(name).T + state[f"{name}.bias"]

    bands = [(0, 10), (10, 16), (16, 24)]
    tables = [state[f"decoder.embed_tokens.embeddings.{i}.0.weight"] for i in range(3)]
    projections = [state[f"decoder.embed_tokens.embeddings.{i}.1.weight"] for i in range(3)]

    rows = []
    for position, token in enumerate(tokens.tolist(), start=2):  # fairseq counts positions from padding's index on
        band = next(i for i, (start, end) in enumerate(bands) if start <= token < end)
        embedding = projections[band] @ tables[band][token - bands[band][0]]
        angles = position * torch.exp(-torch.arange(8) * np.log(10000) / 7)
        rows.append(16**0.5 * embedding + torch.cat([angles.sin(), angles.cos()]))
    x = torch.stack(rows)
    for i in range(2):
        attention = f"decoder.layers.{i}.self_attn"
        q, k, v = (linear(f"{attention}.{name}_proj", x) for name in "qkv")
        heads = []
        for part in torch.arange(16).split(8):
            logits = q[:, part] @ k[:, part].T / 8**0.5
            logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf)
            heads.append(logits.softmax(-1) @ v[:, part])
        x = x + linear(f"{attention}.out_proj", torch.cat(heads, dim=-1))
        x = x + linear(f"decoder.layers.{i}.fc2", linear(f"decoder.layers.{i}.fc1", x).relu())
    # Adaptive softmax: the frequent words and one entry for each other band, then the words within that band.
    head = log_softmax(x @ torch.cat([tables[0], state["decoder.adaptive_softmax.head.class_proj.weight"]]).T, dim=-1)
    tails = [head[:, 10 + i, None] + log_softmax(x @ projections[i + 1] @ tables[i + 1].T, dim=-1) for i in range(2)]
    return torch.cat([head[:, :10], *tails], dim=-1)


def test_sigma_without_layer_norm_follows_its_equations():
    model = build(SIGMA).eval()
    batch = sample()
    got = log_probs(model, batch)
    for row, tokens in zip(got, batch["net_input"]["src_tokens"], strict=True):
        expected = slow_log_probs(model, tokens)
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(expected.exp().sum(-1), torch.ones(8))


def test_every_linear_layer_of_the_blocks_and_nothing_else():
    model = build(SIGMA, decoder_layerdrop=0.9)  # of which no layer may be left out here
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert model.decoder.layer_norm is None
    changed = {name for name, module in model.named_modules() if parametrize.is_parametrized(module)}
    assert len(changed) == 2 * 6
    assert changed == {name for name, m in model.named_modules() if ".layers." in name and isinstance(m, nn.Linear)}
    softmax, bands = model.decoder.adaptive_softmax, model.decoder.embed_tokens.embeddings
    for tail, (table, projection) in zip(softmax.tail, [*bands][1:], strict=True):
        assert tail[0].weight is projection.weight and tail[2].weight is table.weight  # still tied


def test_initialisation_of_the_baseline():
    plain, sigma = build(POST_LN).state_dict(), build(SIGMA).state_dict()
    for name, weight in plain.items():
        kept = name.replace(".weight", ".parametrizations.weight.original")
        if "layer_norm" not in name and "_float_tensor" not in name:  # the latter is not initialised
            assert torch.equal(weight, sigma[kept if kept in sigma else name]), name
    assert all(value.item() == 1 for name, value in sigma.items() if name.endswith("gamma"))


def test_deepnorm_counts_the_decoder_alone():
    model, plain = build(POST_LN, residual="deepnorm"), build(POST_LN)
    alpha, beta = deepnorm_scales(0, 2).decoder
    assert {layer.alpha for layer in model.decoder.layers} == {alpha}
    fc1, plain_fc1 = (m.decoder.layers[0].fc1.weight for m in (model, plain))
    torch.testing.assert_close(fc1, beta * plain_fc1)


def test_a_pruned_model_has_the_alpha_that_it_was_trained_with():
    model = build(SIGMA, norm="layernorm", residual="deepnorm", decoder_layers=6, decoder_layers_to_keep="1,4")
    assert [layer.alpha for layer in model.decoder.layers] == 2 * [deepnorm_scales(0, 6).decoder.alpha]


def test_hydra_configurations_take_the_block_size_from_the_task_that_trains():
    args = OmegaConf.create({"_name": SIGMA, **TINY})
    ARCH_CONFIG_REGISTRY[SIGMA](args)
    for block in (2048, 8):  # the second time as an evaluation does
        hydra_task = SimpleNamespace(**vars(TASK), args=SimpleNamespace(tokens_per_sample=block))
        assert ARCH_MODEL_REGISTRY[SIGMA].build_model(args, hydra_task).max_positions() == 2048


@pytest.mark.parametrize("suffix, layers", [("", 16), ("_32l", 32)])
def test_parameter_counts_at_full_size(suffix, layers):
    """On the meta device, beside the 247M that fairseq's README and the adaptive-inputs paper give the baseline."""
    d, ffn, vocabulary = 1024, 4096, task(words(267744))
    embedding = 20000 * d + 40000 * (d // 4) + 207744 * (d // 16) + d * (d + d // 4 + d // 16) + 2 * d
    norm, block = 2 * 2 * d, 4 * (d * d + d) + 2 * d * ffn + ffn + d
    expected = {PRE_LN: layers * (block + norm), POST_LN: layers * (block + norm), SIGMA: layers * (block + 6)}
    for arch, blocks in expected.items():
        args = Namespace(tokens_per_sample=512)
        ARCH_CONFIG_REGISTRY[arch + suffix](args)
        with torch.device("meta"):
            model = ARCH_MODEL_REGISTRY[arch + suffix].build_model(args, vocabulary)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == embedding + blocks
        if layers == 16:
            assert count == pytest.approx(247e6, rel=0.01)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"residual": "rezero"}, "--residual rezero: allowed are 'pre-ln', 'post-ln', 'deepnorm'"),
        ({"norm": None, "residual": "post-ln"}, "--residual post-ln: it says where the norm is, and norm is none"),
        ({"init_std": 0.0}, "--init-std 0.0: allowed are positive numbers"),
        ({"n_power_iterations": 0}, "n_power_iterations = 0: allowed are whole numbers from 1"),
        ({"decoder_normalize_before": True}, "--decoder-normalize-before contradicts --norm none"),
        ({"layernorm_embedding": True}, "--layernorm-embedding contradicts --norm none"),
        ({"scale_attn": True}, "--scale-attn contradicts --norm none"),
        ({"scale_fc": True}, "--scale-fc contradicts --norm none"),
        ({"quant_noise_pq": 0.1}, "--quant-noise-pq 0.1: allowed with --reparam sigma is 0"),
        ({"quant_noise_scalar": 0.1}, "--quant-noise-scalar 0.1: allowed with --reparam sigma is 0"),
        ({"adaptive_input_cutoff": "10,25"}, "--adaptive-input-cutoff 10,25: allowed are increasing .* from 1 to 24"),
        ({"adaptive_softmax_cutoff": "16,10"}, "--adaptive-softmax-cutoff 16,10: allowed are increasing"),
        ({"adaptive_softmax_cutoff": "10,many"}, "--adaptive-softmax-cutoff 10,many: allowed are increasing"),
    ],
)
def test_wrong_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        build(SIGMA, **overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arch, other, message",
    [
        (SIGMA, {"reparam": "none"}, "holds plain weights and the model is reparametrised: use --reparam none"),
        (PRE_LN, {"reparam": "sigma"}, "the checkpoint is reparametrised and the model is not"),
        (PRE_LN, {"norm": "stable"}, "decoder.layers.N.final_layer_norm.bias: only the model has it: use the --norm"),
        (PRE_LN, {"attention": "qknorm"}, r"decoder.layers.N.self_attn.k_norm.weight: only the checkpoint has it"),
        (SIGMA, {"decoder_layers": 4}, "has 4 decoder layers and the model 2: use --decoder-layers 4"),
        (SIGMA, {"decoder_ffn_embed_dim": 64}, r"fc\d.*: the checkpoint has shape .*64.*, the model .*32"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_in_one_line(arch, other, message):
    with pytest.raises(ValueError, match=message) as error:
        build(arch).load_state_dict(build(arch, **other).state_dict())
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------- fairseq's commands

FLAGS = [
    *("--task", "language_modeling", "--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp"),
    *("--optimizer", "nag", "--lr", "0.5", "--clip-norm", "0.1", "--tokens-per-sample", "8", "--cpu"),
    *("--batch-size", "16", "--num-workers", "0", "--disable-validation", "--no-progress-bar", "--log-interval", "1"),
    *(str(word) for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", value)),
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Letters, the first ones more often: 64 lines of 8 tokens, so that an epoch is one batch of 64 blocks, and 43 to test."""
    folder = tmp_path_factory.mktemp("lm")
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 17)
    for split, size in (("train", 64), ("test", 43)):
        letters = rng.choice([*"abcdefghijklmnop"], size=(size, 7), p=weights / weights.sum())
        (folder / f"{split}.txt").write_text("".join(f"{' '.join(line)}\n" for line in letters))
    prefixes = ("--trainpref", folder / "train.txt", "--testpref", folder / "test.txt")
    call("preprocess", "--only-source", *prefixes, "--destdir", folder / "data")
    return folder / "data"


@pytest.fixture
def train(corpus, tmp_path):
    """train(name, steps, *flags) -> the checkpoint that fairseq-train wrote into tmp_path/name."""

    def run(name: str, steps: int, *flags, arch: str = SIGMA) -> dict:
        save = ("--save-dir", tmp_path / name, "--no-epoch-checkpoints", "--max-update", steps)
        call("train", corpus, "--user-dir", USER_DIR, "--arch", arch, *FLAGS, *save, *flags)
        return torch.load(tmp_path / name / "checkpoint_last.pt", map_location="cpu")["model"]

    return run


def same(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if "_float_tensor" not in key:  # fairseq's scratch buffer, never initialised
            torch.testing.assert_close(b[key], value, **tolerance, msg=lambda m, key=key: f"{key}: {m}")


def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(train):
    straight = train("straight", 6)
    train("resumed", 3)
    same(straight, train("resumed", 6), rtol=0, atol=0)


def test_gradient_accumulation_is_the_run_with_the_whole_batch(train):
    whole = train("whole", 4, "--batch-size", 64)
    same(whole, train("parts", 4, "--batch-size", 16, "--update-freq", 4), rtol=2e-3, atol=2e-4)


@pytest.mark.slow  # test_commands.py has a translation model
def test_two_processes_are_the_run_with_one(train, corpus, tmp_path):
    whole = train("one", 4, "--batch-size", 64)
    command = [sys.executable, "-m", "fairseq_cli.train", corpus, "--user-dir", USER_DIR, "--arch", SIGMA, *FLAGS]
    command += ["--batch-size", 32, "--max-update", 4, "--save-dir", tmp_path / "two", "--no-epoch-checkpoints"]
    command += ["--distributed-world-size", 2]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "two" / "checkpoint_last.pt", map_location="cpu")["model"]
    same(whole, two, rtol=2e-3, atol=2e-4)


def test_nesterov_sgd_advances_u_once_an_update(train, monkeypatch):
    """The last u is one power iteration, with the last weights, from that of the run which stops an update before."""
    flags = ("--batch-size", 16, "--update-freq", 4, "--weight-decay", 1e-3)
    before = train("before", 4, *flags)
    calls = count_advances(monkeypatch)
    state = train("nag", 5, *flags)
    assert len(calls) == 5 * 2 * 6
    for key, W in state.items():
        if key.endswith("original"):
            name = key.replace("original", "0.u")
            torch.testing.assert_close(state[name], normalize(W @ (W.T @ before[name]), dim=0), rtol=1e-4, atol=1e-5)


def perplexity_by_hand(path: str, corpus, block: int, context: int) -> float:
    """Every token once, in blocks that see `context` tokens before them: the last half of windows twice that long."""
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides={"data": str(corpus)})
    model.eval()
    sentences = data_utils.load_indexed_dataset(str(corpus / "test"), task.dictionary)
    targets = torch.cat([sentences[i] for i in range(len(sentences))])
    inputs = torch.cat([torch.tensor([task.dictionary.eos()]), targets[:-1]])
    total = 0.0
    for start in range(0, len(targets), block):
        end, seen = min(start + block, len(targets)), max(0, start - context)
        with torch.no_grad():
            scores = log_probs(model, {"net_input": {"src_tokens": inputs[None, seen:end]}})[0, start - seen :]
        total += scores.gather(1, targets[start:end, None]).sum().item()
    return float(np.exp(-total / len(targets)))


def test_eval_lm_folds_and_scores_the_last_half_of_each_window(train, corpus, tmp_path, monkeypatch):
    import fairseq_cli.eval_lm as cli

    train("sigma", 30)
    path = str(tmp_path / "sigma" / "checkpoint_last.pt")
    results, original = [], cli.eval_lm

    def spy(models, **kwargs):
        results.append((any(map(parametrize.is_parametrized, models[0].modules())), original(models, **kwargs)))
        return results[-1][1]

    monkeypatch.setattr(cli, "eval_lm", spy)
    command = ["eval_lm", corpus, "--user-dir", USER_DIR, "--path", path, "--gen-subset", "test", "--cpu"]
    command += ["--tokens-per-sample", 8, "--context-window", 4, "--batch-size", 5, "--num-workers", 0]
    call(*command)
    monkeypatch.setattr(DecoderLayer, "make_generation_fast_", TransformerDecoderLayerBase.make_generation_fast_)
    call(*command)
    (was_parametrized, folded), (unfolded_was, unfolded) = results
    assert (was_parametrized, unfolded_was) == (False, True)
    assert float(folded["loss"]) == pytest.approx(float(unfolded["loss"]), rel=1e-5)
    assert float(folded["perplexity"]) == pytest.approx(perplexity_by_hand(path, corpus, 4, 4), rel=1e-4)


@pytest.mark.parametrize("arch", [PRE_LN, POST_LN])
def test_baselines_train(train, arch):
    state = train("baseline", 2, arch=arch)
    assert not any("parametrizations" in key for key in state)
    assert all(value.isfinite().all() for key, value in state.items() if "_float_tensor" not in key)
