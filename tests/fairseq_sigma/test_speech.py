"""Speech: features, positions, masks, loss and optimizer against their definitions; training against itself; bad recordings."""

import itertools
import logging
import math
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from fairseq import optim
from fairseq.criterions.ctc import CtcCriterion, CtcCriterionConfig
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf
from torch import nn
from torch.nn.utils import parametrize

import fairseq_sigma  # noqa: F401  registers task, model and optimizer
from fairseq_sigma import speech_features, transcribe
from fairseq_sigma.cape import Cape
from fairseq_sigma.ctc_model import strided
from fairseq_sigma.optim import FairseqLars, LarsConfig
from fairseq_sigma.speech_dataset import Row, SpeechDataset, decode, dictionary, encode, greedy, read_manifest
from fairseq_sigma.speech_task import SpeechConfig, SpeechTask, spec_augment
from stable_core import fold
from stable_core.sigma_reparam import SigmaReparam
from tests.stable_core.models import count_advances

from .conftest import USER_DIR, call

REAL = Path(os.environ.get("STABLE_DATA") or USER_DIR.parents[1] / "runs" / "data") / "asr"
RATE = 8000
TINY = (
    "--task sigma_ctc --sample-rate 8000 --mel-bins 40 --arch sigma_transformer_ctc_36l --encoder-layers 2 "
    "--encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 2 --criterion ctc --sentence-avg "
    "--post-process letter --zero-infinity --optimizer adagrad --lr 0.05 --clip-norm 1 --batch-size 8 --cpu "
    "--num-workers 0 --no-progress-bar --log-interval 1 --no-epoch-checkpoints"
).split()
# Nothing drawn by order, and no optimizer that makes whole steps of rounding errors, as Adam and Adagrad do of the gradient
# of the keys' bias, which is zero.
EXACT = "--dropout 0 --layer-drop 0 --cape-global-shift 0 --cape-local-shift 0 --cape-scale 1".split()
LARS = "--optimizer lars --lr 1 --trust-coefficient 0.02".split()


def tone(letter: str, seconds: float) -> np.ndarray:
    """A tone whose pitch tells the letter; a space is silence."""
    n = round(seconds * RATE)
    if letter == " ":
        return np.zeros(n)
    return 0.3 * np.sin(2 * np.pi * (400 + 500 * "abcd".index(letter)) * np.arange(n) / RATE)


def write_manifest(folder: Path, rows: list[tuple]) -> Path:
    lines = ["split\tpath\tseconds\ttext", *("\t".join(map(str, row)) for row in rows)]
    (folder / "manifest.tsv").write_text("".join(f"{line}\n" for line in lines))
    return folder / "manifest.tsv"


@pytest.fixture(scope="session")
def speech(tmp_path_factory) -> Path:
    """32 + 8 recordings of one or two words of tones, 8 kHz."""
    folder, rng, rows = tmp_path_factory.mktemp("speech"), np.random.default_rng(0), []
    for number in range(40):
        words = ["".join(rng.choice(list("abcd"), size=rng.integers(1, 4))) for _ in range(rng.integers(1, 3))]
        text = " ".join(words)
        signal = np.concatenate([tone(letter, 0.15) for letter in text])
        signal = np.concatenate([np.zeros(400), signal + 0.01 * rng.standard_normal(len(signal)), np.zeros(400)])
        soundfile.write(folder / f"{number}.wav", signal, RATE)
        rows.append(("valid" if number >= 32 else "train", f"{number}.wav", f"{len(signal) / RATE:.3f}", text))
    write_manifest(folder, rows)
    return folder


@pytest.fixture
def train(speech, tmp_path):
    """train(name, steps, *flags) -> the checkpoint that fairseq-train wrote into tmp_path/name."""

    def run(name: str, steps: int, *flags, data=speech) -> dict:
        save = ("--save-dir", tmp_path / name, "--max-update", steps)
        call("train", data, "--user-dir", USER_DIR, *TINY, *save, *flags)
        return torch.load(tmp_path / name / "checkpoint_last.pt", map_location="cpu")

    return run


def dataset(folder: Path, split: str = "train", **settings) -> SpeechDataset:
    rows = read_manifest(folder / "manifest.tsv", split)
    return SpeechDataset(rows, dictionary(), rate=RATE, bins=40, strided=strided, **settings)


