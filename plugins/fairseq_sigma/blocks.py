"""Transformer layers, encoder and decoder, made of the methods that a user chooses: `stable_core.options`."""

from dataclasses import dataclass

from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor, nn

from stable_core import fold, options
from stable_core.folding import is_reparametrised
from stable_core.inits import init_
from stable_core.norms import build_norm
from stable_core.options import OPTIONS, Options
from stable_core.registry import WrongOption, import_methods
from stable_core.reparams import reparametrise
from stable_core.residuals import Residual, build_residuals, scale_branches_

from .attention import change_attention

NORMS = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
NO_NOISE = (
    "Quantisation writes into layer.weight, which is computed from the learned weight at each use; "
    "train without, and quantise what python -m fairseq_sigma.export makes"
)


@dataclass(frozen=True)
class BlockConfig:
    """How every block of a model is built; the model's command-line flags, checked.

    init_std is the standard deviation of the truncated normal for the weights of the blocks, None is fairseq's own, or what
    options.init says; residuals are the encoder's and the decoder's.
    """

    options: Options
    init_std: float | None
    residuals: tuple[Residual, Residual]

    @classmethod
    def from_args(cls, args, depths: tuple[int, int]) -> "BlockConfig":
        """`depths` are those of encoder and decoder as trained, before --encoder-layers-to-keep and the like.

        Raises ValueError naming the flag, its value and what is allowed.
        """
        chosen = options_of(args)
        if args.init_std is not None and not args.init_std > 0:
            raise ValueError(f"--init-std {args.init_std}: allowed are positive numbers")
        if args.init_std is not None and chosen.init != "stock":
            raise ValueError(f"--init-std {args.init_std}: allowed with --init {chosen.init} is none, it has its own")
        for name in ("layernorm_embedding", "scale_attn", "scale_fc"):  # each a LayerNorm of its own
            if chosen.norm != "layernorm" and getattr(args, name, False):
                raise ValueError(f"--{name.replace('_', '-')} contradicts --norm {chosen.norm}; use --norm layernorm")
        for name in ("quant_noise_pq", "quant_noise_scalar"):
            if chosen.reparam != "none" and (value := getattr(args, name, None)):
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {value}: allowed with --reparam {chosen.reparam} is 0. {NO_NOISE}")
        return cls(chosen, args.init_std, build_residuals(chosen, *depths))


def add_flags(parser, init_std: str) -> None:
    """The command-line flags of BlockConfig, and of init_std's default in words. Defaults are left to the archs."""
    options.add_flags(parser)
    parser.add_argument("--init-std", type=float, metavar="STD",
                        help=f"truncated normal for the blocks' weights; default: {init_std}")  # fmt: skip
    parser.add_argument(
        "--methods", metavar="MODULE,...", help="modules to import first, which register methods of yours"
    )


def options_of(args) -> Options:
    """What the flags say, once the modules of --methods are imported. Raises ValueError naming the flag that is wrong."""
    try:
        import_methods(args.methods)
        return options.of(args)
    except WrongOption as error:
        raise ValueError(error.as_flag()) from None


def set_defaults(args, init_std: float | None, **defaults: str) -> None:
    """Fills in the flags that were not given. An arch whose `reparam` is "sigma" has the paper's gamma, 1.

    init_std is for weights that have no size of their own, where gamma starts at 1.
    """
    if not hasattr(args, "norm") and getattr(args, "residual", None) is not None:
        # Of a checkpoint from before there was --norm: its residual said whether there is one.
        said = options.renamed({"norm": "layernorm", "residual": args.residual})
        args.norm, args.residual = said["norm"], said["residual"]
    settings = {option.name: option.default for option in OPTIONS} | {"methods": "", "init_std": None} | defaults
    reparam = getattr(args, "reparam", None) or settings["reparam"]
    if reparam == "spectral" or reparam == defaults.get("reparam") == "sigma":
        settings["gamma_init"] = "one"
    for name, value in settings.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    starts_at_one = args.reparam in ("sigma", "spectral") and args.gamma_init == "one"
    if args.init_std is None and args.init == "stock" and starts_at_one:
        args.init_std = init_std


