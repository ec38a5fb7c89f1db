"""Configuration fields that the models share, checked."""

import difflib
import warnings
from collections.abc import Iterable
from dataclasses import fields, make_dataclass

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig

from stable_core.options import OPTIONS, renamed
from stable_core.options import check as check_options
from stable_core.registry import SLOTS, WrongOption
from stable_core.z_loss import check_coefficient


def check(config: PreTrainedConfig, field: str, allowed: Iterable) -> None:
    """Raises ValueError naming the field, its value and what is allowed."""
    if getattr(config, field) not in allowed:
        raise ValueError(f"{field} = {getattr(config, field)!r}: allowed are {', '.join(map(repr, allowed))}")


def check_positive(config: PreTrainedConfig, *fields: str) -> None:
    """The same for fields that are positive numbers; None, where a field may be left out, is one."""
    for field in fields:
        if (value := getattr(config, field)) is not None and not value > 0:
            raise ValueError(f"{field} = {value!r}: allowed are positive numbers")


NORMAL = 0.02  # GPT-2's and ViT's standard deviation, at any width


# What transformers lets a configuration hold beside its fields, and acts on.
BESIDE_FIELDS = (
    "attn_implementation", "experts_implementation", "output_attentions", "torch_dtype", "name_or_path", "is_causal",
    "auto_map", "quantization_config", "custom_pipelines", "tokenizer_class", "loss_type",
)  # fmt: skip

_TRANSFORMERS_FIELDS = [field.name for field in fields(PreTrainedConfig)]

# The fields of `Options`, in a class that need not be frozen as it is. JSON may hold 1 where 1.0 is meant.
Methods = make_dataclass(
    "Methods",
    [(option.name, float | int if option.type is float else option.type, option.default) for option in OPTIONS],
    init=False,
    repr=False,
    eq=False,
    kw_only=True,
)


@strict
class StableConfig(Methods, PreTrainedConfig):
    r"""
    The fields of `stable_core.options.Options`, with its defaults, and what else every model has.

    Attributes:
        initializer_range: standard deviation of embeddings, and of what else each model says.
        norm_eps: of every norm.
        qk_norm_eps: of those of queries and keys, norm_eps if left out.
        z_loss: coefficient of `add_z_loss` in models that compute a loss; 0 is none.
    """

    initializer_range: float | None = None
    norm_eps: float = 1e-5
    qk_norm_eps: float | None = None
    z_loss: float | int = 0.0

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
        drops those that it does not know. What a version of this library before wrote is read in today's words.
        """
        config_dict = renamed(config_dict)
        foreign = {name: value for name, value in config_dict.items() if not cls.knows(name)}
        dropped = (
            () if kwargs.get("return_unused_kwargs") else kwargs
        )  # else the model's constructor gets and refuses them
        for name in (*foreign, *dropped):
            if not cls.knows(name) and (meant := cls.meant_by(name, cutoff=0.75)):
                warnings.warn(f"{cls.__name__} has no {name}, which changes nothing{meant}", stacklevel=2)
        try:
            loaded = super().from_dict({name: config_dict[name] for name in config_dict.keys() - foreign}, **kwargs)
        except WrongOption as error:
            if error.name not in SLOTS:
                raise
            hint = "import the module that registers another one before the model is loaded"
            raise WrongOption(error.name, error.value, f"{error.allowed}; {hint}") from None
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
        check_options(self)
        check_positive(self, "norm_eps", "qk_norm_eps", "initializer_range")
        check_coefficient(self.z_loss, "z_loss")