def build(arch: str = "sigma_transformer_ctc_36l", **overrides):
    sizes = {"encoder_layers": 2, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2}
    args = Namespace(**{**sizes, **overrides})
    ARCH_CONFIG_REGISTRY[arch](args)
    torch.manual_seed(0)
    task = SpeechTask.setup_task(SpeechConfig(data="nowhere", mel_bins=40))
    return ARCH_MODEL_REGISTRY[arch].build_model(args, task)


def same(a: dict, b: dict, **tolerance) -> None:
    assert a["model"].keys() == b["model"].keys()
    for key, value in a["model"].items():
        if tolerance:
            torch.testing.assert_close(b["model"][key], value, **tolerance, msg=lambda m, key=key: f"{key}: {m}")
        else:
            assert torch.equal(b["model"][key], value), key


# ------------------------------------------------------------------------------------------------------ features


def numpy_log_mel(signal: np.ndarray, rate: int, bins: int) -> np.ndarray:
    """Kaldi's filterbank written out, in float64."""
    window, step, n_fft = round(0.025 * rate), round(0.01 * rate), 1
    while n_fft < window:
        n_fft *= 2
    povey = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / (window - 1))) ** 0.85

    def mel(hz):
        return 1127 * np.log(1 + hz / 700)

    edges = np.linspace(mel(20), mel(rate / 2), bins + 2)
    centre = mel(np.arange(n_fft // 2) * rate / n_fft)
    rising = (centre[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - centre[:, None]) / (edges[2:] - edges[1:-1])
    filters = np.clip(np.minimum(rising, falling), 0, None)
    rows = []
    for start in range(0, len(signal) - window + 1, step):
        frame = signal[start : start + window].astype(np.float64) * 2**15
        frame -= frame.mean()
        frame -= 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * povey, n_fft))[:-1] ** 2
        rows.append(np.log(np.maximum(power @ filters, np.finfo(np.float32).eps)))
    features = np.stack(rows)
    return (features - features.mean()) / features.std()


@pytest.mark.parametrize("rate, bins", [(8000, 40), (16000, 80)])
def test_features_are_the_filterbank_written_out(rate, bins):
    rng = np.random.default_rng(0)
    time = np.arange(int(1.234 * rate)) / rate
    signal = 0.3 * np.sin(2 * np.pi * (300 + 900 * time) * time) + 0.05 * rng.standard_normal(len(time))
    features = speech_features.log_mel(signal.astype(np.float32), rate, bins)
    assert features.shape == (speech_features.n_frames(len(signal), rate), bins) and features.dtype == np.float32
    np.testing.assert_allclose(features, numpy_log_mel(signal, rate, bins), atol=2e-3)
    assert abs(features.mean()) < 1e-4 and features.std() == pytest.approx(1, abs=1e-4)


def test_silence_has_features_without_nan():
    assert np.array_equal(speech_features.log_mel(np.zeros(4000, np.float32), RATE, 40), np.zeros((48, 40)))


def test_another_sampling_rate_and_two_channels(tmp_path):
    time = np.arange(11025) / 11025
    wave = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, 0 * wave], axis=1), 11025)
    signal = speech_features.read_audio(tmp_path / "a.wav", 16000)
    assert len(signal) == 16000
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(signal[500:-500], expected[500:-500], atol=2e-3)


def test_text_and_back():
    symbols = dictionary()
    assert len(symbols) - symbols.nspecial == 28  # 26 letters, apostrophe, word boundary
    assert decode(encode("Don't  go", symbols), symbols) == "don't go"
    a, b, blank = symbols.index("a"), symbols.index("b"), 0
    assert greedy(torch.tensor([blank, a, a, blank, a, b, b, symbols.index("|"), b, blank]), symbols) == "aab b"


# --------------------------------------------------------------------------------------------- CAPE, SpecAugment


def test_cape_in_evaluation_is_its_definition():
    cape = Cape(8, 0.03, global_shift=60, local_shift=1, scale=1.1).eval()
    embedding = cape(torch.tensor([5, 3]), 5)
    for row, length in enumerate((5, 3)):
        for i in range(length):
            t = 0.03 * (i - sum(range(length)) / length)  # seconds from the mean position
            for k in range(4):
                w = 30 * 10000 ** (-2 * k / 8)
                assert embedding[row, i, 2 * k].item() == pytest.approx(math.cos(w * t), abs=1e-5)
                assert embedding[row, i, 2 * k + 1].item() == pytest.approx(math.sin(w * t), abs=1e-5)


