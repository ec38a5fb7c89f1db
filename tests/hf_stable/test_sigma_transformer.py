"""The translation model in transformers: against fairseq's own model, search and dictionaries, and subword-nmt's subwords."""

import importlib
import io
import json
import random
import re
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.sequence_generator import SequenceGenerator
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe
from torch import nn
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

import fairseq_sigma  # noqa: F401  registers its archs
from hf_stable import (
    SigmaTransformerConfig,
    SigmaTransformerForConditionalGeneration,
    SigmaTransformerModel,
    SigmaTransformerTokenizer,
)
from hf_stable.convert import main
from hf_stable.convert_fairseq import convert_config, convert_fairseq, convert_name, is_bookkeeping
from tests.combinations import combined, label
from tests.fairseq_sigma.conftest import TINY, USER_DIR, call

SIZES = {"encoder_layers": 2, "decoder_layers": 3}
PAD, END = 1, 2
SOURCE = torch.tensor([[5, 6, 7, 8, 9, END], [10, 11, END, PAD, PAD, PAD]])
TARGET = torch.tensor([[END, 5, 6, 7, 8], [END, 9, PAD, PAD, PAD]])


def fairseq_model(source: int = 20, target: int = 24, **options) -> nn.Module:
    """fairseq_sigma's model, just initialised; the dictionaries have that many words."""
    dictionaries = Dictionary(), Dictionary()
    for dictionary, size in zip(dictionaries, (source, target), strict=True):
        for i in range(size - 4):
            dictionary.add_symbol(f"w{i}")
    args = Namespace(arch="sigma_transformer", encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=2,
                     decoder_attention_heads=4, **SIZES)  # fmt: skip
    vars(args).update(options)
    ARCH_CONFIG_REGISTRY["sigma_transformer"](args)
    torch.manual_seed(0)
    task = SimpleNamespace(source_dictionary=dictionaries[0], target_dictionary=dictionaries[1])
    return ARCH_MODEL_REGISTRY["sigma_transformer"].build_model(args, task).eval()


def ours(model: nn.Module, source: int = 20, target: int = 24) -> SigmaTransformerForConditionalGeneration:
    """The same weights in transformers."""
    state = {convert_name(name): tensor for name, tensor in model.state_dict().items() if not is_bookkeeping(name)}
    converted = SigmaTransformerForConditionalGeneration(convert_config(model.cfg, source, target))
    converted.load_state_dict(state)
    return converted.eval()


def tiny(**fields) -> SigmaTransformerForConditionalGeneration:
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2,
             "decoder_attention_heads": 4, "vocab_size": 24, **SIZES}  # fmt: skip
    torch.manual_seed(0)
    return SigmaTransformerForConditionalGeneration(SigmaTransformerConfig(**{**sizes, **fields})).eval()


@pytest.mark.parametrize("settings", [{}, {"reparam": "none"}, *combined()], ids=label)
@torch.no_grad()
def test_logits_are_fairseqs(settings):
    theirs = fairseq_model(**settings)
    model, real = ours(theirs), TARGET.ne(PAD)
    expected = theirs(SOURCE, SOURCE.ne(PAD).sum(1), TARGET)[0]
    mask, decoder_mask = SOURCE.ne(PAD).long(), real.long()
    logits = model(SOURCE, mask, TARGET).logits
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-4)
    masked = model(SOURCE, mask, TARGET, decoder_mask).logits
    torch.testing.assert_close(masked[real], expected[real], rtol=0, atol=1e-4)
    # Padding on the left, as fairseq has it in the source, and as some have it in generation.
    source, target = (torch.stack([torch.roll(row, int(row.eq(PAD).sum())) for row in x]) for x in (SOURCE, TARGET))
    left = model(source, source.ne(PAD).long(), target, target.ne(PAD).long()).logits
    torch.testing.assert_close(left[target.ne(PAD)], expected[real], rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{"qkv": "joint"}, {"qkv": "qk_joint"}, {"reparam": "spectral"}, {"reparam": "weight"},
                                     {"activation_fn": "gelu_accurate", "share_decoder_input_output_embed": True},
                                     {"share_all_embeddings": True}])  # fmt: skip
