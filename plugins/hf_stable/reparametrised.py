"""σReparam on any transformers model, which `save_pretrained` and `from_pretrained` then keep.

config.json says how the model is reparametrised when it is saved, under `quantization_config`: that is the one place where
transformers lets a package change a model between building its skeleton and loading its weights. Nothing is quantized, and
once loaded the model is not treated as if: it trains, moves and casts as any other. With the record goes a note (note.py)
that stops transformers where this library is not imported.
"""

from dataclasses import asdict, fields
from functools import wraps

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import stable_core
from stable_core import SigmaReparamConfig
from stable_core.folding import is_reparametrised
from stable_core.targets import FilterFn, layers

from .adapters import watch_adapters, watch_adapters_of
from .modeling_stable import StablePreTrainedModel, built_reparametrised, own_config
from .note import METHOD, leave_notes


def sigma_reparam(
    model: PreTrainedModel, config: SigmaReparamConfig | None = None, filter_fn: FilterFn | None = None
) -> PreTrainedModel:
    """`stable_core.sigma_reparam`, after which the usual calls save the model and load it, in place; returns the model.

    `model.save_pretrained(folder)`, and in a process that has imported hf_stable `AutoModelForX.from_pretrained(folder)` or
    the class's own, give every parameter and buffer back bitwise; so does a Trainer's checkpoint. What is written is the
    model as it is then, whatever was resized, replaced or folded since, and by `stable_core.sigma_reparam` too. In a process
    that has not imported hf_stable, from_pretrained raises a ValueError that says so: serve `fold`.

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
    method = _quant_method(model)
    if method is not None and (method != METHOD or _groups(model)):
        raise ValueError(
            f"{type(model).__name__}: its config has quant_method = {method!r}; fold or dequantize it first, allowed is none"
        )
    stable_core.sigma_reparam(model, config, filter_fn)
    watch_adapters_of(model)
    record(model)
    return model


def fold(model: PreTrainedModel) -> PreTrainedModel:
    """`stable_core.fold`: plain layers with the same outputs, in place; what is saved then needs transformers alone.

    It takes the whole model, not a part: the config says whether it is reparametrised. That becomes a copy.

    Raises:
        ValueError: as `stable_core.fold`.
    """
    stable_core.fold(model)
    record(model)
    if hasattr(model.config, "reparam"):  # this plugin's models say it there
        own_config(model).reparam = "none"
    return model


def record(model: PreTrainedModel) -> None:
    """Writes into the model's config, which becomes a copy, which of its layers are reparametrised, and how.

    Those of this plugin's own models that `config.reparam` speaks of are left out.

    Raises:
        ValueError: a layer has another parametrization on top of σReparam, or has lost one that it shares its sigma with.
    """
    groups, method = _groups(model), _quant_method(model)
    if method not in (None, METHOD) or (method is None and not groups):
        return
    own_config(model)
    _put(model, SigmaReparamRecord(groups) if groups else None)


def save_what_it_is(save_pretrained):
    """Decorates `PreTrainedModel.save_pretrained`, which every class of transformers ends in."""

    @wraps(save_pretrained)
    def save(self, *args, **kwargs):
        if not getattr(self, "_hf_peft_config_loaded", False):  # else transformers saves the adapter alone
            record(self)
        return save_pretrained(self, *args, **kwargs)

    return save


PreTrainedModel.save_pretrained = save_what_it_is(PreTrainedModel.save_pretrained)
leave_notes()
watch_adapters()


@register_quantization_config(METHOD)
class SigmaReparamRecord(QuantizationConfigMixin):
    """What config.json holds: quant_method, the fields of `SigmaReparamConfig`, and the names of the layers that have them.

    Layers with other settings follow under `further`, each with its own.
    """

    def __init__(self, groups: dict[SigmaReparamConfig, list[str]]) -> None:
        self.quant_method, self.groups = METHOD, groups

    @property
    def layers(self) -> list[str]:
        return [name for names in self.groups.values() for name in names]

    @classmethod
    def from_dict(cls, config_dict: dict) -> "SigmaReparamRecord":
        """Raises ValueError for a value that no `SigmaReparamConfig` has, say of an edited config.json."""
        allowed = [field.name for field in fields(SigmaReparamConfig) if field.name != "kernels"]
        first = {key: value for key, value in config_dict.items() if key not in ("quant_method", "further")}
        groups: dict[SigmaReparamConfig, list[str]] = {}
        for group in (first, *config_dict.get("further", ())):
            for name in group:
                if name not in (*allowed, "layers"):
                    raise ValueError(
                        f"quantization_config: {name} is no setting; allowed are layers, {', '.join(allowed)}"
                    )
            names = group.get("layers")
            if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"quantization_config: layers = {names!r}: allowed is a list of the names of layers")
            config = SigmaReparamConfig(**{name: value for name, value in group.items() if name != "layers"})
            groups.setdefault(config, []).extend(names)
        return cls(groups)

    def to_dict(self) -> dict:
        groups = [{**asdict(config), "layers": names} for config, names in self.groups.items()]
        for group in groups:
            del group["kernels"]  # the machine's affair, not the model's
        first, *further = groups
        return {"quant_method": METHOD, **first, **({"further": further} if further else {})}


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
        groups = {config: _names_in(model, names) for config, names in self.quantization_config.groups.items()}
        self.quantization_config.groups = {config: names for config, names in groups.items() if names}
        for config, names in self.quantization_config.groups.items():
            stable_core.sigma_reparam(model, config, lambda _, name, names=names: name in names)
        for ignored in ("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing"):
            ours = set(getattr(StablePreTrainedModel, ignored))
            setattr(model, ignored, ours.union(getattr(model, ignored) or ()))
        for name in self.quantization_config.layers:
            # else transformers computes W_hat, to draw random values into what is then thrown away
            model.get_submodule(name)._is_hf_initialized = True

    def postprocess_model(self, model: PreTrainedModel, **kwargs) -> None:
        """Not super's: that marks the model as quantized, which Trainer, `.half()` and some attention code refuse.

        Raises:
            ValueError: the checkpoint lacks a tensor that its config.json promises.
        """
        self.remove_quantization_config(model)
        _put(model, self.quantization_config if self.quantization_config.groups else None)
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


def _groups(model: PreTrainedModel) -> dict[SigmaReparamConfig, list[str]]:
    """The reparametrised layers by their settings, as they are now, without those that `config.reparam` speaks of."""
    built, found = set(built_reparametrised(model)), {}
    if not built and getattr(model.config, "reparam", "none") != "none":
        return {}  # its source, from before layers were listed, says it all
    chains = {id(chain) for layer in model.modules() for chain in getattr(layer, "parametrizations", {}).values()}
    for name, layer in model.named_modules():
        if name in built or not is_reparametrised(layer):
            continue
        for tensor, chain in layer.parametrizations.items():
            if len(chain) > 1:
                raise ValueError(
                    f"{name}.{tensor}: another parametrization lies on top of σReparam; remove that one first"
                )
            config = _settings(chain[0])
            if not all(id(member) in chains for member in (chain[0].members() if config.kind != "weight" else ())):
                raise ValueError(
                    f"{name}.{tensor}: it shares its sigma with a layer that the model has no longer; fold it"
                )
        found.setdefault(config, []).append(name)
    return found


def _settings(parametrization: nn.Module) -> SigmaReparamConfig:
    """Of a layer's parametrization, which may have its class from a model's own copy of the source."""
    if not hasattr(parametrization, "leader"):
        return SigmaReparamConfig(kind="weight")
    return SigmaReparamConfig(**asdict(parametrization.leader().config))


def _quant_method(model: PreTrainedModel) -> str | None:
    recorded = getattr(model.config, "quantization_config", None)
    return None if recorded is None else dict(recorded)["quant_method"]


def _put(model: PreTrainedModel, record: SigmaReparamRecord | None) -> None:
    """A dictionary, as a config.json that was read has it. Submodels, whose configs may be copies, have none."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("quantization_config", None)
    if record is not None:
        model.config.quantization_config = record.to_dict()
