"""A manifest of recordings and transcripts -> batches of features and letters; whatever cannot be used is named and counted."""

import csv
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset, data_utils

from . import speech_features

log = logging.getLogger(__name__)

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
BOUNDARY = "|"  # between words; fairseq's `--post-process letter` knows it
TOLERANCE = 0.1  # seconds by which a recording may be shorter than its manifest says


@dataclass(frozen=True)
class Row:
    """A line of a manifest."""

    path: Path
    text: str
    seconds: float | None  # None: the manifest does not say


@dataclass(frozen=True)
class Utterance:
    path: Path
    text: str
    frames: int
    tokens: torch.Tensor  # (letters,), int64


def dictionary() -> Dictionary:
    """26 letters, apostrophe and word boundary after fairseq's four; its first, `<s>`, is CTC's blank."""
    symbols = Dictionary()
    for symbol in (*LETTERS, BOUNDARY):
        symbols.add_symbol(symbol)
    return symbols


def encode(text: str, symbols: Dictionary) -> torch.Tensor:
    """A transcript -> its letters (int64), words joined by the boundary; letter case does not matter.

    Raises:
        ValueError: letters that the dictionary does not have, or none at all.
    """
    letters = BOUNDARY.join(text.lower().split())
    unknown = sorted({letter for letter in letters if letter not in symbols})
    if unknown:
        raise ValueError(f"letters {' '.join(unknown)} in the transcript {text!r}: allowed are a-z, ' and spaces")
    if not letters:
        raise ValueError("no transcript")
    return torch.tensor([symbols.index(letter) for letter in letters])


def decode(tokens: torch.Tensor, symbols: Dictionary) -> str:
    """Letters (int64) -> words with spaces between them."""
    return " ".join("".join(symbols[int(token)] for token in tokens).replace(BOUNDARY, " ").split())


def greedy(best: torch.Tensor, symbols: Dictionary) -> str:
    """The most probable token of each frame (frames,) -> text: repeats are merged, then blanks dropped."""
    merged = best.unique_consecutive()
    return decode(merged[merged >= symbols.nspecial], symbols)


def ctc_frames(tokens: torch.Tensor) -> int:
    """The fewest frames that CTC can align the tokens with: one each, and a blank between two of a kind."""
    return len(tokens) + int((tokens[1:] == tokens[:-1]).sum())