@torch.no_grad()
def test_logits_with_other_options_are_fairseqs(options):
    size = 20 if options.get("share_all_embeddings") else 24
    theirs = fairseq_model(target=size, **options)
    expected = theirs(SOURCE, SOURCE.ne(PAD).sum(1), TARGET)[0]
    logits = ours(theirs, target=size)(SOURCE, SOURCE.ne(PAD).long(), TARGET).logits
    torch.testing.assert_close(logits[TARGET.ne(PAD)], expected[TARGET.ne(PAD)], rtol=0, atol=1e-4)


@torch.no_grad()
def test_loss_is_the_mean_over_the_target_without_its_padding():
    model = tiny()
    labels = torch.tensor([[5, 6, 7, 8, END], [9, END, -100, -100, -100]])
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), torch.tensor(
        [[END, 5, 6, 7, 8], [END, 9, END, PAD, PAD]]))  # fmt: skip
    outputs = model(SOURCE, SOURCE.ne(PAD).long(), labels=labels)
    log_probs = outputs.logits.log_softmax(-1)
    by_hand = -sum(log_probs[i, t, labels[i, t]] for i, t in labels.ne(-100).nonzero()) / 7
    torch.testing.assert_close(outputs.loss, by_hand)
    torch.testing.assert_close(
        model(SOURCE, SOURCE.ne(PAD).long(), labels=labels, num_items_in_batch=14).loss, by_hand / 2
    )


def test_deepnorm_has_the_papers_constants():
    """6L-6L: X = (6^4 6)^(1/16) = 1.75054; by hand from the table in stable_core.deepnorm."""
    sides = {"encoder": (0.81 * 1.75054, 0.87 / 1.75054), "decoder": (18**0.25, 72**-0.25)}
    model = tiny(encoder_layers=6, decoder_layers=6, d_model=64, reparam="none", init_std=0.1).model
    for side, (alpha, beta) in sides.items():
        for layer in getattr(model, side).layers:
            assert layer.residual.alpha == pytest.approx(alpha, rel=1e-5)
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    scaled = name.endswith(("v_proj", "out_proj", "fc1", "fc2"))
                    assert module.weight.std().item() == pytest.approx(0.1 * (beta if scaled else 1), rel=0.06), name


@pytest.mark.parametrize("settings", [
    {"residual": "deepnorm", "reparam": "none"},
    {"residual": "pre-ln", "reparam": "none"},
    {"residual": "pre-ln", "norm": "none", "reparam": "sigma"},
    {"residual": "deepnorm", "init": "stable", "attention": "stable", "norm": "stable"},
], ids=label)  # fmt: skip
def test_initialised_as_fairseqs(settings):
    """Mean and standard deviation of every tensor, with 4,096 and more in each matrix; constants exactly."""
    options = {"encoder_embed_dim": 64, "encoder_ffn_embed_dim": 128}
    theirs = fairseq_model(100, 100, **settings, **options)
    expected, config = theirs.state_dict(), convert_config(theirs.cfg, 100, 100)
    torch.manual_seed(1)
    model = SigmaTransformerForConditionalGeneration(config)
    state = model.state_dict()
    for name, tensor in expected.items():
        if is_bookkeeping(name) or name.endswith(".u"):
            continue
        mine = state[convert_name(name)]
        if tensor.ndim == 1 and tensor.unique().numel() == 1:
            assert torch.equal(mine, tensor), name
        elif tensor.ndim == 1:
            assert mine.unique().numel() > 1 and mine.abs().max() <= tensor.abs().max() * 1.2, name
        else:
            assert abs(mine.mean()) < 0.1 * mine.std(), name
            assert mine.std().item() == pytest.approx(tensor.std().item(), rel=0.07), name
    assert not state["model.encoder.embed_tokens.weight"][PAD].any()
    if settings.get("reparam", "sigma") == "sigma":
        for layer in (model.model.encoder.layers[1].fc1, model.model.decoder.layers[2].encoder_attn.v_proj):
            assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": True}, {"share_all_embeddings": True}, {"qkv": "joint"}]
)
def test_saved_and_loaded_bitwise(fields, tmp_path):
    model = tiny(**fields)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(loaded) is SigmaTransformerForConditionalGeneration
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is SigmaTransformerModel
    assert torch.equal(base(SOURCE, decoder_input_ids=TARGET)[0], loaded.model(SOURCE, decoder_input_ids=TARGET)[0])
    tied = loaded.lm_head.weight is loaded.model.decoder.embed_tokens.weight
    assert tied == bool({"tie_word_embeddings", "share_all_embeddings"} & fields.keys())
    shared = loaded.model.encoder.embed_tokens.weight is loaded.model.decoder.embed_tokens.weight
    assert shared == ("share_all_embeddings" in fields)


