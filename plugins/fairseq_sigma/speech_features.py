"""A recording on disk -> normalised log-mel features [σ, App. E.1].

Reading is libsndfile's (soundfile), resampling soxr's, the filterbank Kaldi's (kaldi-native-fbank), all without torchaudio,
which does not import beside today's torch.
"""

from dataclasses import dataclass
from pathlib import Path

import kaldi_native_fbank
import numpy as np
import soundfile
import soxr

WINDOW, STEP = 0.025, 0.010  # seconds


@dataclass(frozen=True)
class Header:
    """What a sound file says of itself, without its samples being read."""

    rate: int  # Hz
    samples: int  # for each channel
    channels: int

    @property
    def seconds(self) -> float:
        return self.samples / self.rate


def read_header(path: Path) -> Header:
    """Raises ValueError: the file is missing, empty, or no sound file."""
    try:
        info = soundfile.info(str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError("file is missing" if not path.exists() else f"no sound file: {_one_line(error)}") from None
    if info.frames == 0:
        raise ValueError("no samples in it")
    return Header(info.samplerate, info.frames, info.channels)


def n_samples(header: Header, rate: int) -> int:
    """Samples of the recording at `rate` Hz."""
    return round(header.samples * rate / header.rate)


def n_frames(samples: int, rate: int) -> int:
    """Windows of 25 ms, one every 10 ms, that lie wholly within `samples` samples at `rate` Hz."""
    window, step = round(WINDOW * rate), round(STEP * rate)
    return max(0, 1 + (samples - window) // step)


def read_audio(path: Path, rate: int) -> np.ndarray:
    """The recording as float32 (samples,) in [-1, 1] at `rate` Hz: channels averaged, resampled where it has another rate.

    Raises:
        ValueError: it cannot be decoded to its end, or holds NaN or inf.
    """
    header = read_header(path)
    try:
        signal, _ = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"cannot be decoded: {_one_line(error)}") from None
    if len(signal) < header.samples:
        raise ValueError(f"cannot be decoded to its end: {len(signal)} of {header.samples} samples")
    if not np.isfinite(signal).all():
        raise ValueError("NaN or inf among its samples")
    signal = signal.mean(axis=1)
    if header.rate == rate:
        return signal
    wanted = n_samples(header, rate)
    resampled = soxr.resample(signal, header.rate, rate)[:wanted]
    return np.pad(resampled, (0, wanted - len(resampled)))  # soxr rounds the last sample its own way


def log_mel(signal: np.ndarray, rate: int, bins: int) -> np.ndarray:
    """(samples,) at `rate` Hz -> (frames, bins) float32 of zero mean and unit variance over the whole utterance.

    Kaldi's filterbank: 25 ms Povey windows every 10 ms, pre-emphasis 0.97, mel from 20 Hz to rate / 2; without dither, so
    that a file always has the same features.
    """
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = bins
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(rate, (signal * 2**15).tolist())  # Kaldi's samples are 16-bit integers
    fbank.input_finished()
    mel = np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)]).astype(np.float64)
    spread = max(mel.std(), 1e-5)  # digital silence has none
    return ((mel - mel.mean()) / spread).astype(np.float32)


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0]
