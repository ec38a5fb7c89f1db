"""The translation model and its archs: post-LN, pre-LN and DeepNorm transformers, with and without σReparam [σ, App. F]."""

from argparse import Namespace

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerModel, base_architecture
from omegaconf import OmegaConf

from .blocks import BlockConfig, Decoder, Encoder, add_flags, set_defaults, set_normalize_before
from .checkpoints import fitted

DEPTHS = (6, 18, 50, 100)
FAMILIES = {  # arch name: residual, reparam
    "sigma_transformer_{}l": ("deepnorm", "sigma"),
    "sigma_postln_transformer_{}l": ("post-ln", "sigma"),
    "deepnorm_transformer_{}l": ("deepnorm", "none"),
    "postln_transformer_{}l": ("post-ln", "none"),
    "preln_transformer_{}l": ("pre-ln", "none"),
}


@register_model("sigma_transformer")
class SigmaTransformerModel(TransformerModel):
    """fairseq's transformer with a choice of norm, attention, residual, initialisation and reparametrisation of its blocks.

    Every linear layer of the encoder's and decoder's blocks is reparametrised; embeddings and output projection are not.
    """

    @staticmethod
    def add_args(parser):
        TransformerModel.add_args(parser)
        add_flags(parser, init_std="0.1 where gamma starts at 1, fairseq's own otherwise")

    @classmethod
    def build_model(cls, args, task):
        if OmegaConf.is_config(args):  # from fairseq-hydra-train, whose nodes TransformerConfig reads only in part
            args = Namespace(**OmegaConf.to_container(args))
        sigma_transformer(args)
        blocks = BlockConfig.from_args(args, (args.encoder_layers, args.decoder_layers))
        # On a copy: fairseq writes args into checkpoints, where only plain values can be loaded safely.
        return super().build_model(Namespace(**vars(args), blocks=blocks), task)

    @classmethod
    def build_encoder(cls, cfg, src_dict, embed_tokens):
        return Encoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg, tgt_dict, embed_tokens):
        return Decoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)

    def load_state_dict(self, state_dict, strict=True, model_cfg=None, args=None):
        pruned = any(getattr(model_cfg, f"{side}_layers_to_keep", None) for side in ("encoder", "decoder"))
        state_dict = fitted(self, state_dict, layers=not pruned)
        return super().load_state_dict(state_dict, strict, model_cfg, args)


def _complete(args, residual: str, reparam: str) -> None:
    """Our flags' defaults, then fairseq's."""
    set_defaults(args, init_std=0.1, residual=residual, reparam=reparam)
    for side in ("encoder", "decoder"):
        set_normalize_before(args, side)
    base_architecture(args)


@register_model_architecture("sigma_transformer", "sigma_transformer")
def sigma_transformer(args):
    """Defaults of the family: DeepNorm and σReparam, as the paper's only stable 100L-100L model."""
    _complete(args, "deepnorm", "sigma")


def _register(name: str, layers: int, residual: str, reparam: str) -> None:
    @register_model_architecture("sigma_transformer", name)
    def arch(args):
        args.encoder_layers = getattr(args, "encoder_layers", layers)
        args.decoder_layers = getattr(args, "decoder_layers", layers)
        _complete(args, residual, reparam)


for family, (residual, reparam) in FAMILIES.items():
    for depth in DEPTHS:
        _register(family.format(depth), depth, residual, reparam)