def norm_first(chosen: Options, side: str) -> bool:
    """Whether a block begins with its norm, and the last one is followed by another: what fairseq calls normalize_before."""
    encoder, decoder = build_residuals(chosen, 1, 1)  # their place is the same for any number of layers
    return chosen.norm != "none" and (encoder if side == "encoder" else decoder).norm_first


def set_normalize_before(args, side: str) -> None:
    """fairseq's flag of the encoder or decoder as ours say. Raises ValueError where it was given and says otherwise."""
    name, before = f"{side}_normalize_before", norm_first(options_of(args), side)
    if getattr(args, name, before) and not before:
        other = "norm none" if args.norm == "none" else f"residual {args.residual}"
        raise ValueError(f"--{name.replace('_', '-')} contradicts --{other}; use --residual pre-ln")
    setattr(args, name, before)


def change_norm(module: nn.Module, name: str, width: int, chosen: Options) -> None:
    """Puts another norm in the place of fairseq's LayerNorm, if there is one; "layernorm" leaves it."""
    if getattr(module, name, None) is not None and chosen.norm != "layernorm":
        setattr(module, name, build_norm(width, chosen))


class _Block:
    """What the encoder's and the decoder's layers have in common."""

    alpha = 1.0

    def stabilise(self, config: BlockConfig, residual: Residual, positions: int, memory: int = 0) -> None:
        """Makes fairseq's layer what the flags say. `positions` and `memory` are the most tokens of its own and the encoder's.

        The weights are reparametrised last: what is written into a reparametrised weight is lost.
        """
        chosen = config.options
        self.alpha = 1.0 if residual.norm_first else residual.alpha
        for name in NORMS:
            change_norm(self, name, self.embed_dim, chosen)
        attentions = [self.self_attn]
        change_attention(self.self_attn, chosen, positions)
        if getattr(self, "encoder_attn", None) is not None:
            attentions.append(self.encoder_attn)
            change_attention(self.encoder_attn, chosen, memory)
        if config.init_std is not None:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=config.init_std)
        init_(self, chosen)
        scale_branches_(self, residual.beta)
        reparametrise(self, chosen)
        for attention in attentions:
            if getattr(attention, "tied", False):  # DistributedDataParallel would wait for gradients, which do not come
                attention.k_proj.requires_grad_(False)

    def residual_connection(self, x: Tensor, residual: Tensor) -> Tensor:
        return x.add(residual, alpha=self.alpha)

    def make_generation_fast_(self, **kwargs) -> None:
        if any(map(is_reparametrised, self.modules())):
            fold(self)


class EncoderLayer(_Block, TransformerEncoderLayerBase):
    pass


class DecoderLayer(_Block, TransformerDecoderLayerBase):
    def make_generation_fast_(self, **kwargs) -> None:
        super().make_generation_fast_()
        TransformerDecoderLayerBase.make_generation_fast_(self, **kwargs)


def _finish(layer: _Block, cfg) -> nn.Module:
    """As fairseq's own build_encoder_layer and build_decoder_layer end."""
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)


class Encoder(TransformerEncoderBase):
    def __init__(self, cfg, dictionary, embed_tokens) -> None:
        super().__init__(cfg, dictionary, embed_tokens)
        change_norm(self, "layer_norm", cfg.encoder.embed_dim, cfg.blocks.options)

    def build_encoder_layer(self, cfg):
        layer = EncoderLayer(cfg, return_fc=self.return_fc)
        layer.stabilise(cfg.blocks, cfg.blocks.residuals[0], cfg.max_source_positions)
        return _finish(layer, cfg)


class Decoder(TransformerDecoderBase):
    def __init__(self, cfg, dictionary, embed_tokens, no_encoder_attn: bool = False) -> None:
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn)
        change_norm(self, "layer_norm", cfg.decoder.embed_dim, cfg.blocks.options)

    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        layer = DecoderLayer(cfg, no_encoder_attn)
        layer.stabilise(cfg.blocks, cfg.blocks.residuals[1], cfg.max_target_positions, cfg.max_source_positions)
        return _finish(layer, cfg)