def test_cape_in_training_shifts_jitters_and_stretches():
    torch.manual_seed(0)
    lengths, step = torch.full((4000,), 20), 0.03
    plain = Cape(8, step, 5, 0, 1.1).eval().positions(lengths, 20)
    moved = Cape(8, step, 5, 0, 1.1).positions(lengths, 20)
    scale = (moved[:, 19] - moved[:, 0]) / (plain[:, 19] - plain[:, 0])
    shift = moved.mean(dim=1) / scale
    torch.testing.assert_close(moved, scale[:, None] * (plain + shift[:, None]), rtol=1e-3, atol=1e-4)
    for drawn, most in ((scale.log(), math.log(1.1)), (shift, 5)):  # uniform: bounds, mean and variance
        assert drawn.abs().max() <= most * 1.01
        assert drawn.mean().item() == pytest.approx(0, abs=most / 20)
        assert drawn.var().item() == pytest.approx(most**2 / 3, rel=0.1)
    jitter = Cape(8, step, 0, 1, 1).positions(lengths, 20) - plain
    assert jitter.abs().max() <= step / 2
    assert jitter.var().item() == pytest.approx((step / 2) ** 2 / 3, rel=0.05)
    assert abs(np.corrcoef(jitter[:, 0], jitter[:, 1])[0, 1]) < 0.1


@pytest.mark.parametrize(
    "settings, message",
    [
        ((7, 0.03, 0, 0, 1), "dim = 7: CAPE takes even numbers"),
        ((8, 0.03, -1, 0, 1), "--cape-global-shift -1: allowed are numbers from 0"),
        ((8, 0.03, 0, 0, 0.9), "--cape-scale 0.9: allowed are numbers from 1"),
    ],
)
def test_wrong_cape_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Cape(*settings)


def test_spec_augment_masks_no_more_than_asked():
    cfg = SpeechConfig(data="nowhere")
    frames, bins = 300, 80
    np.random.seed(0)
    masked_bins, masked_frames = [], []
    for _ in range(300):
        zero = spec_augment(cfg)(np.ones((frames, bins), np.float32)) == 0
        masked_bins.append(zero.all(axis=0).sum())
        masked_frames.append(zero.all(axis=1).sum())
    assert 30 < max(masked_bins) <= 2 * 30  # two masks below F = 30
    assert max(masked_frames) <= 10 * 30  # ten below min(T = 50, p * 300 = 30)
    assert 100 < np.mean(masked_frames) < 145  # ten of 14.5 frames on average, less where they overlap
    assert np.mean(masked_bins) == pytest.approx(2 * 14.5 * 0.9, rel=0.15)


def test_spec_augment_is_only_in_training_and_goes_by_epoch(speech):
    task = SpeechTask.setup_task(SpeechConfig(data=str(speech), sample_rate=RATE, mel_bins=40, seed=1))
    for split in ("train", "valid"):
        task.load_dataset(split)
    plain = dataset(speech)
    first, again = (task.dataset("train")[3]["features"] for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, plain[3]["features"])
    task.dataset("train").set_epoch(2)
    assert not torch.equal(task.dataset("train")[3]["features"], first)
    assert torch.equal(task.dataset("valid")[3]["features"], dataset(speech, "valid")[3]["features"])


# --------------------------------------------------------------------------------------------------------- batches


def test_batches_never_exceed_the_seconds_and_hold_everything(speech):
    task = SpeechTask.setup_task(SpeechConfig(data=str(speech), sample_rate=RATE, mel_bins=40, seed=1))
    task.load_dataset("train")
    batches = task.get_batch_iterator(task.dataset("train"), max_tokens=300, required_batch_size_multiple=8)
    ids = []
    for batch in batches.next_epoch_itr(shuffle=False):
        shape = batch["net_input"]["features"].shape
        assert shape[0] * shape[1] <= 300  # 3 s, padding included
        ids += batch["id"].tolist()
    assert sorted(ids) == list(range(32))


BLOCKS = [("none", "pre-ln"), ("layernorm", "post-ln"), ("layernorm", "pre-ln"), ("layernorm", "deepnorm")]


