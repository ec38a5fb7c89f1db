"""The speech model of [σ, App. E]: a strided convolution, CAPE positions, transformer blocks, a linear layer to letters."""

import dataclasses
from argparse import Namespace

import torch
from fairseq.data import Dictionary
from fairseq.models import FairseqEncoder, FairseqEncoderModel, register_model, register_model_architecture
from fairseq.models.transformer import TransformerConfig
from fairseq.modules import LayerDropModuleList
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from omegaconf import OmegaConf
from torch import Tensor, nn

from stable_core import sigma_layers
from stable_core.inits import init_
from stable_core.norms import build_norm
from stable_core.reparams import reparametrise

from .blocks import BlockConfig, EncoderLayer, add_flags, norm_first, set_defaults
from .cape import Cape
from .checkpoints import fitted
from .speech_features import STEP

KERNEL, STRIDE = 7, 3
DEPTHS = (36, 72)


def strided(frames):
    """Frames (int or Tensor) that the convolution makes of `frames`: every third, its window centred on it."""
    return (frames + STRIDE - 1) // STRIDE


def _tokens(seconds: float) -> int:
    """How many the blocks see of so long an utterance."""
    return strided(round(seconds / STEP))


class SpeechEncoder(FairseqEncoder):
    """features (batch, frames, bins) -> logits of blank and letters for every third frame.

    --init is of all layers. σReparam is on every linear layer of the blocks and on the output layer, as App. E.2 says, and
    on the convolution, as the other models of the paper have it on their patch embedding; --plain-conv leaves the convolution
    as it is.
    """

    def __init__(self, args: Namespace, bins: int, symbols: Dictionary) -> None:
        super().__init__(symbols)
        blocks = BlockConfig.from_args(args, (args.encoder_layers, 0))
        width = args.encoder_embed_dim
        self.conv = nn.Conv1d(bins, width, KERNEL, stride=STRIDE, padding=KERNEL // 2)
        shifts = (args.cape_global_shift, args.cape_local_shift, args.cape_scale)
        self.positions = Cape(width, STRIDE * STEP, *shifts)
        self.dropout = nn.Dropout(args.dropout)
        before = norm_first(blocks.options, "encoder")
        layers = [EncoderLayer(_layer_config(args, before)) for _ in range(args.encoder_layers)]
        self.norm = build_norm(width, blocks.options) if before else nn.Identity()
        self.output = nn.Linear(width, len(symbols))
        for module in (self.conv, self.output, *(module for layer in layers for module in layer.modules())):
            if isinstance(module, nn.Linear | nn.Conv1d):
                _init(module, width, blocks.init_std)
        for layer in layers:
            layer.stabilise(dataclasses.replace(blocks, init_std=None), blocks.residuals[0], _tokens(args.tau_seconds))
        alone = dataclasses.replace(blocks.options, qkv="separate")  # the other two settings are for attention
        for module in (self.output, self.conv):
            init_(module, alone)
            if not (module is self.conv and args.plain_conv):
                reparametrise(module, alone)
        if args.checkpoint_activations:
            layers = [checkpoint_wrapper(layer) for layer in layers]
        self.layers = LayerDropModuleList(args.layer_drop, layers)
        if args.gamma_lr_scale != 1:
            for _, sigma in sigma_layers(self):
                if isinstance(sigma.gamma, nn.Parameter):
                    sigma.gamma.optim_overrides = {"optimizer": {"lr_scale": args.gamma_lr_scale}}  # see optim.py

    def forward(self, features: Tensor, frames: Tensor) -> dict[str, Tensor]:
        """-> encoder_out (frames / 3, batch, symbols) and padding_mask (batch, frames / 3), True where there is no audio.

        Padded features must be zero, as a batch of SpeechDataset has them.
        """
        x = self.conv(features.transpose(1, 2)).transpose(1, 2)
        lengths = strided(frames)
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        x = self.dropout(x + self.positions(lengths, x.shape[1]).to(x))
        x = x.masked_fill(padding[..., None], 0).transpose(0, 1)
        for layer in self.layers:
            x = layer(x, padding)
        return {"encoder_out": self.output(self.norm(x)), "padding_mask": padding}


@register_model("sigma_transformer_ctc")
class SigmaTransformerCtc(FairseqEncoderModel):
    @staticmethod
    def add_args(parser):
        add_flags(parser, init_std="0.1 where gamma starts at 1, otherwise uniform within 1 / sqrt(width)")
        parser.add_argument("--encoder-layers", type=int, metavar="N", help="transformer blocks")
        parser.add_argument("--encoder-embed-dim", type=int, metavar="N", help="width of the blocks")
        parser.add_argument("--encoder-ffn-embed-dim", type=int, metavar="N", help="width of their feed-forward layers")
        parser.add_argument("--encoder-attention-heads", type=int, metavar="N", help="attention heads")
        parser.add_argument("--dropout", type=float, metavar="P", help="dropout, also of attention and activations")
        parser.add_argument(
            "--layer-drop", type=float, metavar="P", help="probability to leave out a block in training"
        )
        parser.add_argument("--cape-global-shift", type=float, metavar="S", help="of an utterance, up to S seconds")
        parser.add_argument("--cape-local-shift", type=float, metavar="X", help="of a position, up to X half steps")
        parser.add_argument("--cape-scale", type=float, metavar="X", help="of time, from 1/X to X")
        parser.add_argument(
            "--tau-seconds", type=float, metavar="S", help="StableAtten's tau is that of so long an utterance"
        )
        parser.add_argument("--plain-conv", action="store_true", help="no reparametrisation of the convolution")
        parser.add_argument("--gamma-lr-scale", type=float, metavar="X", help="learning rate of gamma, times this")
        parser.add_argument("--checkpoint-activations", action="store_true", help="save memory, compute blocks twice")

    @classmethod
    def build_model(cls, args, task):
        if OmegaConf.is_config(args):
            args = Namespace(**OmegaConf.to_container(args))
        sigma_transformer_ctc(args)
        _check(args)
        return cls(SpeechEncoder(args, task.cfg.mel_bins, task.target_dictionary))

    def forward(self, features: Tensor, frames: Tensor) -> dict[str, Tensor]:
        return self.encoder(features, frames)

    def load_state_dict(self, state_dict, strict=True, model_cfg=None, args=None):
        state_dict = fitted(self, state_dict)
        return super().load_state_dict(state_dict, strict, model_cfg, args)


def _layer_config(args: Namespace, before: bool) -> TransformerConfig:
    config = TransformerConfig()
    config.dropout = config.attention_dropout = config.activation_dropout = args.dropout
    config.encoder.embed_dim = args.encoder_embed_dim
    config.encoder.ffn_embed_dim = args.encoder_ffn_embed_dim
    config.encoder.attention_heads = args.encoder_attention_heads
    config.encoder.normalize_before = before
    return config


def _init(layer: nn.Module, width: int, std: float | None) -> None:
    """Table 8: trunc_normal(.1) with σReparam, uniform(.036) without, which is 1 / sqrt(width) at its width of 768."""
    if std is None:
        nn.init.uniform_(layer.weight, -(width**-0.5), width**-0.5)
    else:
        nn.init.normal_(layer.weight, std=std)  # the cut, at 2, is at 20 std
    nn.init.zeros_(layer.bias)


def _check(args: Namespace) -> None:
    for flag in ("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: allowed are whole numbers from 1")
    if args.encoder_embed_dim % args.encoder_attention_heads:
        raise ValueError(
            f"--encoder-attention-heads {args.encoder_attention_heads}: allowed are divisors of the width, "
            f"{args.encoder_embed_dim}"
        )
    for flag in ("dropout", "layer_drop"):
        if not 0 <= getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: allowed are numbers from 0, below 1")
    if not args.tau_seconds >= 1:
        raise ValueError(f"--tau-seconds {args.tau_seconds}: allowed are numbers from 1")
    if not args.gamma_lr_scale > 0:
        raise ValueError(f"--gamma-lr-scale {args.gamma_lr_scale}: allowed are positive numbers")
    if args.gamma_lr_scale != 1 and args.reparam != "sigma":
        raise ValueError(f"--gamma-lr-scale {args.gamma_lr_scale}: --reparam {args.reparam} learns no gamma")


@register_model_architecture("sigma_transformer_ctc", "sigma_transformer_ctc")
def sigma_transformer_ctc(args):
    """Defaults: σReparam without LayerNorm, 36 layers, and what Table 8 has for all of its models."""
    set_defaults(args, init_std=0.1, norm="none", residual="pre-ln", reparam="sigma")
    defaults = {"encoder_layers": 36, "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072,
                "encoder_attention_heads": 4, "dropout": 0.3, "layer_drop": 0.3, "cape_global_shift": 60.0,
                "cape_local_shift": 1.0, "cape_scale": 1.1, "tau_seconds": 30.0, "plain_conv": False, "gamma_lr_scale": 1.0,
                "checkpoint_activations": False}  # fmt: skip
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def _register(layers: int) -> None:
    @register_model_architecture("sigma_transformer_ctc", f"sigma_transformer_ctc_{layers}l")
    def arch(args):
        if getattr(args, "encoder_layers", None) is None:
            args.encoder_layers = layers
        sigma_transformer_ctc(args)


for depth in DEPTHS:
    _register(depth)
