"""The fairseq task `sigma_ctc`: recordings and transcripts for CTC [σ, App. E].

`--max-tokens` counts frames of 10 ms, padding included: 24000 are the paper's 240 seconds of audio for each GPU.
"""

from dataclasses import dataclass, field
from pathlib import Path

from fairseq.data.audio.feature_transforms.specaugment import SpecAugmentTransform
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, MISSING

from .ctc_model import strided
from .speech_dataset import SpeechDataset, dictionary, read_manifest


@dataclass
class SpeechConfig(FairseqDataclass):
    data: str = field(default=MISSING, metadata={"help": "folder of a manifest.tsv"})
    sample_rate: int = field(default=16000, metadata={"help": "Hz; other recordings are resampled to it"})
    mel_bins: int = field(default=80, metadata={"help": "log-mel features of a frame"})
    bad_input: ChoiceEnum(["skip", "stop"]) = field(
        default="skip", metadata={"help": "utterances that cannot be used: name and count them, or end at the first"}
    )
    freq_masks: int = field(default=2, metadata={"help": "SpecAugment's frequency masks in training"})
    freq_mask_width: int = field(default=30, metadata={"help": "F: each is narrower than this, in mel bins"})
    time_masks: int = field(default=10, metadata={"help": "SpecAugment's time masks in training"})
    time_mask_width: int = field(default=50, metadata={"help": "T: each is shorter than this, in frames of 10 ms"})
    time_mask_ratio: float = field(default=0.1, metadata={"help": "p: and shorter than this part of the utterance"})
    seed: int = II("common.seed")

    def check(self) -> None:
        """Raises ValueError naming the flag, its value and what is allowed."""
        for flag, value, allowed, fine in (
            ("sample-rate", self.sample_rate, "whole numbers from 1000", self.sample_rate >= 1000),
            ("mel-bins", self.mel_bins, "whole numbers from 4", self.mel_bins >= 4),
            ("freq-masks", self.freq_masks, "whole numbers from 0", self.freq_masks >= 0),
            ("time-masks", self.time_masks, "whole numbers from 0", self.time_masks >= 0),
            (
                "freq-mask-width",
                self.freq_mask_width,
                f"1 to {self.mel_bins}, the mel bins",  # fairseq's SpecAugment does nothing at all beyond
                not self.freq_masks or 1 <= self.freq_mask_width <= self.mel_bins,
            ),
            (
                "time-mask-width",
                self.time_mask_width,
                "whole numbers from 1",
                not self.time_masks or self.time_mask_width >= 1,
            ),
            ("time-mask-ratio", self.time_mask_ratio, "numbers from 0 to 1", 0 <= self.time_mask_ratio <= 1),
        ):
            if not fine:
                raise ValueError(f"--{flag} {value}: allowed are {allowed}")


def spec_augment(cfg: SpeechConfig) -> SpecAugmentTransform:
    """Masks with 0, the mean of normalised features; without time warping."""
    return SpecAugmentTransform(
        0,
        cfg.freq_masks,
        cfg.freq_mask_width,
        cfg.time_masks,
        cfg.time_mask_width,
        cfg.time_mask_ratio,
        mask_value=0.0,
    )


@register_task("sigma_ctc", dataclass=SpeechConfig)
class SpeechTask(FairseqTask):
    def __init__(self, cfg: SpeechConfig) -> None:
        super().__init__(cfg)
        SpeechConfig.check(cfg)
        self.symbols = dictionary()

    @classmethod
    def setup_task(cls, cfg: SpeechConfig, **kwargs) -> "SpeechTask":
        return cls(cfg)

    def load_dataset(self, split: str, combine: bool = False, task_cfg=None, **kwargs) -> None:
        rows = read_manifest(Path(self.cfg.data) / "manifest.tsv", split)
        augment = spec_augment(self.cfg) if split.startswith("train") else None
        self.datasets[split] = SpeechDataset(
            rows,
            self.symbols,
            self.cfg.sample_rate,
            self.cfg.mel_bins,
            strided,
            str(self.cfg.bad_input),
            augment,
            self.cfg.seed,
        )

    def max_positions(self) -> None:
        return None

    @property
    def source_dictionary(self) -> None:
        return None

    @property
    def target_dictionary(self):
        return self.symbols