@pytest.mark.parametrize("norm, residual", BLOCKS)
def test_an_utterance_does_not_depend_on_its_batch(speech, norm, residual):
    model, data = build(norm=norm, residual=residual).eval(), dataset(speech)
    long, short = int(data.sizes.argmax()), int(data.sizes.argmin())
    together = model(**data.collater([data[long], data[short]])["net_input"])
    alone = model(**data.collater([data[short]])["net_input"])
    length = strided(data.size(short))
    assert alone["encoder_out"].shape[0] == length == (~together["padding_mask"][1]).sum()
    torch.testing.assert_close(together["encoder_out"][:length, 1], alone["encoder_out"][:, 0], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("depth", [36, 72])
def test_the_archs_have_the_sizes_of_the_paper(depth):
    args = Namespace()
    ARCH_CONFIG_REGISTRY[f"sigma_transformer_ctc_{depth}l"](args)
    sizes = (args.encoder_layers, args.encoder_embed_dim, args.encoder_ffn_embed_dim, args.encoder_attention_heads)
    assert sizes == (depth, 768, 3072, 4)
    methods = (args.norm, args.residual, args.reparam, args.init_std)
    assert methods == ("none", "pre-ln", "sigma", 0.1) and (args.dropout, args.layer_drop) == (0.3, 0.3)


def test_every_linear_layer_is_reparametrised_and_the_convolution_unless_plain():
    model = build(layer_drop=0.9)  # which must not leave out layers as the model is built
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d)}
    assert len(linear) == 2 * 6 + 2
    assert {name for name, m in model.named_modules() if parametrize.is_parametrized(m)} == linear
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())
    for name in linear:
        weight = model.get_submodule(name).weight.detach().flatten(1)
        assert torch.linalg.svdvals(weight)[0] == pytest.approx(1, rel=1e-3)
    assert not parametrize.is_parametrized(build(plain_conv=True).encoder.conv)


@pytest.mark.parametrize("reparam", ["sigma", "spectral", "weight", "none"])
@pytest.mark.parametrize("norm, residual", BLOCKS)
def test_every_baseline_folds_to_the_same_function(norm, residual, reparam):
    model = build(norm=norm, residual=residual, reparam=reparam, qkv="separate").eval()
    inputs = {"features": torch.randn(2, 30, 40), "frames": torch.tensor([30, 30])}
    expected = model(**inputs)["encoder_out"]
    folded = fold(model) if reparam != "none" else model
    assert not any(parametrize.is_parametrized(m) for m in folded.modules())
    torch.testing.assert_close(folded(**inputs)["encoder_out"], expected, rtol=1e-4, atol=1e-5)
    norms = sum(isinstance(m, nn.LayerNorm) for m in model.modules())
    assert norms == (norm != "none") * (4 + (residual == "pre-ln"))


def test_initialisation_of_the_paper():
    wide = {"encoder_embed_dim": 768, "encoder_ffn_embed_dim": 64, "encoder_layers": 1}
    for name, weight in build(norm="layernorm", residual="post-ln", reparam="none", **wide).named_parameters():
        if weight.dim() > 1:
            assert weight.abs().max().item() == pytest.approx(0.036, abs=3e-4), name  # uniform(.036)
    for name, weight in build(**wide).named_parameters():
        if name.endswith("original"):
            assert weight.std().item() == pytest.approx(0.1, rel=0.05), name  # trunc_normal(.1)


@pytest.mark.parametrize("qkv, sigmas", [("separate", 3), ("qk_joint", 2), ("joint", 1)])
def test_joint_sigmas_of_the_attention(qkv, sigmas):
    attention = build(qkv=qkv).encoder.layers[0].self_attn
    assert sum(isinstance(m, SigmaReparam) for m in attention.modules()) == sigmas + 1  # and out_proj


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"residual": "rezero"}, "--residual rezero: allowed are 'pre-ln', 'post-ln', 'deepnorm'"),
        ({"tau_seconds": 0.0}, "--tau-seconds 0.0: allowed are numbers from 1"),
        ({"encoder_layers": 0}, "--encoder-layers 0: allowed are whole numbers from 1"),
        ({"encoder_attention_heads": 3}, "--encoder-attention-heads 3: allowed are divisors of the width, 16"),
        ({"layer_drop": 1.0}, "--layer-drop 1.0: allowed are numbers from 0, below 1"),
        ({"gamma_lr_scale": 0.0}, "--gamma-lr-scale 0.0: allowed are positive numbers"),
        ({"gamma_lr_scale": 2.0, "reparam": "spectral"}, "--gamma-lr-scale 2.0: --reparam spectral learns no gamma"),
    ],
)
def test_wrong_model_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(**overrides)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"freq_mask_width": 81}, "--freq-mask-width 81: allowed are 1 to 80, the mel bins"),
        ({"time_mask_ratio": 1.5}, "--time-mask-ratio 1.5: allowed are numbers from 0 to 1"),
        ({"sample_rate": 8}, "--sample-rate 8: allowed are whole numbers from 1000"),
    ],
)
def test_wrong_task_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SpeechTask.setup_task(SpeechConfig(data="nowhere", **settings))


