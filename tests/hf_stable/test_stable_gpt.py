"""StableGPT against its equations written out, against GPT-2, and under everything that transformers does to a model."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

import hf_stable
from hf_stable import StableGPTConfig, StableGPTForCausalLM
from stable_core.sigma_layers import sigma_layers

from .models import GPT, stable_gpt, tokens

VARIANTS = {
    "stable": {},
    "stable, tau x 2": {"alpha": 0.25, "tau_scale": 2.0},
    "sigma": {"reparam": "sigma", "norm": "none", "attention": "dot", "init": "stock"},
    "sigma, joint": {"reparam": "sigma", "qkv": "joint", "norm": "layernorm", "attention": "dot", "bias": True},
    "weight": {"reparam": "weight", "norm": "layernorm", "attention": "qknorm"},
    "qknorm": {"attention": "qknorm", "norm": "rmsnorm", "init": "xavier"},
    "l2": {"attention": "l2", "bias": True},
    "l2_tied": {"attention": "l2_tied", "tie_word_embeddings": False},
    "deepnorm": {"residual": "deepnorm", "norm": "layernorm", "bias": True},
}
every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=list(VARIANTS))


def written_out(model: StableGPTForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits by its equations [ST, eqs. 2 and 3, App. N; σ, Section 3.2], in float64, without any of its code."""
    c, w = model.config, {name: x.double() for name, x in model.state_dict().items()}
    heads, d1 = c.n_head, c.n_embd // c.n_head

    def weight(name: str) -> torch.Tensor:
        plain, inside = w.get(f"{name}.weight"), f"{name}.parametrizations.weight."
        if plain is not None:
            return plain
        if c.reparam == "weight":
            g, v = w[f"{inside}original0"], w[f"{inside}original1"]
            return g * v / v.norm(dim=1, keepdim=True)
        W, gamma = w[f"{inside}original"], w[f"{inside}0.gamma"]
        blocks = W.chunk(len(gamma))
        return torch.cat([g / torch.linalg.matrix_norm(B, 2) * B for g, B in zip(gamma, blocks, strict=True)])

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weight(name).T + w.get(f"{name}.bias", 0.0)

    def stable(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return gamma * x.shape[-1] ** c.alpha * x / (x.square().sum(-1, keepdim=True) + c.norm_eps).sqrt()

    def rms(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return gamma * x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        if c.norm == "none":
            return x
        gamma = w[f"{name}.weight"]
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
            return rms(x, gamma) + w.get(f"{name}.bias", 0.0)
        return stable(x, gamma) if c.norm == "stable" else rms(x, gamma)

    def attention(name: str, x: torch.Tensor) -> torch.Tensor:
        q, k, v = linear(f"{name}.c_attn", x).chunk(3, dim=-1)
        y = torch.zeros_like(x)
        for h in range(heads):
            part = slice(h * d1, (h + 1) * d1)
            for i in range(x.shape[1]):
                q_i, k_j = q[:, i, None, part], (q if c.attention == "l2_tied" else k)[:, : i + 1, part]
                if c.attention.startswith("l2"):
                    logits = -(q_i - k_j).square().sum(-1) / math.sqrt(d1)
                elif c.attention == "stable":
                    tau = c.tau_scale * 1.618 * math.log2(c.block_size)
                    gammas = w[f"{name}.q_norm.weight"], w[f"{name}.k_norm.weight"]
                    logits = tau / d1 ** (2 * c.alpha) * (stable(q_i, gammas[0]) * stable(k_j, gammas[1])).sum(-1)
                else:
                    if c.attention == "qknorm":
                        q_i, k_j = rms(q_i, w[f"{name}.q_norm.weight"]), rms(k_j, w[f"{name}.k_norm.weight"])
                    logits = (q_i * k_j).sum(-1) / math.sqrt(d1)
                y[:, i, part] = (logits.softmax(-1)[..., None] * v[:, : i + 1, part]).sum(1)
        return linear(f"{name}.c_proj", y)

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: ids.shape[1]]
    for i in range(c.n_layer):
        name = f"transformer.h.{i}"
        mlp = lambda x, name=name: linear(f"{name}.mlp.c_proj", F.gelu(linear(f"{name}.mlp.c_fc", x)))  # noqa: E731
        if c.residual == "deepnorm":  # Wang et al., Figure 2: decoder-only
            alpha = (2 * c.n_layer) ** 0.25
            x = norm(f"{name}.ln_1", alpha * x + attention(f"{name}.attn", x))
            x = norm(f"{name}.ln_2", alpha * x + mlp(x))
        else:
            x = x + attention(f"{name}.attn", norm(f"{name}.ln_1", x))
            x = x + mlp(norm(f"{name}.ln_2", x))
    return (x if c.residual == "deepnorm" else norm("transformer.ln_f", x)) @ w["lm_head.weight"].T


@every_variant
def test_logits_are_the_equations(settings):
    model, ids = stable_gpt(**settings), tokens(2, 12)
    with torch.no_grad():
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            torch.testing.assert_close(model(ids).logits.double(), written_out(model, ids), rtol=1e-3, atol=1e-4)


def test_logits_of_the_positions_asked_for():
    model, ids = stable_gpt(), tokens(2, 12)
    logits, rows = model(ids).logits, torch.tensor([[3, 0, 11], [7, 7, 2]])
    mask = ids % 2 == 0
    for positions, expected in (
        (0, logits),
        (2, logits[:, -2:]),
        (rows[0], logits[:, rows[0]]),
        (rows, torch.stack([logits[0, rows[0]], logits[1, rows[1]]])),
        (mask, torch.cat([logits[0, mask[0]], logits[1, mask[1]]])),
    ):
        torch.testing.assert_close(model(ids, logits_to_keep=positions).logits, expected)


@every_variant
def test_generation_is_the_same_with_every_cache(settings):
    model, ids = stable_gpt(**settings), tokens(2, 6)
    by_hand = ids
    with torch.no_grad():
        for _ in range(20):  # greedy, the whole sequence anew for each token
            by_hand = torch.cat([by_hand, model(by_hand, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert len(by_hand[0].unique()) > 10
    for cache in (None, "dynamic", "static"):
        assert torch.equal(
            model.generate(ids, max_new_tokens=20, do_sample=False, cache_implementation=cache), by_hand
        ), cache


def test_beam_search_finds_what_enumeration_finds():
    model, ids = stable_gpt(vocab_size=5), torch.tensor([[3, 4]])
    with torch.no_grad():
        endings = torch.cartesian_prod(*[torch.arange(5)] * 3)
        whole = torch.cat([ids.expand(len(endings), -1), endings], dim=1)
        scores = model(whole).logits.log_softmax(-1)[:, 1:-1].gather(-1, whole[:, 2:, None]).sum((1, 2))
    found = model.generate(ids, max_new_tokens=3, num_beams=25, do_sample=False)
    assert torch.equal(found[0], whole[scores.argmax()])


def test_padding_on_the_left_changes_nothing():
    model, short, long = stable_gpt(pad_token_id=0), tokens(1, 5), tokens(1, 9, seed=1)
    batch = torch.cat([F.pad(short, (4, 0)), long])
    mask = (torch.arange(9) >= torch.tensor([[4], [0]])).long()
    together = model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 9:]
    alone = [model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :] for ids in (short, long)]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize(("size", "millions"), [("S", 124), ("M", 350), ("L", 774)])
def test_presets_have_the_parameters_of_table_2(size, millions):
    with torch.device("meta"):
        model = StableGPTForCausalLM(StableGPTConfig.preset(size))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.015)  # the paper rounds M's 354M down
    with pytest.raises(ValueError, match="size = 'XXL': allowed are 'S', 'M', 'L'"):
        StableGPTConfig.preset("XXL")


def test_initialisation():
    """StableInit's standard deviation [ST, eq. 1], GPT-2's with its residual scale, and Xavier's; embeddings 0.02.

    Reparametrised, GPT-2's has at width 256 the spectral norm of 0.02 at 768.
    """
    wide = {"n_embd": 256, "n_head": 4, "n_layer": 3, "vocab_size": 2000, "bias": True}
    root = math.sqrt
    expected = {  # c_attn (256 -> 768), mlp.c_proj (1024 -> 256)
        "stable": (1 / (root(256) + root(768)), 1 / (root(1024) + root(256))),
        "stock": (0.02, 0.02 / root(6)),
        "xavier": (root(2 / (256 + 768)), root(2 / (1024 + 256))),
    }
    for init, stds in expected.items():
        for reparam in ("none", "sigma", "weight"):
            torch.manual_seed(0)
            settings = {"reparam": reparam, "norm": "layernorm", "init": init}
            model = StableGPTForCausalLM(StableGPTConfig(**{**GPT, **wide, **settings}))
            block = model.transformer.h[1]
            for layer, std in zip((block.attn.c_attn, block.mlp.c_proj), stds, strict=True):
                chain = layer.parametrizations.weight if parametrize.is_parametrized(layer) else layer
                W = {"none": "weight", "sigma": "original", "weight": "weight"}[reparam]
                W = layer.weight if W == "weight" else getattr(chain, W)
                narrow = root(3) if init == "stock" and reparam != "none" else 1
                assert W.std().item() == pytest.approx(narrow * std, rel=0.02), (init, reparam)
                assert not layer.bias.any()
                if reparam == "sigma":  # u, v and gamma belong to the drawn weights
                    torch.testing.assert_close(chain[0].sigma()[-1], torch.linalg.matrix_norm(W.chunk(
                        len(chain[0].rows))[-1], 2), rtol=1e-3, atol=0)  # fmt: skip
            assert model.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.02)
    spectral = StableGPTForCausalLM(StableGPTConfig(**GPT, reparam="sigma", gamma_init="spectral")).transformer.h[0]
    chain = spectral.mlp.c_fc.parametrizations.weight
    torch.testing.assert_close(spectral.mlp.c_fc.weight, chain.original, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reparam", ["none", "sigma", "weight"])
def test_deepnorm_scales_the_first_weights(reparam, tmp_path):
    """(8 M)^(-1/4) of GPT-2's standard deviation, but for q and k [Wang et al., Figure 2]; also where transformers draws what a
    checkpoint lacks."""
    width, beta, narrow = 256, 24**-0.25, 1 if reparam == "none" else math.sqrt(3)
    sizes = {**GPT, "n_embd": width, "n_layer": 3, "norm": "layernorm", "attention": "dot", "init": "stock"}
    built = StableGPTForCausalLM(StableGPTConfig(**sizes, residual="deepnorm", reparam=reparam))
    built.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    save_file({"transformer.wpe.weight": load_file(weights)["transformer.wpe.weight"]}, weights, {"format": "pt"})
    for model in (built, StableGPTForCausalLM.from_pretrained(tmp_path)):
        block = model.transformer.h[1]
        layers = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        packed, out, up, down = (
            layer.parametrizations.weight.original if reparam == "sigma" else layer.weight for layer in layers
        )
        q, k, v = packed.chunk(3)
        last = 1 / math.sqrt(2 * 3)  # GPT-2's, of what a branch ends with
        for W, scale in ((q, 1), (k, 1), (v, beta), (out, beta * last), (up, beta), (down, beta * last)):
            assert W.std().item() == pytest.approx(0.02 * narrow * scale, rel=0.03)
        assert isinstance(model.transformer.ln_f, torch.nn.Identity)


@every_variant
def test_save_and_load(settings, tmp_path):
    model, ids = stable_gpt(**settings), tokens(2, 8)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = StableGPTForCausalLM.from_pretrained(tmp_path)
    states = model.state_dict(), loaded.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    half = StableGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in half.state_dict().items():
        kept = name.endswith((".0.u", "._extra_state"))  # the second is a text
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
    torch.testing.assert_close(half(ids).logits.float(), model(ids).logits, rtol=0.1, atol=0.1)


def test_a_reparametrised_model_trains_under_checkpointing_as_without():
    states = []
    for checkpointing in (False, True):
        model = stable_gpt(**VARIANTS["sigma"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            ids = tokens(2, 12, seed=step)
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["transformer.h.0.mlp.c_fc.parametrizations.weight.0.u"],
                           stable_gpt(**VARIANTS["sigma"]).transformer.h[0].mlp.c_fc.parametrizations.weight[0].u)  # fmt: skip


def test_the_loss_is_that_of_the_next_token():
    model, ids = stable_gpt(), tokens(2, 12)
    labels = ids.clone()
    labels[0, :5] = -100
    expected = -model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    expected = torch.cat([expected[0, 4:], expected[1]]).mean()
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)


class Sequences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict:
        ids = tokens(12, seed=index)
        return {"input_ids": ids, "labels": ids}


def test_trainer_resumes_bitwise(tmp_path):
    def train(folder: str, steps: int, resume: bool = False) -> dict:
        args = TrainingArguments(
            str(tmp_path / folder), max_steps=steps, per_device_train_batch_size=4, save_steps=3, learning_rate=1e-2,
            lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        model = stable_gpt(**VARIANTS["sigma"], dropout=0.1)
        trainer = Trainer(model, args, train_dataset=Sequences())
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = train("whole", 6)
    train("cut", 3)
    resumed = train("cut", 6, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (tmp_path / "cut" / "checkpoint-6" / "modeling_stable_gpt.py").exists()


def test_resized_embeddings_keep_the_old_tokens():
    model, ids = stable_gpt(), tokens(2, 8)
    before = model(ids).logits
    model.resize_token_embeddings(120)
    after = model(ids).logits
    assert after.shape[-1] == model.config.vocab_size == 120
    torch.testing.assert_close(after[..., :99], before)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_fold_gives_a_plain_model_with_the_same_outputs(tmp_path):
    for settings in (VARIANTS["sigma, joint"], VARIANTS["weight"]):
        model, twin, ids = stable_gpt(**settings), None, tokens(2, 8)
        before, twin = model(ids).logits, StableGPTForCausalLM(model.config)
        folded = hf_stable.fold(copy.deepcopy(model))
        assert hf_stable.fold(twin).config.reparam == "none"  # but not of the model that had the same configuration
        folded.save_pretrained(tmp_path)
        plain, report = StableGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert plain.config.reparam == "none" and model.config.reparam == settings["reparam"]
        torch.testing.assert_close(plain(ids).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"norm": "batch"}, "norm = 'batch': allowed are 'layernorm', 'rmsnorm', 'stable', 'none'"),
        ({"attention": "cosine"}, "attention = 'cosine': allowed are 'dot', 'qknorm', 'stable', 'l2', 'l2_tied'"),
        ({"init": "normal"}, "init = 'normal': allowed are 'stock', 'stable', 'xavier'"),
        ({"residual": "none"}, "residual = 'none': allowed are 'pre-ln', 'post-ln', 'deepnorm'"),
        (
            {"norm": "none", "residual": "post-ln"},
            "residual = 'post-ln': it says where the norm is, and norm is none: allowed is pre-ln",
        ),
        ({"reparam": "spec"}, "reparam = 'spec': allowed are 'none', 'sigma', 'spectral', 'weight'"),
        ({"reparam": "sigma", "gamma_init": "two"}, "gamma_init = 'two': allowed are 'one', 'spectral'"),
        ({"alpha": 0.7}, "alpha = 0.7: allowed are numbers from 0 to 0.5"),
        ({"tau_scale": 0}, "tau_scale = 0: allowed are positive numbers"),
        ({"n_head": 3}, "n_head = 3: allowed are divisors of n_embd = 32"),
        ({"n_layer": 0}, "n_layer = 0: allowed are positive numbers"),
        ({"dropout": 1.0}, "dropout = 1.0: allowed are numbers from 0 to below 1"),
    ],
)
def test_wrong_settings(settings, error):
    with pytest.raises(ValueError) as raised:
        StableGPTConfig(**{**GPT, **settings})
    assert str(raised.value) == error