@torch.no_grad()
def test_a_folder_in_the_words_of_before_loads(tmp_path):
    """residual = "none" was no LayerNorm; norm, attention and init were what they are by default."""
    model = tiny(residual="pre-ln", norm="none")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("norm", "attention", "init", "alpha", "tau_scale"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps({**config, "residual": "none"}))
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert (loaded.config.residual, loaded.config.norm) == ("pre-ln", "none")
    assert torch.equal(loaded(SOURCE, decoder_input_ids=TARGET).logits, model(SOURCE, decoder_input_ids=TARGET).logits)


@pytest.mark.parametrize("share", [False, True])
@torch.no_grad()
def test_resizing_keeps_the_logits_of_old_tokens(share):
    model = tiny(share_all_embeddings=share)
    before = model(SOURCE, decoder_input_ids=TARGET).logits
    model.resize_token_embeddings(30)
    assert (model.config.vocab_size, model.config.source_vocab_size) == (30, 30)
    after = model(SOURCE, decoder_input_ids=TARGET.clamp(max=29)).logits
    torch.testing.assert_close(after[..., :24], before)
    assert (model.lm_head.weight is model.model.encoder.embed_tokens.weight) == share
    model(torch.tensor([[29, END]]), decoder_input_ids=torch.tensor([[END, 29]]))


@torch.no_grad()
def test_attention_matrices_and_hidden_states_are_returned():
    model = tiny(residual="pre-ln")
    model.set_attn_implementation("eager")
    outputs = model(SOURCE, SOURCE.ne(PAD).long(), TARGET, output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in outputs.encoder_attentions] == [(2, 2, 6, 6)] * 2
    assert [a.shape for a in outputs.decoder_attentions] == [(2, 4, 5, 5)] * 3
    assert [a.shape for a in outputs.cross_attentions] == [(2, 4, 5, 6)] * 3
    assert (len(outputs.encoder_hidden_states), len(outputs.decoder_hidden_states)) == (3, 4)
    assert not outputs.cross_attentions[0][1, ..., 3:].any() and not outputs.decoder_attentions[0][0, 0].triu(1).any()
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(SOURCE, SOURCE.ne(PAD).long(), TARGET).logits, outputs.logits)


@pytest.mark.parametrize("beams", [1, 3])
def test_every_cache_generates_the_same(beams):
    """Also where the target's first words are given, fewer of one sentence than of the other."""
    model = tiny(initializer_range=1.0, vocab_size=1000)  # of fewer words it soon says one over and over
    settings = {"attention_mask": SOURCE.ne(PAD).long(), "num_beams": beams, "max_new_tokens": 8, "do_sample": False}
    start = torch.tensor([[PAD, END, 7], [END, 8, 9]])
    for given in ({}, {"decoder_input_ids": start, "decoder_attention_mask": start.ne(PAD).long()}):
        expected = model.generate(SOURCE, use_cache=False, **settings, **given)
        assert len(set(expected[0].tolist())) > 4
        for cache in ("dynamic", "static"):
            assert torch.equal(model.generate(SOURCE, cache_implementation=cache, **settings, **given), expected), cache
    alone = model.generate(SOURCE[:1], **{**settings, "attention_mask": None}, decoder_input_ids=start[:1, 1:])[0]
    assert torch.equal(alone, expected[0, 1 : 1 + len(alone)])