# --------------------------------------------------------------------------------------------- loss and optimizers


def test_ctc_loss_is_the_sum_over_alignments():
    """-log of the probability of all paths of blank, a, b that collapse to the target, by going through them."""
    task = SpeechTask.setup_task(SpeechConfig(data="nowhere", mel_bins=40))
    criterion = CtcCriterion(CtcCriterionConfig(zero_infinity=True, sentence_avg=True), task)
    model = build(dropout=0.0, layer_drop=0.0, cape_global_shift=0.0, cape_local_shift=0.0, cape_scale=1.0)
    model.train()
    texts, frames = ["aab", "b"], [19, 10]  # 7 and 4 frames of the model
    target = [encode(text, task.target_dictionary) for text in texts]
    torch.manual_seed(0)
    features = torch.randn(2, 19, 40)
    features[1, 10:] = 0
    sample = {
        "id": torch.arange(2),
        "net_input": {"features": features, "frames": torch.tensor(frames)},
        "target": nn.utils.rnn.pad_sequence(target, batch_first=True, padding_value=task.target_dictionary.pad()),
        "target_lengths": torch.tensor([3, 1]),
        "ntokens": 4,
    }
    loss, sample_size, _ = criterion(model, sample)
    probs = model.get_normalized_probs(model(**sample["net_input"]), log_probs=False).double()
    expected = 0
    symbols = [0, *(task.target_dictionary.index(letter) for letter in "ab")]
    for row, tokens in enumerate(target):
        total = 0
        for path in itertools.product(symbols, repeat=strided(frames[row])):
            if [k for k, _ in itertools.groupby(path) if k != 0] == tokens.tolist():
                total += math.prod(probs[t, row, k].item() for t, k in enumerate(path))
        expected -= math.log(total)
    assert sample_size == 2 and loss.item() == pytest.approx(expected, rel=1e-5)


def lars(params, **settings) -> FairseqLars:
    return optim.build_optimizer(OmegaConf.structured(LarsConfig(_name="lars", **settings)), params)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_lars_is_timms_and_its_formula(weight_decay):
    from timm.optim import Lars

    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(4), torch.zeros(2)]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    mine = lars(ours, lr=[0.3], momentum=0.9, weight_decay=weight_decay, trust_coefficient=0.01)
    timms = Lars(theirs, lr=0.3, momentum=0.9, weight_decay=weight_decay, trust_coeff=0.01, always_adapt=True)
    written, momentum = [x.clone() for x in start], [torch.zeros_like(x) for x in start]
    for _ in range(5):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            grad = torch.randn_like(a)
            a.grad, b.grad = grad.clone(), grad.clone()
            w = written[index]
            trust = 0.01 * w.norm() / (grad.norm() + weight_decay * w.norm() + 1e-8) if w.norm() > 0 else 1
            momentum[index] = 0.9 * momentum[index] + trust * (grad + weight_decay * w)
            written[index] = w - 0.3 * momentum[index]
        mine.step()
        timms.step()
    for a, b, c in zip(ours, theirs, written, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.data, c)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lr": [0.1], "trust_coefficient": 0.0}, "--trust-coefficient 0.0: allowed are positive numbers"),
        ({"lr": [0.1], "momentum": 1.0}, "--momentum 1.0: allowed are numbers from 0, below 1"),
    ],
)
def test_wrong_lars_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        lars([nn.Parameter(torch.ones(2))], **settings)


@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "lars"])
def test_gamma_has_a_learning_rate_of_its_own(train, optimizer, caplog):
    """The groups that a real run leaves in its checkpoint, where the schedule has set the rate."""
    flags = ("--optimizer", optimizer, "--gamma-lr-scale", 2, "--disable-validation")
    step = ("--lr-scheduler", "step", "--lr-deacy-period", 2, "--lr-decay", 0.5)
    state = train("scaled", 3, *flags, *step)
    others, gammas = state["last_optimizer_state"]["param_groups"]
    assert len(gammas["params"]) == 2 * 6 + 2
    assert (others["lr"], gammas["lr"]) == (0.025, 0.05)  # decayed once
    same(
        train("straight", 4, *flags, *step), (train("resumed", 2, *flags, *step), train("resumed", 4, *flags, *step))[1]
    )


