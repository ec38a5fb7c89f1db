"""Transformer layers, encoder and decoder with a choice of residual connection and weight reparametrisation."""

from dataclasses import dataclass

from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stable_core import SigmaReparamConfig, deepnorm_scales, fold, sigma_reparam

RESIDUALS = ("pre-ln", "post-ln", "deepnorm", "none")
REPARAMS = ("none", "sigma", "spectral", "weight")


@dataclass(frozen=True)
class BlockConfig:
    """How every block of a model is built; the model's command-line flags, checked.

    init_std is the standard deviation of the truncated normal for the weights of the blocks, None is fairseq's own.
    """

    residual: str
    reparam: SigmaReparamConfig | None
    init_std: float | None

    @classmethod
    def from_args(cls, args) -> "BlockConfig":
        """Raises ValueError naming the flag, its value and what is allowed."""
        for flag, allowed in (("residual", RESIDUALS), ("reparam", REPARAMS)):
            if getattr(args, flag) not in allowed:
                raise ValueError(f"--{flag} {getattr(args, flag)}: allowed are {', '.join(allowed)}")
        if args.init_std is not None and not args.init_std > 0:
            raise ValueError(f"--init-std {args.init_std}: allowed are positive numbers")
        reparam = None
        if args.reparam != "none":
            fields = ("gamma_init", "qkv", "n_power_iterations", "stop_gradient")
            reparam = SigmaReparamConfig(kind=args.reparam, **{field: getattr(args, field) for field in fields})
        return cls(args.residual, reparam, args.init_std)


class _Block:
    """What the encoder's and the decoder's layers have in common."""

    alpha = 1.0

    def stabilise(self, config: BlockConfig, alpha: float, beta: float) -> None:
        """Initialises the weights, scales v, output and feed-forward ones by beta, and only then reparametrises them."""
        self.alpha = alpha
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
    alpha = beta = 1.0
    if cfg.blocks.residual == "deepnorm":
        alpha, beta = getattr(deepnorm_scales(cfg.encoder.layers, cfg.decoder.layers), side)
    layer.stabilise(cfg.blocks, alpha, beta)
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
