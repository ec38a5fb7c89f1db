"""The translation model and its archs: post-LN, pre-LN and DeepNorm transformers, with and without σReparam [σ, App. F]."""

import re
from argparse import Namespace

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerModel, base_architecture
from omegaconf import OmegaConf

from .blocks import REPARAMS, RESIDUALS, BlockConfig, Decoder, Encoder

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
    """fairseq's transformer whose blocks have a chosen residual connection and reparametrised linear layers.

    Every linear layer of the encoder's and decoder's blocks is reparametrised; embeddings and output projection are not.
    """

    @staticmethod
    def add_args(parser):
        TransformerModel.add_args(parser)
        parser.add_argument(
            "--residual", choices=RESIDUALS, help="residual connection and place of LayerNorm; none: no LayerNorm"
        )
        parser.add_argument("--reparam", choices=REPARAMS, help="reparametrisation of every linear layer of the blocks")
        parser.add_argument("--gamma-init", choices=("one", "spectral"), help="initial gamma: 1, or the spectral norm")
        parser.add_argument("--qkv", choices=("separate", "joint", "qk_joint"), help="which of q, k, v share a sigma")
        parser.add_argument("--n-power-iterations", type=int, metavar="N", help="power iterations per update")
        parser.add_argument("--stop-gradient", action="store_true", help="no gradient through sigma")
        parser.add_argument("--init-std", type=float, metavar="STD", help="truncated normal for the blocks' weights; "
                            "default: 0.1 with sigma and spectral, fairseq's own otherwise")  # fmt: skip

    @classmethod
    def build_model(cls, args, task):
        if OmegaConf.is_config(args):  # from fairseq-hydra-train, whose nodes TransformerConfig reads only in part
            args = Namespace(**OmegaConf.to_container(args))
        sigma_transformer(args)
        # On a copy: fairseq writes args into checkpoints, where only plain values can be loaded safely.
        return super().build_model(Namespace(**vars(args), blocks=BlockConfig.from_args(args)), task)

    @classmethod
    def build_encoder(cls, cfg, src_dict, embed_tokens):
        return Encoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg, tgt_dict, embed_tokens):
        return Decoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)

    def load_state_dict(self, state_dict, strict=True, model_cfg=None, args=None):
        if model_cfg is None or not any(
            getattr(model_cfg, f"{x}_layers_to_keep", None) for x in ("encoder", "decoder")
        ):
            _check_fits(self.state_dict(), state_dict)
        return super().load_state_dict(state_dict, strict, model_cfg, args)


@register_model_architecture("sigma_transformer", "sigma_transformer")
def sigma_transformer(args):
    """Defaults of the family: DeepNorm and σReparam, as the paper's only stable 100L-100L model."""
    defaults = {"residual": "deepnorm", "reparam": "sigma", "gamma_init": "one", "qkv": "separate",
                "n_power_iterations": 1, "stop_gradient": False, "init_std": None}  # fmt: skip
    if getattr(args, "reparam", None) in (None, "sigma", "spectral"):
        defaults["init_std"] = 0.1
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    for side in ("encoder", "decoder"):
        name, before = f"{side}_normalize_before", args.residual == "pre-ln"
        if getattr(args, name, before) and not before:
            raise ValueError(
                f"--{name.replace('_', '-')} contradicts --residual {args.residual}; use --residual pre-ln"
            )
        setattr(args, name, before)
    base_architecture(args)


def _register(name: str, layers: int, residual: str, reparam: str) -> None:
    @register_model_architecture("sigma_transformer", name)
    def arch(args):
        args.encoder_layers = getattr(args, "encoder_layers", layers)
        args.decoder_layers = getattr(args, "decoder_layers", layers)
        args.residual = getattr(args, "residual", None) or residual
        args.reparam = getattr(args, "reparam", None) or reparam
        sigma_transformer(args)


for family, (residual, reparam) in FAMILIES.items():
    for depth in DEPTHS:
        _register(family.format(depth), depth, residual, reparam)


def _check_fits(own: dict, loaded: dict) -> None:
    """One line for a checkpoint of another arch, where torch would list every key of every layer."""
    loaded_sigma = any("parametrizations." in key for key in loaded)
    own_sigma = any("parametrizations." in key for key in own)
    if own_sigma and not loaded_sigma:
        raise ValueError("the checkpoint holds plain weights and the model is reparametrised: use --reparam none")
    if loaded_sigma and not own_sigma:
        raise ValueError(
            "the checkpoint is reparametrised and the model is not: use the --reparam it was trained with, "
            "or fold it with python -m fairseq_sigma.export"
        )
    for side in ("encoder", "decoder"):
        mine, theirs = (
            {m[1] for key in keys if (m := re.match(rf"{side}\.layers\.(\d+)\.", key))} for keys in (own, loaded)
        )
        if len(mine) != len(theirs):
            raise ValueError(
                f"the checkpoint has {len(theirs)} {side} layers and the model {len(mine)}: use --arch ..._{len(theirs)}l"
            )
    for key in own.keys() & loaded.keys():
        if own[key].shape != loaded[key].shape:
            raise ValueError(
                f"{key}: the checkpoint has shape {tuple(loaded[key].shape)}, the model {tuple(own[key].shape)}"
            )
