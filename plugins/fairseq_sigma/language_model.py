"""The language model and its archs: fairseq's adaptive-input transformer with σReparam instead of LayerNorm [σ, App. G]."""

from argparse import Namespace

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture, transformer_lm_baevski_wiki103
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from omegaconf import OmegaConf, open_dict

from .blocks import BlockConfig, DecoderLayer, add_flags, change_norm, set_defaults, set_normalize_before
from .checkpoints import fitted

FAMILIES = {  # arch name: norm, residual, reparam
    "sigma_transformer_lm_wiki103": ("none", "pre-ln", "sigma"),
    "postln_transformer_lm_wiki103": ("layernorm", "post-ln", "none"),
    "preln_transformer_lm_wiki103": ("layernorm", "pre-ln", "none"),
}


@register_model("sigma_transformer_lm")
class SigmaTransformerLanguageModel(TransformerLanguageModel):
    """fairseq's transformer_lm with a choice of norm, attention, residual, initialisation and reparametrisation of its blocks.

    Reparametrised is "all linear layers of the Transformer" [σ, App. G.2], read as those of the blocks, as in translation.
    The projections of adaptive input and softmax stay plain: those of the rarer words are one weight, used transposed at
    the output, which a parametrization of the input's would untie; and scaling the remaining one, of the frequent words,
    would set their embeddings apart from the others'.
    """

    @staticmethod
    def add_args(parser):
        TransformerLanguageModel.add_args(parser)
        add_flags(parser, init_std="fairseq's own")

    @classmethod
    def build_model(cls, args, task):
        if OmegaConf.is_config(args):  # from fairseq-hydra-train, which leaves the task's settings in the task
            with open_dict(args):  # written into checkpoints: an evaluation's blocks must not change StableAtten's tau
                args.tokens_per_sample = args.get("tokens_per_sample") or task.args.tokens_per_sample
            args = Namespace(**OmegaConf.to_container(args))
        sigma_transformer_lm(args)
        config = BlockConfig.from_args(args, (0, args.decoder_layers))
        for name in ("adaptive_input_cutoff", "adaptive_softmax_cutoff"):
            _check_cutoffs(name, getattr(args, name), len(task.target_dictionary))
        model = super().build_model(args, task)
        # Not by iterating over layers, which --decoder-layerdrop does at random.
        for name, layer in model.decoder.layers.named_children():
            if type(layer) is not TransformerDecoderLayerBase:
                raise ValueError(
                    f"decoder.layers.{name} is a {type(layer).__name__}: allowed are plain decoder layers, "
                    "without --base-layers and --ddp-backend fully_sharded"
                )
            # fairseq's build_model names its decoder's class. Ours adds methods only: the weights stay the ones it drew.
            layer.__class__ = DecoderLayer
            layer.stabilise(config, config.residuals[1], model.decoder.max_target_positions)
        change_norm(model.decoder, "layer_norm", model.decoder.embed_dim, config.options)
        return model

    def load_state_dict(self, state_dict, strict=True, model_cfg=None, args=None):
        state_dict = fitted(self, state_dict, layers=not getattr(model_cfg, "decoder_layers_to_keep", None))
        return super().load_state_dict(state_dict, strict, model_cfg, args)


def _check_cutoffs(name: str, text: str | None, words: int) -> None:
    """The bands of adaptive input and softmax end within the vocabulary; fairseq's assertion does not name the values."""
    if text is None:
        return
    parts = text.split(",")
    ends = [int(part) for part in parts if part.isdecimal()]
    if len(ends) < len(parts) or [0, *ends] != sorted({0, *ends}) or ends[-1] > words:
        raise ValueError(
            f"--{name.replace('_', '-')} {text}: allowed are increasing whole numbers, as in 20000,60000, from 1 to {words}, "
            "the size of the vocabulary"
        )


def _complete(args, norm: str, residual: str, reparam: str, fairseq_arch) -> None:
    """Our flags' defaults, then fairseq's; the initialisation is "the default" of "the Transformer baseline" [σ, App. I]."""
    set_defaults(args, init_std=None, norm=norm, residual=residual, reparam=reparam)
    set_normalize_before(args, "decoder")
    before = args.decoder_normalize_before
    fairseq_arch(args)  # makes every language model pre-LN
    args.decoder_normalize_before = before


@register_model_architecture("sigma_transformer_lm", "sigma_transformer_lm")
def sigma_transformer_lm(args):
    """Defaults of the family: σReparam, no LayerNorm, and the sizes of fairseq's transformer_lm."""
    _complete(args, *FAMILIES["sigma_transformer_lm_wiki103"], base_lm_architecture)


def _register(name: str, layers: int, family: tuple[str, str, str]) -> None:
    @register_model_architecture("sigma_transformer_lm", name)
    def arch(args):
        args.decoder_layers = getattr(args, "decoder_layers", layers)
        _complete(args, *family, transformer_lm_baevski_wiki103)


for name, family in FAMILIES.items():
    _register(name, 16, family)  # fairseq's recipe, which the paper names
    _register(f"{name}_32l", 32, family)  # the paper's text
