"""What the models of this plugin share: first weights, σReparam, attention, saving with their source."""

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stable_core.attentions import QueryKey, build_attention
from stable_core.inits import init_
from stable_core.norms import build_norm
from stable_core.options import of
from stable_core.reparams import reparametrise
from stable_core.residuals import Residual, scale_rows_
from stable_core.sigma_layers import is_sigma
from stable_core.targets import layers, rows_beside_qk
from stable_core.unfolding import unfold_state_dict

from .configuration_stable import NORMAL
from .source import methods_of, without_source, write_source
from .z_loss import add_z_loss

log = logging.getLogger(__name__)


class StablePreTrainedModel(PreTrainedModel):
    """Base class. A subclass's constructor calls `reparametrise` on its own layers, and then `post_init`."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    has_loss = False
    _keys_to_ignore_on_load_unexpected = [r"parametrizations\.\w+\.0\.v$"]  # of folders that kept v beside u
    _keys_to_ignore_on_load_missing = [r"parametrizations\.\w+\.0\._extra_state$"]  # of those without layouts

    def __init__(self, config) -> None:
        config.check_settings()  # again: transformers sets what is given beside a folder's name afterwards
        refuse_quantization(config)
        refuse_flash(config)
        super().__init__(config)
        self.reparametrised_layers: list[str] = []  # those that `reparametrise` took

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers looks for a text in the model's own file, where `attend` is not

    def post_init(self) -> None:
        """transformers', and the z-loss of models that compute a loss."""
        super().post_init()
        if self.config.z_loss and self.has_loss:
            add_z_loss(self, self.config.z_loss)

    def mark_branches(self, blocks: nn.ModuleList, residual: Residual) -> None:
        """Lets `draw_` know by how much DeepNorm scales the first weights of a block's layers."""
        for block in blocks:
            for target in layers(block):
                target.module.branch = rows_beside_qk(block, target), residual.beta

    def reparametrise(self, module: nn.Module, **changed) -> None:
        """Reparametrises every Linear and Conv layer of `module` as the configuration says; `changed` are other options."""
        reparametrise(module, replace(of(self.config), **changed))
        inside = {id(layer) for layer in module.modules()}
        self.reparametrised_layers += [name for name in parametrized(self) if id(self.get_submodule(name)) in inside]

    def draw_(self, module: nn.Module, weight: Tensor) -> None:
        """First values for the weight of a Linear or Conv layer, in place, as `config.init` says."""
        if self.config.init == "stock":
            self.draw_stock_(module, weight)
        else:
            init_(weight, self.config)
        if hasattr(module, "branch"):
            scale_rows_(weight, *module.branch)

    def draw_stock_(self, module: nn.Module, weight: Tensor) -> None:
        """The same of init = "stock", before DeepNorm scales it."""
        paper = self.papers_std() if parametrize.is_parametrized(module) else NORMAL
        nn.init.normal_(weight, std=self.config.initializer_range or paper)

    def papers_std(self) -> float:
        """The standard deviation of a reparametrised layer's weight where init = "stock" and no initializer_range is given."""
        raise NotImplementedError

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every parameter and buffer of `module` that no checkpoint filled."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            if parametrize.is_parametrized(module, "weight"):
                self._init_reparametrised(module)
            elif _is_fresh(module.weight):
                self.draw_(module, module.weight)
            if module.bias is not None and _is_fresh(module.bias):
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding) and _is_fresh(module.weight):
            nn.init.normal_(module.weight, std=self.config.initializer_range or NORMAL)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif hasattr(module, "reset_parameters"):  # norms, those of a user's own among them
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if any(map(_is_fresh, own)):
                loaded = [(tensor, tensor.clone()) for tensor in own if not _is_fresh(tensor)]
                module.reset_parameters()
                for tensor, value in loaded:
                    tensor.copy_(value)

    def _init_reparametrised(self, module: nn.Module) -> None:
        chain = module.parametrizations.weight
        if not hasattr(chain, "original"):  # weight norm's length and direction
            if _is_fresh(chain.original0) or _is_fresh(chain.original1):
                self.draw_(module, weight := torch.empty_like(chain.original1))
                module.weight = weight
            return
        if _is_fresh(chain.original):
            self.draw_(module, chain.original)
        state = chain[0]
        if is_sigma(state):  # a joint sigma is kept with the last of its weights
            if any(_is_fresh(tensor) for tensor in (*state.originals(), state.gamma)):
                state.reset()
            elif _is_fresh(state.u):
                state.converge()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For custom code transformers skips modules without parameters of their own, as reparametrised layers are.
        super()._initialize_weights(module)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs) -> Self:
        """transformers'; and plain weights go into a model with reparam = "sigma" and gamma_init = "spectral".

        Raises:
            ValueError: checkpoint or configuration is reparametrised and the other is not, otherwise.
        """
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"{args[0] if args else cls.__name__}: a file of weights is damaged: {error}") from error
        missing, unexpected = (
            {_plain_name(name) for name in info[f"{which}_keys"]} for which in ("missing", "unexpected")
        )
        both, config = missing & unexpected, model.config
        if both and (config.reparam, config.gamma_init) == ("sigma", "spectral"):
            known = {field.name for field in fields(config)}  # which are in the configuration already
            given = {name: value for name, value in kwargs.items() if name not in known}
            given["config"] = copy.copy(config)
            given["config"].reparam = "none"
            plain, info = super().from_pretrained(*args, output_loading_info=True, **given)
            model.load_state_dict(unfold_state_dict(model, plain.state_dict()))
            log.warning(
                "the checkpoint is plain: σReparam starts from its weights, none is new, and keeps its function"
            )
        elif both:
            raise ValueError(
                f"{min(both)}: the checkpoint is {'plain' if config.reparam != 'none' else 'reparametrised'}, and "
                f"reparam = {config.reparam!r}: load it with the configuration it was saved with"
                + (", or with gamma_init = 'spectral', which keeps its function" if config.reparam == "sigma" else "")
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, *args, **kwargs) -> None:
        """transformers'; and the source of the model, so that `trust_remote_code=True` loads it without this library.

        Modules that registered methods of a user's own that it has are part of it.

        Raises:
            ValueError: layers were put in place of reparametrised ones, of which the configuration cannot tell; such a module
                cannot go along; what `write_source` refuses.
        """
        check_reparam(self)
        if is_main_process and not Path(save_directory).is_file():
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **self.config.auto_classes}
            write_source(save_directory, self.config.auto_classes.values(), methods_of(self.config))
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _get_files_timestamps(self, working_dir: str | Path) -> dict[str, float]:
        return without_source(working_dir, super()._get_files_timestamps(working_dir))


