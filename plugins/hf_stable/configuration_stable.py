"""Configuration fields that the models share, checked."""

import difflib
import warnings
from collections.abc import Iterable
from dataclasses import fields

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig

from stable_core.sigma_reparam import SigmaReparamConfig


def check(config: PreTrainedConfig, field: str, allowed: Iterable) -> None:
    """Raises ValueError naming the field, its value and what is allowed."""
    if getattr(config, field) not in allowed:
        raise ValueError(f"{field} = {getattr(config, field)!r}: allowed are {', '.join(map(repr, allowed))}")


def check_positive(config: PreTrainedConfig, *fields: str) -> None:
    """The same for fields that are positive numbers."""
    for field in fields:
        if not getattr(config, field) > 0:
            raise ValueError(f"{field} = {getattr(config, field)!r}: allowed are positive numbers")


NORMAL = 0.02  # GPT-2's and ViT's standard deviation, at any width


# What transformers lets a configuration hold beside its fields, and acts on.
BESIDE_FIELDS = (
    "attn_implementation", "experts_implementation", "output_attentions", "torch_dtype", "name_or_path", "is_causal",
    "auto_map", "quantization_config", "custom_pipelines", "tokenizer_class", "loss_type",
)  # fmt: skip

_TRANSFORMERS_FIELDS = [field.name for field in fields(PreTrainedConfig)]


@strict
class ReparamConfig(PreTrainedConfig):
    r"""
    σReparam's fields.

    Attributes:
        reparam: "none"; "sigma", σReparam; its baselines "spectral" (gamma = 1, not learned) and "weight".
        gamma_init, qkv, n_power_iterations, stop_gradient: as for `stable_core.SigmaReparamConfig`.
    """

    reparam: str = "none"
    gamma_init: str = "one"
    qkv: str = "separate"
    n_power_iterations: int = 1
    stop_gradient: bool = False

    def __post_init__(self, **kwargs):
        for name in kwargs:
            if not self.knows(name):
                raise ValueError(
                    f"{type(self).__name__} has no {name}{self.meant_by(name) or ': print(config) shows what it has'}"
                )
        super().__post_init__(**kwargs)
        self.check_settings()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """transformers', of a config.json: fields that only another version of transformers knows stay in it unread.

        One that is spelt almost as a setting is warned of, also among the keywords of `AutoConfig.from_pretrained`, which
        drops those that it does not know.
        """
        foreign = {name: value for name, value in config_dict.items() if not cls.knows(name)}
        dropped = (
            () if kwargs.get("return_unused_kwargs") else kwargs
        )  # else the model's constructor gets and refuses them
        for name in (*foreign, *dropped):
            if not cls.knows(name) and (meant := cls.meant_by(name, cutoff=0.75)):
                warnings.warn(f"{cls.__name__} has no {name}, which changes nothing{meant}", stacklevel=2)
        loaded = super().from_dict({name: config_dict[name] for name in config_dict.keys() - foreign}, **kwargs)
        for name, value in foreign.items():
            setattr(loaded[0] if isinstance(loaded, tuple) else loaded, name, value)
        return loaded

    @classmethod
    def knows(cls, name: str) -> bool:
        """Whether it is a setting, another name of one, or transformers' own: settings for generation among them."""
        generation = GenerationConfig._get_default_generation_params()
        return hasattr(cls, name) or name.startswith("_") or name in {*cls.attribute_map, *BESIDE_FIELDS, *generation}

    @classmethod
    def meant_by(cls, name: str, cutoff: float = 0.6) -> str:
        """A question after the setting that is spelt most like `name`, if any is."""
        settings = ({field.name for field in fields(cls)} | {*cls.attribute_map}).difference(_TRANSFORMERS_FIELDS)
        close = difflib.get_close_matches(name, settings, n=1, cutoff=cutoff)
        return f": did you mean {close[0]}?" if close else ""

    def check_settings(self) -> None:
        """Raises ValueError for the first field with a wrong value."""
        check(self, "reparam", ("none", "sigma", "spectral", "weight"))
        self.sigma_reparam_config()

    def sigma_reparam_config(self) -> SigmaReparamConfig | None:
        """The settings for the core's `sigma_reparam`; raises ValueError for those that it refuses."""
        fields = ("gamma_init", "qkv", "n_power_iterations", "stop_gradient")
        settings = {field: getattr(self, field) for field in fields}
        if self.reparam == "none":
            SigmaReparamConfig(**settings)
            return None
        return SigmaReparamConfig(kind=self.reparam, **settings)


@strict
class StableConfig(ReparamConfig):
    r"""
    Stable-Transformer's fields.

    Attributes:
        norm: "stable" (StableNorm), "layernorm", "rmsnorm", or "none", which is for σReparam.
        alpha: of StableNorm, in the blocks and in StableAtten, from 0 to 1/2.
        attention: "stable" (StableAtten), "dot", "qknorm", "l2" or "l2_tied".
        tau_scale: multiple of StableAtten's tau.
        init: of Linear and Conv layers, "stable" (StableInit), "normal" (N(0, initializer_range^2)) or "xavier".
        initializer_range: standard deviation of embeddings, and of init = "normal". Left out it is 0.02, and in reparametrised
            layers the paper's at its sizes and what has its spectral norm at others (`stable_core.init_std`).
        norm_eps: of every norm.
    """

    norm: str = "stable"
    alpha: float | int = 0.475
    attention: str = "stable"
    tau_scale: float | int = 1.0
    init: str = "stable"
    initializer_range: float | None = None
    norm_eps: float = 1e-5

    def check_settings(self) -> None:
        super().check_settings()
        check(self, "norm", ("stable", "layernorm", "rmsnorm", "none"))
        check(self, "attention", ("stable", "dot", "qknorm", "l2", "l2_tied"))
        check(self, "init", ("stable", "normal", "xavier"))
        check_positive(
            self, "tau_scale", "norm_eps", *(["initializer_range"] if self.initializer_range is not None else [])
        )
        if not 0 <= self.alpha <= 0.5:
            raise ValueError(f"alpha = {self.alpha!r}: allowed are numbers from 0 to 0.5")