def test_gradient_checkpointing_gives_the_same_gradients():
    model, gradients = tiny(dropout=0.0).train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(SOURCE, labels=TARGET[:, 1:]).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


# The text of a language that writes each word of another one backwards.
def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    rng, pairs = random.Random(seed), []
    for _ in range(count):
        words = ["".join(rng.choices(("ba", "ko", "ti", "ru"), k=rng.randint(1, 3))) for _ in range(rng.randint(2, 5))]
        end = rng.choice(".!?")
        pairs.append((f"{', '.join(words)}{end}", f"{', '.join(word[::-1] for word in words)}{end}"))
    return pairs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Tokenised with sacremoses and segmented with subword-nmt, as recipes/wmt17_en_de does, a dictionary for each language."""
    folder = tmp_path_factory.mktemp("corpus")
    text = {
        split: sentences(count, seed)
        for seed, (split, count) in enumerate({"train": 96, "valid": 8, "test": 12}.items())
    }
    tokens = {(split, side): [moses(pair[i], side) for pair in pairs] for split, pairs in text.items()
              for i, side in enumerate(("en", "de"))}  # fmt: skip
    codes = io.StringIO()
    learn_bpe(io.StringIO("\n".join(tokens["train", "en"] + tokens["train", "de"])), codes, 30)
    (folder / "codes").write_text(codes.getvalue())
    bpe = BPE(codes)
    for (split, side), lines in tokens.items():
        (folder / f"{split}.{side}").write_text("".join(f"{bpe.process_line(line)}\n" for line in lines))
    prefixes = [arg for split in text for arg in (f"--{split}pref", folder / split)]
    with redirect_stdout(io.StringIO()):
        call("preprocess", "-s", "en", "-t", "de", *prefixes, "--destdir", folder / "data")
    return folder


def moses(text: str, language: str) -> str:
    sacremoses = importlib.import_module("sacremoses")
    normal = sacremoses.MosesPunctNormalizer(language, post_remove_control_chars=True).normalize(text)
    return sacremoses.MosesTokenizer(language).tokenize(normal, aggressive_dash_splits=True, return_str=True)


def fairseq_train(corpus: Path, save: Path, arch: str, steps: int, *flags) -> Path:
    data, plugin = corpus / "data", ("--user-dir", USER_DIR)
    call("train", data, *plugin, "--arch", arch, *TINY, "--save-dir", save, "--no-epoch-checkpoints",
         "--max-update", steps, *flags)  # fmt: skip
    return save / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def converted(corpus, tmp_path_factory) -> tuple[Path, Path]:
    """fairseq's checkpoint after 60 updates, and the folder it was converted to."""
    folder = tmp_path_factory.mktemp("converted")
    checkpoint = fairseq_train(corpus, folder / "fairseq", "sigma_transformer_6l", 60)
    command = [
        "fairseq",
        checkpoint,
        folder / "hf",
        "--data",
        corpus / "data",
        "--user-dir",
        USER_DIR,
        "--bpe-codes",
        corpus / "codes",
        "--moses",
    ]
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main([*map(str, command)]) == 0
    assert float(re.search(r"differ by (\S+)", printed.getvalue())[1]) <= 1e-4
    return checkpoint, folder / "hf"


def test_converted_weights_are_the_checkpoints(converted):
    checkpoint, folder = converted
    expected = torch.load(checkpoint, map_location="cpu")["model"]
    state = AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict()
    assert sum(name.endswith(".0.u") for name in state) == 2 * 6 + 2 * 10
    for name, tensor in expected.items():
        if not is_bookkeeping(name):
            assert torch.equal(state.pop(convert_name(name)), tensor), name
    assert not state