def read_manifest(path: Path, split: str) -> list[Row]:
    """The rows of a tab-separated manifest whose column `split` says so; all of them where it has no such column.

    Its first line names the columns: `path` (relative to the manifest) and `text`, perhaps `split` and `seconds`.

    Raises:
        ValueError: there is no such manifest, column or split, or `seconds` is no number.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such manifest")
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        for column in ("path", "text"):
            if column not in (reader.fieldnames or ()):
                raise ValueError(f"{path}: no column {column!r} among {', '.join(reader.fieldnames or ['nothing'])}")
        rows = list(reader)
    splits = {row["split"] for row in rows} if "split" in reader.fieldnames else {split}
    if split not in splits:
        raise ValueError(f"{path}: no split {split!r}, there are {', '.join(sorted(map(str, splits))) or 'no rows'}")
    try:
        return [
            Row(path.parent / row["path"], row["text"] or "", float(row["seconds"]) if row.get("seconds") else None)
            for row in rows
            if row.get("split", split) == split
        ]
    except ValueError as error:
        raise ValueError(f"{path}: column 'seconds': {error}") from None


class SpeechDataset(FairseqDataset):
    """The usable utterances of a split; sizes are in frames of 10 ms.

    Args:
        rows: of the manifest.
        symbols: the letters.
        rate: Hz; recordings with another rate are resampled.
        bins: of the log-mel features.
        strided: frames -> the frames that the model makes of them, for what CTC can align.
        bad_input: "skip" names and counts what cannot be used and goes on, "stop" raises ValueError at the first.
        augment: applied to the features (frames, bins) of each utterance, anew in each epoch.
        seed: of the augmentation.
    """

    # A new iterator for each epoch, because the worker processes of an old one would augment by the epoch of their start.
    can_reuse_epoch_itr_across_epochs = False

    def __init__(
        self,
        rows: list[Row],
        symbols: Dictionary,
        rate: int,
        bins: int,
        strided: Callable[[int], int],
        bad_input: str = "skip",
        augment: Callable[[np.ndarray], np.ndarray] | None = None,
        seed: int = 1,
    ) -> None:
        self.symbols, self.rate, self.bins, self.strided = symbols, rate, bins, strided
        self.bad_input, self.augment, self.seed, self.epoch = bad_input, augment, seed, 1
        self.bad, self.too_long = 0, set()
        self.notes: Counter[str] = Counter()
        self.utterances = [utterance for row in rows if (utterance := self._usable(row))]
        self.sizes = np.array([utterance.frames for utterance in self.utterances], dtype=np.int64)
        for note, count in sorted(self.notes.items()):
            log.info("%d of %d recordings %s", count, len(rows), note)
        if self.bad:
            log.warning("%d of %d utterances cannot be used; each is named above", self.bad, len(rows))
        if not self.utterances:
            raise ValueError(f"none of {len(rows)} utterances can be used")

    def _usable(self, row: Row) -> Utterance | None:
        try:
            tokens = encode(row.text, self.symbols)
            header = speech_features.read_header(row.path)
            if row.seconds is not None and header.seconds < row.seconds - TOLERANCE:
                raise ValueError(f"cut off: {header.seconds:.2f} s where the manifest says {row.seconds:.2f} s")
            frames = speech_features.n_frames(speech_features.n_samples(header, self.rate), self.rate)
            if self.strided(frames) < ctc_frames(tokens):
                raise ValueError(
                    f"too short for its transcript ({header.seconds:.2f} s): CTC needs {ctc_frames(tokens)} frames "
                    f"and the model makes {self.strided(frames)}"
                )
        except ValueError as error:
            return self._refuse(row.path, error)
        if header.rate != self.rate:
            self.notes[f"at {header.rate} Hz: resampled to {self.rate} Hz"] += 1
        if header.channels > 1:
            self.notes[f"of {header.channels} channels: averaged"] += 1
        return Utterance(row.path, row.text, frames, tokens)

    def _refuse(self, path: Path, error: ValueError) -> None:
        if self.bad_input == "stop":
            raise ValueError(f"{path}: {error}") from None
        self.bad += 1
        log.warning("bad input %d: %s: %s", self.bad, path, error)

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> dict | None:
        """Features and letters; None, named and counted, for a recording whose samples turn out to be broken."""
        utterance = self.utterances[index]
        try:
            signal = speech_features.read_audio(utterance.path, self.rate)
        except ValueError as error:
            return self._refuse(utterance.path, error)
        features = speech_features.log_mel(signal, self.rate, self.bins)
        if self.augment is not None:
            # By utterance and epoch, not by the order of reading: the same on any number of processes and after a resume.
            with data_utils.numpy_seed(self.seed, self.epoch, index):
                features = self.augment(features)
        return {"id": index, "features": torch.from_numpy(features), "tokens": utterance.tokens}

    def collater(self, samples: list[dict | None]) -> dict:
        """-> features (batch, frames, bins) and target (batch, letters), padded; empty if no recording could be read."""
        samples = [sample for sample in samples if sample is not None]
        if not samples:
            return {}
        features, tokens = ([sample[key] for sample in samples] for key in ("features", "tokens"))
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "net_input": {
                "features": pad(features, batch_first=True),
                "frames": torch.tensor([len(x) for x in features]),
            },
            "target": pad(tokens, batch_first=True, padding_value=self.symbols.pad()),
            "target_lengths": torch.tensor([len(x) for x in tokens]),
            "ntokens": sum(len(x) for x in tokens),
        }

    def num_tokens(self, index: int) -> int:
        return self.size(index)

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self.sizes[indices]

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    def ordered_indices(self) -> np.ndarray:
        """By length, so that batches hold little padding; utterances of one length in random order."""
        shuffled = np.random.permutation(len(self))
        return shuffled[np.argsort(self.sizes[shuffled], kind="stable")]

    def filter_indices_by_size(self, indices: np.ndarray, max_sizes) -> tuple[np.ndarray, list]:
        """Without the utterances that are longer than a batch may be, of which fairseq would tell no more than numbers."""
        kept, ignored = super().filter_indices_by_size(indices, max_sizes)
        for index in sorted(set(ignored) - self.too_long):
            self.too_long.add(index)
            limit = f"{max_sizes} frames, --max-tokens, are the most"
            self._refuse(self.utterances[index].path, ValueError(f"{self.size(index)} frames long: {limit}"))
        return kept, []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
