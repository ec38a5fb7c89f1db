"""Transformer layers, encoder and decoder with a choice of residual connection and weight reparametrisation."""

from dataclasses import dataclass

from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stable_core import SigmaReparamConfig, deepnorm_scales, fold, sigma_reparam
from stable_core.deepnorm import DeepNormScales

RESIDUALS = ("pre-ln", "post-ln", "deepnorm", "none")
REPARAMS = ("none", "sigma", "spectral", "weight")
NO_NOISE = (
    "Quantisation writes into layer.weight, which is computed from the learned weight at each use; "
    "train without, and quantise what python -m fairseq_sigma.export makes"
)


@dataclass(frozen=True)
class BlockConfig:
    """How every block of a model is built; the model's command-line flags, checked.

    init_std is the standard deviation of the truncated normal for the weights of the blocks, None is fairseq's own; scales
    are DeepNorm's, None with another residual.
    """

    residual: str
    reparam: SigmaReparamConfig | None
    init_std: float | None
    scales: DeepNormScales | None

    @classmethod
    def from_args(cls, args, depths: tuple[int, int]) -> "BlockConfig":
        """`depths` are those of encoder and decoder as trained, before --encoder-layers-to-keep and the like.

        Raises ValueError naming the flag, its value and what is allowed.
        """
        for flag, allowed in (("residual", RESIDUALS), ("reparam", REPARAMS)):
            if getattr(args, flag) not in allowed:
                raise ValueError(f"--{flag} {getattr(args, flag)}: allowed are {', '.join(allowed)}")
        if args.init_std is not None and not args.init_std > 0:
            raise ValueError(f"--init-std {args.init_std}: allowed are positive numbers")
        for name in ("layernorm_embedding", "scale_attn", "scale_fc"):  # each a LayerNorm of its own
            if args.residual == "none" and getattr(args, name, False):
                raise ValueError(f"--{name.replace('_', '-')} contradicts --residual none; use another --residual")
        reparam = None
        if args.reparam != "none":
            fields = ("gamma_init", "qkv", "n_power_iterations", "stop_gradient")
            reparam = SigmaReparamConfig(kind=args.reparam, **{field: getattr(args, field) for field in fields})
            for name in ("quant_noise_pq", "quant_noise_scalar"):
                if value := getattr(args, name, None):
                    flag = name.replace("_", "-")
                    raise ValueError(f"--{flag} {value}: allowed with --reparam {args.reparam} is 0. {NO_NOISE}")
        scales = deepnorm_scales(*depths) if args.residual == "deepnorm" else None
        return cls(args.residual, reparam, args.init_std, scales)


def add_flags(parser, init_std: str) -> None:
    """The command-line flags of BlockConfig, and of init_std's default in words. Defaults are left to the archs."""
    parser.add_argument(
        "--residual", choices=RESIDUALS, help="residual connection and place of LayerNorm; none: no LayerNorm"
    )
    parser.add_argument("--reparam", choices=REPARAMS, help="reparametrisation of every linear layer of the blocks")
    parser.add_argument("--gamma-init", choices=("one", "spectral"), help="initial gamma: 1, or the spectral norm")
    parser.add_argument("--qkv", choices=("separate", "joint", "qk_joint"), help="which of q, k, v share a sigma")
    parser.add_argument("--n-power-iterations", type=int, metavar="N", help="power iterations per update")
    parser.add_argument("--stop-gradient", action="store_true", help="no gradient through sigma")
    parser.add_argument("--init-std", type=float, metavar="STD",
                        help=f"truncated normal for the blocks' weights; default: {init_std}")  # fmt: skip


def set_defaults(args, residual: str, reparam: str, init_std: float | None) -> None:
    """Fills in the flags that were not given; init_std is for sigma and spectral, whose weights have no size of their own."""
    defaults = {"residual": residual, "reparam": reparam, "gamma_init": "one", "qkv": "separate",
                "n_power_iterations": 1, "stop_gradient": False, "init_std": None}  # fmt: skip
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.init_std is None and args.reparam in ("sigma", "spectral"):
        args.init_std = init_std


def set_normalize_before(args, side: str) -> None:
    """fairseq's flag of the encoder or decoder as --residual says. Raises ValueError where it was given and says otherwise."""
    name, before = f"{side}_normalize_before", args.residual == "pre-ln"
    if getattr(args, name, before) and not before:
        raise ValueError(f"--{name.replace('_', '-')} contradicts --residual {args.residual}; use --residual pre-ln")
    setattr(args, name, before)


class _Block:
    """What the encoder's and the decoder's layers have in common."""

    alpha = 1.0

    def stabilise(self, config: BlockConfig, side: str) -> None:
        """Initialises the weights, scales v, output and feed-forward ones by beta, and only then reparametrises them."""
        beta = 1.0
        if config.scales is not None:
            self.alpha, beta = getattr(config.scales, side)
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.LayerNorm) and config.residual == "none":
                self.set_submodule(name, nn.Identity())
            if isinstance(module, nn.Linear):
                if config.init_std is not None:
                    nn.init.trunc_normal_(module.weight, std=config.init_std)
                if name.endswith(("v_proj", "out_proj", "fc1", "fc2")):
                    module.weight.data.mul_(beta)
        if config.reparam is not None:
            sigma_reparam(self, config.reparam)

    def residual_connection(self, x: Tensor, residual: Tensor) -> Tensor:
        return x.add(residual, alpha=self.alpha)

    def make_generation_fast_(self, **kwargs) -> None:
        if any(parametrize.is_parametrized(module) for module in self.modules()):
            fold(self)


class EncoderLayer(_Block, TransformerEncoderLayerBase):
    pass


class DecoderLayer(_Block, TransformerDecoderLayerBase):
    def make_generation_fast_(self, **kwargs) -> None:
        super().make_generation_fast_()
        TransformerDecoderLayerBase.make_generation_fast_(self, **kwargs)


def _finish(layer: _Block, cfg, side: str) -> nn.Module:
    layer.stabilise(cfg.blocks, side)
    # As fairseq's own build_encoder_layer and build_decoder_layer end.
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)


class Encoder(TransformerEncoderBase):
    def build_encoder_layer(self, cfg):
        return _finish(EncoderLayer(cfg, return_fc=self.return_fc), cfg, "encoder")


class Decoder(TransformerDecoderBase):
    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        return _finish(DecoderLayer(cfg, no_encoder_attn), cfg, "decoder")