@pytest.mark.parametrize("beams", [5, 1])
def test_translations_are_fairseqs(converted, beams):
    """Tokens and scores of every sentence, in one padded batch: fairseq-generate's, and with beam 1 greedy search's."""
    checkpoint, folder = converted
    (theirs,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([source for source, _ in sentences(12, 2)], return_tensors="pt", padding=True)
    generator = SequenceGenerator([theirs], task.target_dictionary, beam_size=beams)
    expected = generator.generate([theirs], {"net_input": {
        "src_tokens": batch.input_ids, "src_lengths": batch.attention_mask.sum(1)}})  # fmt: skip
    best = [hypotheses[0] for hypotheses in expected]
    assert len({tuple(hypothesis["tokens"].tolist()) for hypothesis in best}) > 6  # not one translation for all
    settings = {} if beams == 5 else {"num_beams": 1, "early_stopping": False}
    found = model.generate(**batch, **settings, return_dict_in_generate=True, output_scores=True)
    assert [row[1:][row[1:].ne(PAD)].tolist() for row in found.sequences] == [h["tokens"].tolist() for h in best]
    if beams == 5:
        torch.testing.assert_close(found.sequences_scores, torch.stack([h["score"] for h in best]), rtol=0, atol=1e-4)
        for hypothesis, text in zip(
            best, tokenizer.batch_decode(found.sequences, skip_special_tokens=True), strict=True
        ):
            words = task.target_dictionary.string(hypothesis["tokens"], bpe_symbol="@@ ")
            assert moses(text, "de") == words


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("stable_core", "hf_stable", "stable_monitor", "fairseq", "fairseq_sigma"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder, again, *texts = sys.argv[1:]
for place in (folder, again):
    model = AutoModelForSeq2SeqLM.from_pretrained(place, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=True)
    print(model.generate(**tokenizer(texts, return_tensors="pt", padding=True)).tolist())
    model.save_pretrained(again)
    tokenizer.save_pretrained(again)
"""


def test_the_folder_translates_where_this_library_is_not(converted, tmp_path):
    """And what is saved there is such a folder again."""
    _, folder = converted
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [source for source, _ in sentences(4, 3)]
    expected = model.generate(**tokenizer(texts, return_tensors="pt", padding=True)).tolist()
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", BLOCKED, folder, tmp_path / "again", *texts]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [expected, expected]


@pytest.mark.parametrize(
    "flags", [["--encoder-normalize-before", "--decoder-normalize-before"], ["--activation-fn", "gelu"]]
)
def test_stock_fairseq_transformers_are_converted(flags, corpus, tmp_path):
    checkpoint = fairseq_train(corpus, tmp_path / "fairseq", "transformer", 1, *flags)
    assert convert_fairseq(checkpoint, corpus / "data", tmp_path / "hf") <= 1e-4
    config = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf").config
    expected = ("pre-ln", "relu") if len(flags) == 2 and "before" in flags[0] else ("post-ln", "gelu")
    assert (config.residual, config.activation_function, config.reparam) == (*expected, "none")


def test_tokens_are_fairseqs_and_subword_nmts(corpus, tmp_path):
    dictionaries = {side: Dictionary.load(str(corpus / "data" / f"dict.{side}.txt")) for side in ("en", "de")}
    paths = [corpus / "data" / f"dict.{side}.txt" for side in ("en", "de")]
    pairs = [*sentences(20, 4), ("", ""), ("Ti-ti rubako, \u201cBako\u201d & <unk> \u00e4\u00df!", "x  </s> y\tz")]
    bpe = BPE(io.StringIO((corpus / "codes").read_text()))
    made = SigmaTransformerTokenizer(*paths, corpus / "codes", "en", "de", moses=True)
    made.save_pretrained(tmp_path)
    for tokenizer in (
        made,
        SigmaTransformerTokenizer.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    ):
        batch = tokenizer([source for source, _ in pairs], text_target=[target for _, target in pairs])
        for i, pair in enumerate(pairs):
            for side, text, ids in zip(("en", "de"), pair, (batch.input_ids[i], batch.labels[i]), strict=True):
                line = bpe.process_line(moses(text, side))
                assert ids == dictionaries[side].encode_line(line, add_if_not_exist=False).tolist(), text
        source, target = pairs[0]
        assert tokenizer.decode(batch.labels[0], skip_special_tokens=True) == target
        assert tokenizer.decode(batch.input_ids[0], skip_special_tokens=True, use_source_tokenizer=True) == source
        assert tokenizer.encode(source) == batch.input_ids[0]  # back in the source's language
    plain = SigmaTransformerTokenizer(paths[0], bpe_codes=corpus / "codes")
    for text in ("bako<s>ti </s> <unk> ko</w> </w> \u3000ru\u3000ti  ta\tb", "tititi titi ti b"):
        line = bpe.process_line(text)
        assert plain(text).input_ids == dictionaries["en"].encode_line(line, add_if_not_exist=False).tolist(), text


def test_codes_of_the_first_version_and_overwritten_symbols(tmp_path):
    codes = "t i\nti </w>\nb a\nba ti</w>\nr u\n"
    (tmp_path / "codes").write_text(codes)
    (tmp_path / "dict.txt").write_text("ti 5\nba@@ 4\nti 3 #fairseq:overwrite\nmadeupword0000 0\n")
    tokenizer = SigmaTransformerTokenizer(tmp_path / "dict.txt", bpe_codes=tmp_path / "codes")
    dictionary, bpe = Dictionary.load(str(tmp_path / "dict.txt")), BPE(io.StringIO(codes))
    for text in ("bati ti ruti", "ba", "t"):
        line = bpe.process_line(text)
        assert tokenizer.tokenize(text) == line.split()
        assert tokenizer(text).input_ids == dictionary.encode_line(line, add_if_not_exist=False).tolist()
    assert tokenizer.vocab_size == len(dictionary) == 8


@pytest.mark.parametrize(("fields", "message"), [
    ({"residual": "postln"}, "residual = 'postln': allowed are 'pre-ln', 'post-ln', 'deepnorm'"),
    ({"reparam": "weights"}, "reparam = 'weights': allowed are"),
    ({"activation_function": "rely"}, "activation_function = 'rely': allowed are"),
    ({"decoder_layers": 0}, "decoder_layers = 0: allowed are positive numbers"),
    ({"decoder_attention_heads": 3}, "decoder_attention_heads = 3: allowed are divisors of d_model = 16"),
    ({"dropout": 1.0}, "dropout = 1.0: allowed are numbers from 0 to below 1"),
    ({"init_std": 0.0}, "init_std = 0.0: allowed are positive numbers"),
    ({"share_all_embeddings": True, "src_vocab_size": 9}, "share_all_embeddings = True: src_vocab_size = 9, allowed is"),
])  # fmt: skip
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny(**fields)


def test_wrong_inputs_are_refused():
    model = tiny(max_position_embeddings=8, src_vocab_size=20)
    long = torch.full((1, 9), 5)
    for source, target, message in (
        (long, TARGET, "a sequence of 9 tokens: max_position_embeddings = 8 is the most"),
        (SOURCE, long, "a sequence of 9 tokens"),
        (SOURCE + 12, TARGET, "input_ids holds 23: src_vocab_size = 20 allows"),
        (SOURCE, TARGET + 20, "decoder_input_ids holds 29: vocab_size = 24 allows"),
        (None, TARGET, "give one of input_ids and inputs_embeds"),
        (SOURCE, None, "give one of input_ids and inputs_embeds"),
    ):
        with pytest.raises(ValueError, match=message):
            model(source, decoder_input_ids=target)
    with pytest.raises(ValueError, match="a sequence of 9 tokens"):  # the cache counts
        model.generate(SOURCE, max_new_tokens=20, min_new_tokens=20)
    with pytest.raises(ValueError, match="the source has 20 tokens and the target 24; allowed are models of one"):
        model.resize_token_embeddings(30)


@pytest.mark.parametrize(("options", "message"), [
    ({"encoder_learned_pos": True}, "encoder_learned_pos = True: allowed is a model without"),
    ({"layernorm_embedding": True}, "layernorm_embedding = True"),
    ({"no_scale_embedding": True}, "no_scale_embedding = True"),
    ({"cross_self_attention": True}, "cross_self_attention = True"),
    ({"quant_noise_pq": 0.1}, "quant-noise-pq 0.1"),
    ({"decoder_embed_dim": 8}, "decoder_embed_dim = 8: allowed is encoder_embed_dim = 16"),
])  # fmt: skip
def test_options_that_are_not_here_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        convert_config(fairseq_model(**options).cfg, 20, 24)


def test_what_is_no_translation_checkpoint_is_refused(converted, corpus, tmp_path):
    checkpoint, _ = converted
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"model": {}}, tmp_path / "bare.pt")
    model = {"cfg": {"model": {"_name": "lstm"}, "task": {"_name": "translation"}}, "model": {}}
    torch.save(model, tmp_path / "lstm.pt")
    model["cfg"] = {"model": {"_name": "transformer"}, "task": {"_name": "speech_to_text"}}
    torch.save(model, tmp_path / "speech.pt")
    for path, data, message in (
        (tmp_path / "text.pt", corpus / "data", "text.pt: cut short, or not written by torch.save"),
        (tmp_path / "bare.pt", corpus / "data", "allowed are those that fairseq-train writes"),
        (tmp_path / "lstm.pt", corpus / "data", "arch = 'lstm': allowed are those of"),
        (tmp_path / "speech.pt", corpus / "data", "task = 'speech_to_text': allowed is 'translation'"),
        (checkpoint, tmp_path, "give source_lang and target_lang"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_fairseq(path, data, tmp_path / "out")
    with pytest.raises(ValueError, match=r"allowed is a folder that has dict\.fr\.txt"):
        convert_fairseq(checkpoint, corpus / "data", tmp_path / "out", target_lang="fr", source_lang="en")
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_is_not_equal_is_refused(converted, corpus, tmp_path, monkeypatch):
    checkpoint, _ = converted
    monkeypatch.setattr("hf_stable.modeling_sigma_transformer_layers.PADDING_INDEX", 2)
    with pytest.raises(ValueError, match=r"outputs differ by \d\S*, allowed is 0\.0001"):
        convert_fairseq(checkpoint, corpus / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("files", "arguments", "message"), [
    ({"dict": "ti\n"}, {}, "line 1 is 'ti': allowed is '<token> <count>"),
    ({"dict": "ti 1\nti 2\n"}, {}, "line 2 has 'ti' a second time"),
    ({"dict": "ti 1\n", "codes": "#version: 0.3\nt i\n"}, {}, "version 0.3: allowed are 0.1 and 0.2"),
    ({"dict": "ti 1\n", "codes": "t i o\n"}, {}, "'t i o': allowed are two subwords"),
    ({"dict": "ti 1\n"}, {"moses": True}, "moses = True: source_lang and target_lang are needed"),
])  # fmt: skip
def test_wrong_tokenizer_files_are_refused(files, arguments, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    codes = tmp_path / "codes" if "codes" in files else None
    with pytest.raises(ValueError, match=message):
        SigmaTransformerTokenizer(tmp_path / "dict", bpe_codes=codes, **arguments)


def test_codes_of_a_tokenizer_that_was_there_before_are_gone(tmp_path):
    (tmp_path / "dict").write_text("ab 1\n")
    (tmp_path / "codes").write_text("a b\n")
    SigmaTransformerTokenizer(tmp_path / "dict", bpe_codes=tmp_path / "codes").save_pretrained(tmp_path / "saved")
    SigmaTransformerTokenizer(tmp_path / "dict").save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").bpe is None


def test_moses_without_sacremoses_is_refused(corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    with pytest.raises(ValueError, match="moses = True: sacremoses is missing: pip install sacremoses"):
        SigmaTransformerTokenizer(corpus / "data" / "dict.en.txt", source_lang="en", target_lang="de", moses=True)