def parametrized(model: nn.Module) -> list[str]:
    """The names of the layers with a parametrized weight."""
    return [name for name, layer in model.named_modules() if parametrize.is_parametrized(layer)]


def built_reparametrised(model: nn.Module) -> list[str]:
    """The names of the layers that were built reparametrised, as `config.reparam` says, unless that is "none" by now."""
    if getattr(model.config, "reparam", "none") == "none":
        return []
    parts = [(name, part) for name, part in model.named_modules() if isinstance(part, PreTrainedModel)]
    return [
        f"{name}.{layer}".lstrip(".") for name, part in parts for layer in getattr(part, "reparametrised_layers", ())
    ]


def check_reparam(model: PreTrainedModel) -> None:
    """`config.reparam` becomes "none" where every layer was folded since.

    Raises:
        ValueError: some of the layers that it names were put in the place of reparametrised ones, and are plain.
    """
    now, there = set(parametrized(model)), {name for name, _ in model.named_modules()}
    plain = [name for name in built_reparametrised(model) if name in there and name not in now]
    if plain and now:
        raise ValueError(
            f"{plain[0]} is plain, where reparam = {model.config.reparam!r} has it reparametrised: allowed are "
            "stable_core.sigma_reparam of that layer, and stable_core.fold of the model"
        )
    if plain:
        own_config(model).reparam = "none"


def own_config(model: PreTrainedModel):
    """A copy of the configuration, for the model and the parts that have the same: another model may have it too."""
    shared, model.config = model.config, copy.copy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = model.config
    return model.config


def refuse_quantization(config) -> None:
    """Raises ValueError where `from_pretrained` would quantize layers that are reparametrised."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and config.reparam != "none":
        method = dict(quantization if isinstance(quantization, dict) else quantization.to_dict()).get("quant_method")
        if method != "sigma_reparam":
            raise ValueError(
                f"quantization_config = {getattr(method, 'value', method)!r} of a model with reparam = {config.reparam!r}: "
                "it would quantize none of its weights; fold it first (hf_stable.fold), and quantize what that saves"
            )


def _is_fresh(tensor: Tensor) -> bool:
    """Whether no checkpoint filled it; transformers' mark."""
    return not getattr(tensor, "_is_hf_initialized", False)


def _plain_name(name: str) -> str:
    """`fc.parametrizations.weight.original` -> `fc.weight`."""
    return re.sub(r"parametrizations\.(\w+)\..*", r"\1", name)


def norm_of(config) -> nn.Module:
    """A block's norm, which under pre-LN is the last one, too."""
    return build_norm(config.hidden_size, config, eps=config.norm_eps, bias=getattr(config, "bias", True))


def query_key_of(config, heads: int, tokens: int) -> QueryKey:
    """What `config.attention` makes of the queries and keys of so many heads and at most so many tokens."""
    return build_attention(config.hidden_size // heads, config, tokens, eps=config.qk_norm_eps or config.norm_eps)


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q' k'^T / sqrt(head_dim)) v with the implementation that `module.config` names.

    Args:
        module: an attention module with `config`, `is_causal`, and the `features` that make q' and k' of q and k, if any.
        q, k, v: (batch, heads, tokens, head_dim), q and k after their norms.
        attention_mask: as transformers' `create_causal_mask` makes it.

    Returns:
        (batch, tokens, heads, head_dim), and the attention matrix (batch, heads, queries, keys) from "eager".
    """
    scaling = q.shape[-1] ** -0.5
    if module.features is not None:
        refuse_flash(module.config)
        q, k = module.features(q, k)
    interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    dropout = dropout if module.training else 0.0
    return interface(module, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def refuse_flash(config) -> None:
    """Raises ValueError where flash attention is asked for and keys are longer than values, with which it does not run."""
    if "flash" in (config._attn_implementation or ""):
        with torch.device("meta"):
            made = query_key_of(config, config.num_attention_heads, 2)
        if made.features is not None:
            raise ValueError(
                f"attn_implementation = {config._attn_implementation!r}: allowed with attention = {config.attention!r}, whose "
                "keys are longer than its values, are 'eager' and 'sdpa'"
            )


def eager_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """The formula written out, for `output_attentions`."""
    logits = q @ k.transpose(-1, -2) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    A = logits.softmax(-1, dtype=torch.float32).to(q.dtype)
    A = nn.functional.dropout(A, dropout, module.training)
    return (A @ v).transpose(1, 2).contiguous(), A


def check_indices(name: str, indices: Tensor, field: str, size: int) -> None:
    """One line for an index past an embedding; on a GPU, where looking would wait for it, the embedding's own error."""
    if indices.device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel():
        low, high = indices.aminmax()
        if low < 0 or high >= size:
            raise ValueError(
                f"{name} holds {int(low if low < 0 else high)}: {field} = {size} allows whole numbers from 0 to {size - 1}"
            )