def test_settings_given_beside_a_folder_are_checked_and_go_together(tmp_path):
    stable_gpt().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="norm = 'bogus': allowed are 'layernorm'"):
        StableGPTForCausalLM.from_pretrained(tmp_path, norm="bogus")
    config = AutoConfig.from_pretrained(tmp_path, n_embd=64)  # and the width of the MLPs with it
    assert StableGPTForCausalLM(config).transformer.h[0].mlp.c_fc.out_features == 256


def test_a_folder_in_the_words_of_before_loads(tmp_path):
    model, ids = stable_gpt(init="stock", reparam="sigma"), tokens(2, 8)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("residual") == "pre-ln"  # there was none
    (tmp_path / "config.json").write_text(json.dumps({**config, "init": "normal"}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.init == "stock" and torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(
        ValueError, match="init = 'normal': allowed are 'stock', 'stable', 'xavier'"
    ):  # by hand it is not
        StableGPTForCausalLM.from_pretrained(tmp_path, init="normal")


def test_wrong_inputs(tmp_path):
    model = stable_gpt()
    for call, error in (
        (
            lambda: model(torch.tensor([[1, 99]])),
            "input_ids holds 99: vocab_size = 99 allows whole numbers from 0 to 98",
        ),
        (lambda: model(torch.tensor([[1, -1]])), "input_ids holds -1: vocab_size = 99"),
        (lambda: model(tokens(1, 65)), "a sequence of 65 tokens: block_size = 64 is the longest"),
        (lambda: model.generate(tokens(1, 60), max_new_tokens=10, do_sample=False), "block_size = 64"),
        (lambda: model(), "give one of input_ids and inputs_embeds"),
    ):
        with pytest.raises(ValueError, match=error):
            call()
    with pytest.raises(ValueError, match=r"allowed with attention = 'l2', whose keys .* are 'eager' and 'sdpa'"):
        StableGPTForCausalLM(StableGPTConfig(**GPT, attention="l2", attn_implementation="flash_attention_2"))
    for saved, loaded in (("none", "sigma"), ("sigma", "none")):
        stable_gpt(reparam=saved).save_pretrained(tmp_path / saved)
        with pytest.raises(ValueError, match=f"reparam = '{loaded}': load it with the configuration it was saved with"):
            StableGPTForCausalLM.from_pretrained(tmp_path / saved, reparam=loaded, gamma_init="one")


@pytest.mark.parametrize("qkv", ["separate", "joint"])
def test_plain_weights_in_a_model_with_sigma_reparam(qkv, tmp_path):
    plain = stable_gpt()
    plain.save_pretrained(tmp_path)
    settings = {"reparam": "sigma", "gamma_init": "spectral", "qkv": qkv}
    given = StableGPTConfig.from_pretrained(tmp_path, **settings)
    for how in (settings, {"config": given}, {**settings, "dtype": torch.float64}):
        model = StableGPTForCausalLM.from_pretrained(tmp_path, **how)
        assert len(list(sigma_layers(model))) == 8 and model.config.reparam == "sigma"
        torch.testing.assert_close(model(tokens(2, 9)).logits.float(), plain(tokens(2, 9)).logits, rtol=1e-4, atol=1e-5)
    assert model.dtype == torch.float64


def test_text_generation_pipeline(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "a", "b", "c"] + [f"w{i}" for i in range(95)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(
        {word: i for i, word in enumerate(words)}, unk_token="<unk>")), unk_token="<unk>")  # fmt: skip
    model = stable_gpt()
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    generated = pipeline("text-generation", str(tmp_path))("a", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    expected = model.generate(torch.tensor([[1]]), max_new_tokens=5, do_sample=False)[0]
    assert generated == "a" + tokenizer.decode(expected[1:])