def test_plateau_decay_halves_both_rates(train):
    """A word error rate that does not fall: with this rate nothing is learned."""
    plateau = ("--lr-scheduler", "reduce_lr_on_plateau", "--lr-shrink", 0.5, "--best-checkpoint-metric", "wer")
    state = train("flat", 12, "--lr", 1e-5, "--gamma-lr-scale", 2, *plateau)  # 4 updates an epoch
    others, gammas = state["last_optimizer_state"]["param_groups"]
    # The first of three validations sets the mark; the last rate change comes after its checkpoint is written.
    assert (others["lr"], gammas["lr"]) == (pytest.approx(0.5e-5), pytest.approx(1e-5))


def test_flat_half_precision_has_no_gamma_of_its_own():
    gamma = build(gamma_lr_scale=2.0).encoder.output.parametrizations.weight[0].gamma
    with pytest.raises(ValueError, match="--gamma-lr-scale with --fp16 or --bf16 needs --fp16-no-flatten-grads"):
        optim.FP16Optimizer.build_fp32_params(None, [gamma])


# -------------------------------------------------------------------------------------------------------- training


def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(train):
    """With everything random on: dropout, layer drop, CAPE, SpecAugment; across an epoch of 4 updates."""
    straight = train("straight", 7)
    train("resumed", 3)
    same(straight, train("resumed", 7))


def test_gradient_accumulation_is_the_run_with_the_whole_batch(train):
    whole = train("whole", 4, *EXACT, *LARS, "--batch-size", 32)
    same(whole, train("parts", 4, *EXACT, *LARS, "--batch-size", 8, "--update-freq", 4), rtol=2e-3, atol=2e-4)


def test_two_processes_are_the_run_with_one(train, speech, tmp_path):
    whole = train("one", 4, *EXACT, *LARS, "--batch-size", 32)
    command = [sys.executable, "-m", "fairseq_cli.train", speech, "--user-dir", USER_DIR, *TINY, *EXACT, *LARS]
    command += ["--batch-size", 16, "--max-update", 4, "--save-dir", tmp_path / "two", "--distributed-world-size", 2]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "two" / "checkpoint_last.pt", map_location="cpu")
    same(whole, two, rtol=2e-3, atol=2e-4)


def test_u_and_v_advance_once_per_update(train, monkeypatch):
    calls = count_advances(monkeypatch)
    train("counted", 3, *EXACT, "--update-freq", 2, "--checkpoint-activations")
    assert len(calls) == 3 * (2 * 6 + 2)


