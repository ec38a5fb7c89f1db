"""σReparam on any transformers model, which `save_pretrained` and `from_pretrained` then keep.

config.json says how the model was reparametrised, under `quantization_config`: that is the one place where transformers lets
a package change a model between building its skeleton and loading its weights. Nothing is quantized, and once loaded the
model is not treated as if: it trains, moves and casts as any other.
"""

import copy
from dataclasses import asdict, fields

from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import stable_core
from stable_core import SigmaReparamConfig
from stable_core.targets import FilterFn, layers

METHOD = "sigma_reparam"


def sigma_reparam(
    model: PreTrainedModel, config: SigmaReparamConfig | None = None, filter_fn: FilterFn | None = None
) -> PreTrainedModel:
    """`stable_core.sigma_reparam`, after which the usual calls save the model and load it, in place; returns the model.

    `model.save_pretrained(folder)`, and in a process that has imported hf_stable `AutoModelForX.from_pretrained(folder)` or
    the class's own, give every parameter and buffer back bitwise; so does a Trainer's checkpoint. A process that has not
    imported it only warns ("Unknown quantization type, got sigma_reparam") and draws those weights at random: serve `fold`.

    By default every Linear, Conv1d, Conv2d and transformers' Conv1D that is not tied is taken, with heads (classifier, pooler,
    an untied lm_head), patch embeddings, feature extractors, and MoE routers that are a Linear; experts packed in one tensor,
    and T5's relative bias, an embedding, are not. filter_fn leaves out what should stay plain, as a head that another task
    will replace. wav2vec2 and its kin need one, `lambda module, name: "pos_conv" not in name`: that layer has a weight norm
    of its own.

    `model.config` becomes a copy: the one given may be another model's too.

    Args:
        model: the whole model; for a part of it, give filter_fn, so that the record is where `save_pretrained` looks for it.
        config, filter_fn: as for `stable_core.sigma_reparam`. With `SigmaReparamConfig(gamma_init="spectral")` a
            pretrained model keeps its function.

    Raises:
        ValueError: as `stable_core.sigma_reparam`, or the model is quantized, reparametrised already, or not of transformers.
    """
    if not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__}: not a model of transformers; stable_core.sigma_reparam takes any")
    recorded = getattr(model.config, "quantization_config", None)
    if recorded is not None:
        method = dict(recorded)["quant_method"]
        raise ValueError(
            f"{type(model).__name__}: its config has quant_method = {method!r}; fold or dequantize it first, allowed is none"
        )
    config = config or SigmaReparamConfig()
    before = _parametrized(model)
    stable_core.sigma_reparam(model, config, filter_fn)
    picked = [name for name in _parametrized(model) if name not in before]
    _give_own_config(model)
    _record(model, SigmaReparamRecord(picked, config))
    return model


def fold(model: PreTrainedModel) -> PreTrainedModel:
    """`stable_core.fold`: plain layers with the same outputs, in place; what is saved then needs transformers alone.

    It takes the whole model, not a part: the config says whether it is reparametrised. That becomes a copy.

    Raises:
        ValueError: as `stable_core.fold`.
    """
    stable_core.fold(model)
    _give_own_config(model)
    _record(model, None)
    if hasattr(model.config, "reparam"):  # this plugin's models say it there
        model.config.reparam = "none"
    return model


@register_quantization_config(METHOD)
class SigmaReparamRecord(QuantizationConfigMixin):
    """What config.json holds: quant_method, the fields of `SigmaReparamConfig`, and the reparametrised layers' names."""

    def __init__(self, layers: list[str], config: SigmaReparamConfig) -> None:
        self.quant_method, self.layers, self.config = METHOD, layers, config

    @classmethod
    def from_dict(cls, config_dict: dict) -> "SigmaReparamRecord":
        """Raises ValueError for a value that no `SigmaReparamConfig` has, say of an edited config.json."""
        settings = {key: value for key, value in config_dict.items() if key not in ("quant_method", "layers")}
        allowed = [field.name for field in fields(SigmaReparamConfig) if field.name != "kernels"]
        for name in settings:
            if name not in allowed:
                raise ValueError(f"quantization_config: {name} is no setting; allowed are layers, {', '.join(allowed)}")
        names = config_dict.get("layers")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"quantization_config: layers = {names!r}: allowed is a list of the names of layers")
        return cls(names, SigmaReparamConfig(**settings))

    def to_dict(self) -> dict:
        settings = asdict(self.config)
        del settings["kernels"]  # the machine's affair, not the model's
        return {"quant_method": METHOD, **settings, "layers": self.layers}


@register_quantizer(METHOD)
class SigmaReparamLoader(HfQuantizer):
    """Reparametrises the skeleton that `from_pretrained` loads a checkpoint into."""

    is_trainable = True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, device_map=None, **kwargs) -> None:
        """Raises ValueError where weights would be offloaded: accelerate brings back one module's, and W_hat is of several."""
        devices = set(device_map.values()) if isinstance(device_map, dict) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            places = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"device_map offloads, to {places}: allowed with {METHOD} are GPUs, or the CPU alone; or fold first"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        record = self.quantization_config
        record.layers = _names_in(model, record.layers)
        stable_core.sigma_reparam(model, record.config, lambda _, name: name in record.layers)
        for name in record.layers:
            # else transformers computes W_hat, to draw random values into what is then thrown away
            model.get_submodule(name)._is_hf_initialized = True

    def postprocess_model(self, model: PreTrainedModel, **kwargs) -> None:
        """Not super's: that marks the model as quantized, which Trainer, `.half()` and some attention code refuse.

        Raises:
            ValueError: the checkpoint lacks a tensor that its config.json promises.
        """
        self.remove_quantization_config(model)
        _record(model, self.quantization_config)
        for name in self.quantization_config.layers:
            layer = model.get_submodule(name)
            for tensor_name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
                if not getattr(tensor, "_is_hf_initialized", False):  # transformers' mark of a loaded tensor
                    raise ValueError(
                        f"{name}.{tensor_name}: not in the checkpoint, or in another shape, though config.json says"
                        f" {METHOD}; load weights that were saved with it, or take quantization_config out of config.json"
                    )
                if tensor.device.type == "cpu":  # at an odd place in the mapped file, where sigma rounds otherwise
                    tensor.data = tensor.data.clone()


def _names_in(model: PreTrainedModel, recorded: list[str]) -> list[str]:
    """The recorded layers as this model names them: one with a head may have been saved, and its base model be loaded.

    Raises:
        ValueError: the class that was saved has no such layer. In another class it is left out, as its weight would be.
    """
    known, prefix = {target.module_name for target in layers(model)}, f"{model.base_model_prefix}."
    names = []
    for name in recorded:
        found = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in known), None)
        if found is not None:
            names.append(found)
        elif type(model).__name__ in (model.config.architectures or ()):
            raise ValueError(
                f"quantization_config: {name} is no Linear, Conv or attention layer of this {type(model).__name__};"
                f" allowed are {', '.join(sorted(known)[:3])}, ..."
            )
    return names


def _parametrized(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if parametrize.is_parametrized(module)]


def _give_own_config(model: PreTrainedModel) -> None:
    """A copy, for the model and the parts that have the same: another model may have it too."""
    shared, model.config = model.config, copy.copy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = model.config


def _record(model: PreTrainedModel, record: SigmaReparamRecord | None) -> None:
    """A dictionary, as a config.json that was read has it. Submodels, whose configs may be copies, have none."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("quantization_config", None)
    if record is not None:
        model.config.quantization_config = record.to_dict()
