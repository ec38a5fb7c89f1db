"""`python -m fairseq_sigma.transcribe CHECKPOINT WAV...`: what a speech model hears, by greedy decoding, without an LM.

`--manifest FILE --split NAME...` in place of recordings transcribes splits and prints their word error rates.
"""

import argparse
import sys
from pathlib import Path

import jiwer
import torch
from fairseq import checkpoint_utils
from torch.nn.utils.parametrize import is_parametrized

import fairseq_sigma  # noqa: F401  registers task and model, and mends torch.load
from fairseq_sigma import speech_features
from fairseq_sigma.ctc_model import SigmaTransformerCtc
from fairseq_sigma.speech_dataset import Row, greedy, read_manifest
from stable_core import fold
from stable_core.checkpoint_file import read_checkpoint


def load(checkpoint: Path):
    """-> (model, task) of a speech checkpoint, the model folded and in evaluation mode.

    Raises:
        ValueError: it is a checkpoint of something else.
    """
    written = read_checkpoint(checkpoint)  # fairseq's own messages for a file that is none are of many kinds
    if not isinstance(written.get("model"), dict) or not (written.get("cfg") or written.get("args")):
        raise ValueError("no checkpoint of fairseq")
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    if not isinstance(model, SigmaTransformerCtc):
        raise ValueError(f"holds a {type(model).__name__}, no speech model")
    if any(is_parametrized(module) for module in model.modules()):
        fold(model)
    return model.eval(), task


@torch.inference_mode()
def transcribe(model, task, path: Path) -> str:
    """Raises ValueError: the recording is missing, broken, or shorter than a frame of 25 ms."""
    signal = speech_features.read_audio(path, task.cfg.sample_rate)
    if speech_features.n_frames(len(signal), task.cfg.sample_rate) == 0:
        raise ValueError(f"{len(signal) / task.cfg.sample_rate:.3f} s are less than a frame of 0.025 s")
    features = torch.from_numpy(speech_features.log_mel(signal, task.cfg.sample_rate, task.cfg.mel_bins))
    device = next(model.parameters()).device
    output = model(features[None].to(device), torch.tensor([len(features)], device=device))
    return greedy(output["encoder_out"][:, 0].argmax(dim=-1).cpu(), task.target_dictionary)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fairseq_sigma.transcribe", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="written by fairseq-train")
    parser.add_argument("recordings", type=Path, nargs="*", metavar="WAV", help="sound files of any sampling rate")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="transcribe splits of this one")
    parser.add_argument("--split", nargs="+", default=["test"], metavar="NAME", help="default: test")
    args = parser.parse_args(argv)
    if bool(args.recordings) == bool(args.manifest):
        parser.error("give either recordings or --manifest")
    try:
        model, task = load(args.checkpoint)
        if torch.cuda.is_available():
            model.cuda()
        splits = {split: read_manifest(args.manifest, split) for split in args.split} if args.manifest else {}
    except (OSError, RuntimeError, ValueError) as error:
        message = str(error).splitlines()[0].removeprefix(f"{args.checkpoint}: ")
        print(f"transcribe: {args.checkpoint}: {message}", file=sys.stderr)
        return 1
    bad = sum(heard(model, task, path) is None for path in args.recordings)
    for split, rows in splits.items():
        bad += word_error_rate(model, task, split, rows)
    return 1 if bad else 0


def heard(model, task, path: Path) -> str | None:
    """Prints what the model hears in a recording; None if it is of no use, which is said."""
    try:
        text = transcribe(model, task, path)
    except ValueError as error:
        print(f"transcribe: {path}: {error}", file=sys.stderr)
        return None
    print(f"{path}\t{text}")
    return text


def word_error_rate(model, task, split: str, rows: list[Row]) -> int:
    """Prints the texts of a split and its error rates; returns how many utterances were of no use."""
    texts, references, bad = [], [], 0
    for row in rows:
        if not row.text.split():
            print(f"transcribe: {row.path}: no transcript", file=sys.stderr)
            bad += 1
            continue
        text = heard(model, task, row.path)
        bad += text is None
        texts.append(text or "")  # every word of its transcript counts as an error
        references.append(" ".join(row.text.lower().split()))
    if references:
        wer, cer = (100 * rate(references, texts) for rate in (jiwer.wer, jiwer.cer))
        print(f"{split}: WER {wer:.2f} %, CER {cer:.2f} %, {len(rows)} utterances, {bad} of them unusable")
    return bad


if __name__ == "__main__":
    sys.exit(main())