def test_it_learns_tones_and_transcribes_them(train, speech, tmp_path, capsys, caplog):
    """The word error rate of validation, of the command line, and of jiwer agree, and the letters are right."""
    caplog.set_level(logging.INFO)
    flags = ("--optimizer", "adam", "--lr", 0.01, "--freq-masks", 0, "--time-masks", 0, "--validate-interval", 40)
    train("tones", 320, *EXACT, *flags)
    shown = [float(m[1]) for record in caplog.records if (m := re.search(r"\| wer ([\d.]+)", record.getMessage()))]
    checkpoint = str(tmp_path / "tones" / "checkpoint_last.pt")
    capsys.readouterr()
    assert transcribe.main([checkpoint, "--manifest", str(speech / "manifest.tsv"), "--split", "valid"]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    rows = read_manifest(speech / "manifest.tsv", "valid")
    assert [line.split("\t")[0] for line in lines] == [str(row.path) for row in rows]
    wer = 100 * jiwer.wer([row.text for row in rows], [line.split("\t")[1] for line in lines])
    assert summary.startswith(f"valid: WER {wer:.2f} %")
    assert shown[-1] == pytest.approx(wer, abs=0.01)
    # Of letters: twelve words are too few, and a rate of 0 to 58 % from seed to seed; letters 6 to 16 %, and 100 untrained.
    assert 100 * jiwer.cer([row.text for row in rows], [line.split("\t")[1] for line in lines]) < 20
    soundfile.write(tmp_path / "16k.wav", np.repeat(soundfile.read(rows[0].path)[0], 2), 16000)
    assert transcribe.main([checkpoint, str(tmp_path / "16k.wav"), str(tmp_path / "none.wav")]) == 1
    captured = capsys.readouterr()
    assert captured.out.split("\t")[1].strip() == lines[0].split("\t")[1]  # resampled
    assert captured.err == f"transcribe: {tmp_path / 'none.wav'}: file is missing\n"


@pytest.mark.parametrize("reparam", ["none", "weight"])
def test_baselines_transcribe_as_they_were_trained(train, speech, tmp_path, capsys, reparam):
    train("plain", 2, "--norm", "layernorm", "--reparam", reparam, "--optimizer", "adam", "--lr", 0.01)
    checkpoint = tmp_path / "plain" / "checkpoint_last.pt"
    capsys.readouterr()
    (row, *_) = read_manifest(speech / "manifest.tsv", "valid")
    assert transcribe.main([str(checkpoint), str(row.path)]) == 0
    (model,), _, task = transcribe.checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    assert capsys.readouterr().out.split("\t")[1].rstrip("\n") == transcribe.transcribe(model.eval(), task, row.path)


def test_the_words_of_an_unusable_recording_count_as_wrong(monkeypatch, capsys):
    def hear(model, task, path):
        if path.name == "broken.wav":
            raise ValueError("cannot be decoded")
        return "a"

    monkeypatch.setattr(transcribe, "transcribe", hear)
    rows = [
        Row(Path("good.wav"), "A b", None),
        Row(Path("broken.wav"), "c d", None),
        Row(Path("silent.wav"), " ", None),
    ]
    assert transcribe.word_error_rate(None, None, "test", rows) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "test: WER 75.00 %, CER 83.33 %, 3 utterances, 2 of them unusable"
    assert captured.err.splitlines() == [
        "transcribe: broken.wav: cannot be decoded",
        "transcribe: silent.wav: no transcript",
    ]


def test_transcribe_refuses_what_is_no_speech_model(tmp_path, capsys):
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert transcribe.main([str(tmp_path / "text.pt"), "a.wav"]) == 1
    assert capsys.readouterr().err.startswith(f"transcribe: {tmp_path / 'text.pt'}: ")


# ------------------------------------------------------------------------------------------------------- bad input


def bad_rows(folder: Path) -> list[tuple]:
    """Path, seconds, text and the complaint of each kind of bad utterance."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(RATE)
    for name in ("letters", "silent", "cut", "long"):
        soundfile.write(folder / f"{name}.wav", noise, RATE)
    soundfile.write(folder / "empty.wav", noise[:0], RATE)
    soundfile.write(folder / "short.wav", noise[:100], RATE)
    (folder / "zero.wav").write_bytes(b"")
    (folder / "corrupt.wav").write_bytes(b"RIFF but no more of it")
    return [
        ("none.wav", 1.0, "abc", "file is missing"),
        ("zero.wav", 1.0, "abc", "no sound file"),
        ("corrupt.wav", 1.0, "abc", "no sound file"),
        ("empty.wav", 0.0, "abc", "no samples in it"),
        ("short.wav", "", "abc", r"too short for its transcript \(0.01 s\): CTC needs 3 frames and the model makes 0"),
        ("cut.wav", 2.5, "abc", "cut off: 1.00 s where the manifest says 2.50 s"),
        ("letters.wav", 1.0, "naïve 9", "letters 9 ï in the transcript 'naïve 9': allowed are a-z, ' and spaces"),
        ("silent.wav", 1.0, "", "no transcript"),
        (
            "long.wav",
            1.0,
            "aa" * 20,
            r"too short for its transcript \(1.00 s\): CTC needs 79 frames and the model makes 33",
        ),
    ]


def test_each_bad_input_is_named_and_counted_and_the_run_goes_on(tmp_path, caplog):
    rows = bad_rows(tmp_path)
    soundfile.write(tmp_path / "good.wav", 0.1 * np.ones((RATE // 2, 2)), 4000)
    write_manifest(tmp_path, [("train", *row[:3]) for row in rows] + [("train", "good.wav", 1.0, "abc")])
    caplog.set_level(logging.INFO)
    data = dataset(tmp_path)
    assert len(data) == 1 and data.bad == len(rows)
    messages = [record.getMessage() for record in caplog.records]
    for number, (name, _, _, complaint) in enumerate(rows, start=1):
        assert any(re.match(rf"bad input {number}: .*/{name}: {complaint}", message) for message in messages), name
    assert "9 of 10 utterances cannot be used; each is named above" in messages
    assert "1 of 10 recordings at 4000 Hz: resampled to 8000 Hz" in messages
    assert "1 of 10 recordings of 2 channels: averaged" in messages


@pytest.mark.parametrize("number", range(9))
def test_each_bad_input_stops_the_run_if_asked(tmp_path, number):
    name, seconds, text, complaint = bad_rows(tmp_path)[number]
    write_manifest(tmp_path, [("train", name, seconds, text)])
    with pytest.raises(ValueError, match=f"{name}: {complaint}"):
        dataset(tmp_path, bad_input="stop")
    with pytest.raises(ValueError, match="none of 1 utterances can be used"):
        dataset(tmp_path)


def test_an_utterance_longer_than_a_batch_is_named_once(speech, caplog):
    data = dataset(speech)
    longest = int(data.sizes.max())
    ids = np.arange(len(data))
    for _ in range(2):  # epochs
        kept, ignored = data.filter_indices_by_size(ids, longest - 1)
    assert set(ids) - set(kept) == set(np.flatnonzero(data.sizes == longest)) and ignored == []
    named = [
        m for m in caplog.messages if f"{longest} frames long: {longest - 1} frames, --max-tokens, are the most" in m
    ]
    assert len(named) == len(ids) - len(kept) == data.bad
    with pytest.raises(ValueError, match="frames long"):
        dataset(speech, bad_input="stop").filter_indices_by_size(ids, longest - 1)


@pytest.mark.parametrize("broken", ["nan", "gone"])
def test_a_recording_that_breaks_later_is_named_and_training_goes_on(train, speech, tmp_path, caplog, broken):
    """What no header tells: samples that are not finite, and a file that is removed during training."""
    rows = read_manifest(speech / "manifest.tsv", "train")
    soundfile.write(tmp_path / "bad.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    lines = [("train", row.path, row.seconds, row.text) for row in rows] + [("train", "bad.wav", 1.0, "abc")]
    write_manifest(tmp_path, lines)
    if broken == "gone":
        soundfile.write(tmp_path / "bad.wav", np.zeros(RATE), RATE)
        data = dataset(tmp_path)
        (tmp_path / "bad.wav").unlink()
        assert data[32] is None and data.collater([data[32]]) == {}
        assert len(data.collater([data[32], data[0]])["id"]) == 1
        assert data.bad == 3
        data.bad_input = "stop"
        with pytest.raises(ValueError, match=r"bad\.wav: file is missing"):
            data[32]
        return
    caplog.set_level(logging.WARNING)
    train("nan", 5, "--disable-validation", data=tmp_path)  # 33 utterances, 5 batches
    assert any("bad.wav: NaN or inf among its samples" in record.getMessage() for record in caplog.records)
    with pytest.raises(ValueError, match="NaN or inf among its samples"):
        train("stop", 5, "--disable-validation", "--bad-input", "stop", data=tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no such manifest"),
        ("path\twords\n", "no column 'text' among path, words"),
        ("", "no column 'path' among nothing"),
        ("split\tpath\ttext\ndev\ta.wav\ta\n", "no split 'train', there are dev"),
        ("path\tseconds\ttext\na.wav\tlong\ta\n", "column 'seconds': could not convert string to float: 'long'"),
    ],
)
def test_a_wrong_manifest_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "m.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / "m.tsv", "train")


@pytest.mark.skipif(
    not REAL.is_dir(), reason=f"needs real recordings in {REAL}: python -m recipes.small_data asr, or STABLE_DATA"
)
def test_real_recordings_are_all_usable_and_their_loss_falls(train, caplog):
    caplog.set_level(logging.INFO)
    rows = [row for split in ("train", "valid", "test") for row in read_manifest(REAL / "manifest.tsv", split)]
    data = SpeechDataset(rows, dictionary(), 16000, 80, strided)
    assert len(data) == len(rows) > 100 and data.bad == 0
    signal = speech_features.read_audio(rows[0].path, RATE)  # of 8 kHz the upper half is empty but for rounding
    np.testing.assert_allclose(speech_features.log_mel(signal, RATE, 40), numpy_log_mel(signal, RATE, 40), atol=2e-3)
    caplog.clear()
    flags = ("--optimizer", "adam", "--lr", 0.005, "--max-tokens", 4000, "--batch-size", 16)
    train("real", 20, *flags, "--validate-interval-updates", 5, data=REAL)
    losses = [
        float(m[1]) for r in caplog.records if (m := re.search(r"'valid' subset \| loss ([\d.]+)", r.getMessage()))
    ]
    assert len(losses) == 4 and losses[-1] < losses[0]
