"""What a printed command trains with: options and defaults as the program's own parser reads them, and the model it builds."""

import shlex
from argparse import Namespace
from ast import literal_eval
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import fields
from math import log2
from pathlib import Path

import timm
import torch
import tyro
from fairseq import options
from fairseq.optim import FairseqOptimizer
from fairseq.optim.lr_scheduler import build_lr_scheduler
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedConfig

from fairseq_sigma import speech_features
from fairseq_sigma.ctc_model import SpeechEncoder
from fairseq_sigma.speech_dataset import dictionary
from nanogpt_patch.launch import _assigned, _value, check
from nanogpt_patch.model import GPTConfig
from recipes.command import keyword_arguments
from recipes.hf_clm.settings import Settings as HuggingFace
from recipes.simclr.encoder import encoder
from recipes.simclr.pretrain import Settings as SimCLR
from recipes.vision.train import Settings as Vision
from stable_core import StableNorm
from stable_core.attentions import stable_tau

GPUS = 8  # for which the papers state their batches

# What upstream's train.py sets where neither a config file nor the command line does.
NANOGPT = {"beta1": 0.9, "beta2": 0.95, "dropout": 0.0, "dtype": "bfloat16", "n_layer": 12, "n_head": 12, "n_embd": 768}


class Settings(dict):
    """By the names of paper_settings.txt. What only the built model shows is found when it is asked for: that takes a while."""

    def __init__(self, found: dict, build: Callable[[], dict] = dict) -> None:
        super().__init__(found)
        self._build = build

    def __missing__(self, name: str):
        self.update(self._build())
        return self.get(name, "nowhere")


def settings_of(line: str) -> Settings | None:
    """Of a printed line; None where it is no command that trains or evaluates."""
    words = shlex.split(line)
    for program, read in READERS.items():
        if program in words:
            found = read(words[words.index(program) + 1 :])
            return found if isinstance(found, Settings) else Settings(found)
    return None


# --------------------------------------------------------------------------------------------------------------- vision


def _vision(words: list[str]) -> Settings:
    given = tyro.cli(Vision, args=words)
    kwargs = keyword_arguments(given.model_kwargs) | ({"img_size": given.img_size} if given.img_size else {})
    with torch.device("meta"):
        vit = timm.create_model(given.model, weight_init="skip", **kwargs)
    found = {
        **_fit(given),
        **_shape(vit),
        "lr": given.peak_lr,
        "label_smoothing": given.smoothing,
        "drop_path": given.drop_path,
        "repeated_aug": given.repeats,
        "randaug": _randaug(given.auto_augment),
        "mixup": given.mixup,
        "cutmix": given.cutmix,
        "erasing": given.erasing,
    }
    # Of one block: all are drawn alike.
    return Settings(found, lambda: _drawn(timm.create_model(given.model, **kwargs | {"depth": 1})))


def _randaug(rule: str) -> str:
    """rand-m9-mstd0.5-inc1 as 9/0.5: the magnitude and its deviation."""
    parts = rule.split("-")
    magnitude = next(part[1:] for part in parts if part.startswith("m") and not part.startswith("mstd"))
    return f"{magnitude}/{next(part[4:] for part in parts if part.startswith('mstd'))}"


def _simclr(words: list[str]) -> Settings:
    given = tyro.cli(SimCLR, args=words)
    kwargs = keyword_arguments(given.model_kwargs)
    with torch.device("meta"):
        vit = encoder(given.variant, given.img_size, kwargs)
    found = {
        **_fit(given),
        **_shape(vit),
        "lr": given.lr,
        "frozen_patcher": not any(p.requires_grad for p in vit.patch_embed.parameters()),
        "color_jitter": given.color_strength,
    }
    return Settings(found, lambda: _drawn(encoder(given.variant, given.img_size, kwargs | {"depth": 1})))


def _fit(given: Vision | SimCLR) -> dict:
    return {
        "optimizer": given.opt,
        "beta1": given.betas[0],
        "beta2": given.betas[1],
        "momentum": given.momentum,
        "base_lr": given.lr,
        "lr_base_size": given.lr_base_size,
        "schedule": given.sched,
        "step_epoch": given.decay_epochs,
        "step_factor": given.decay_rate,
        "batch_size": given.batch_size,
        "weight_decay": given.weight_decay,
        "weight_decay_end": given.weight_decay if given.weight_decay_end is None else given.weight_decay_end,
        "warmup_epochs": given.warmup_epochs,
        "epochs": given.epochs,
        "clip_norm": given.clip_grad,
        "ema": given.ema_decay,
        "precision": given.precision,
        "on_alarm": given.on_alarm,
    }


def _shape(vit: VisionTransformer) -> dict:
    block, layers = vit.blocks[0], [m for m in vit.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    norms, attention = {"StableNorm": "stable", "LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}, block.attn
    found = {
        "patch_size": vit.patch_embed.patch_size[0],
        "image_size": vit.patch_embed.img_size[0],
        "layers": len(vit.blocks),
        "width": vit.embed_dim,
        "mlp": block.mlp.fc1.out_features,
        "heads": attention.num_heads,
        "reparam": " and ".join(sorted({_kind(layer) for layer in layers})),
        "layer_norm": any(isinstance(module, nn.LayerNorm) for module in vit.modules()),
        "norm": norms.get(type(block.norm1).__name__),
        "alpha": getattr(block.norm1, "alpha", None),
        "attention": _attention(attention),
        "init": vit.options.init if hasattr(vit, "options") else "stock",
    }
    if found["attention"] == "stable":  # softmax(tau SN(q) SN(k) / d1^(2 alpha)), all of it in the norm of q
        q_norm, tokens = attention.q_norm, vit.patch_embed.num_patches + vit.num_prefix_tokens
        tau = q_norm.scale * attention.head_dim ** (2 * q_norm.alpha - 0.5)
        found["tau_factor"] = tau / log2(tokens)
    return found


def _attention(attention: nn.Module) -> str:
    if isinstance(attention.q_norm, StableNorm):
        return "stable"
    return "dot" if type(attention) is Attention and isinstance(attention.q_norm, nn.Identity) else "another"


def _kind(layer: nn.Module) -> str:
    if not parametrize.is_parametrized(layer):
        return "none"
    config = getattr(layer.parametrizations.weight[0], "config", None)
    return "weight" if config is None else config.kind


def _drawn(vit: VisionTransformer) -> dict:
    """What the weights were drawn from, as measured; and gamma, which is |W| where W_hat is W."""
    layer, patch = vit.blocks[0].mlp.fc1, vit.patch_embed.proj
    found = {"weight_std": _drawn_weight(layer).std().item(), "patch_std": _drawn_weight(patch).std().item()}
    if _kind(layer) == "sigma":
        same = torch.allclose(layer.weight, _drawn_weight(layer), rtol=1e-4, atol=1e-6)
        found["gamma_init"] = "spectral" if same else "another"
    return found


def _drawn_weight(layer: nn.Module) -> Tensor:
    """W, of which weight norm, as it begins, makes the same."""
    return layer.parametrizations.weight.original if _kind(layer) in ("sigma", "spectral") else layer.weight


# -------------------------------------------------------------------------------------------------------------- fairseq


def _trained_by_fairseq(words: list[str]) -> Settings:
    args = options.parse_args_and_arch(options.get_training_parser(), words)
    family = {"sigma_ctc": _speech, "language_modeling": _language, "translation": _translation}[args.task]
    found = {
        **family(args),
        "lr": _rate(args)(args.warmup_updates),
        "norm": args.norm,
        "residual": args.residual,
        "reparam": args.reparam,
        "gamma_init": args.gamma_init,
        "qkv": args.qkv,
        "optimizer": args.optimizer,
        "momentum": getattr(args, "momentum", None),
        "schedule": args.lr_scheduler,
        "warmup_updates": args.warmup_updates,
        "warmup_init_lr": args.warmup_init_lr,
        "updates": args.max_update,
        "weight_decay": args.weight_decay,
        "clip_norm": args.clip_norm,
        "dropout": args.dropout,
        "loss": args.criterion,
        "best_checkpoint": args.best_checkpoint_metric,
        "valid_set": args.valid_subset,
        "precision": "mixed" if args.amp or args.fp16 or args.bf16 else "fp32",
        "batch_tokens": args.max_tokens * args.update_freq[0] * GPUS,
    }
    return Settings(found, lambda: _speech_encoder(args) if args.task == "sigma_ctc" else {})


class _Optimizer(FairseqOptimizer):
    """Of nothing, for a schedule to set its learning rate."""

    def __init__(self) -> None:
        super().__init__(None)
        self._optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def _rate(args: Namespace) -> Callable[[int], float]:
    """Update -> learning rate, by fairseq's own schedule."""
    return build_lr_scheduler(args, _Optimizer()).step_update


def _speech(args: Namespace) -> dict:
    rate, peak, updates = _rate(args), args.lr[0], range(args.warmup_updates, args.max_update)
    return {
        "halved_at": bisect_left(updates, True, key=lambda update: rate(update) <= peak / 2) + args.warmup_updates,
        "cosine_ends": args.warmup_updates + getattr(args, "lr_period_updates", 0),  # fairseq counts from the warm-up
        "batch_seconds": args.max_tokens * args.update_freq[0] * GPUS * speech_features.STEP,
        "plateau_factor": getattr(args, "lr_shrink", None),
        "layer_drop": args.layer_drop,
        "freq_mask": args.freq_mask_width,
        "time_mask": args.time_mask_width,
        "time_mask_ratio": args.time_mask_ratio,
        "freq_masks": args.freq_masks,
        "time_masks": args.time_masks,
        "layers": args.encoder_layers,
        "width": args.encoder_embed_dim,
        "mlp": args.encoder_ffn_embed_dim,
        "heads": args.encoder_attention_heads,
        "sample_rate": args.sample_rate,
        "mel_bins": args.mel_bins,
        "window_ms": 1000 * speech_features.WINDOW,
        "step_ms": 1000 * speech_features.STEP,
        "gamma_lr_scale": args.gamma_lr_scale,
    }


def _speech_encoder(args: Namespace) -> dict:
    model = SpeechEncoder(Namespace(**vars(args) | {"encoder_layers": 1}), args.mel_bins, dictionary())
    drawn = _drawn_weight(model.layers[0].fc1)
    return {
        "weight_bound": drawn.abs().max().item(),
        "weight_std": drawn.std().item(),
        "reparam_conv": _kind(model.conv) != "none",
        "kernel": model.conv.kernel_size[0],
        "stride": model.conv.stride[0],
        "positions": type(model.positions).__name__,
        "symbols": len(model.dictionary) - model.dictionary.nspecial,
    }


def _translation(args: Namespace) -> dict:
    beta1, beta2 = literal_eval(args.adam_betas)
    learned = args.encoder_learned_pos or args.decoder_learned_pos
    return {
        **_both(args, layers="layers", width="embed_dim", mlp="ffn_embed_dim", heads="attention_heads"),
        "weight_std": args.init_std,
        "beta1": beta1,
        "beta2": beta2,
        "eps": args.adam_eps,
        "label_smoothing": args.label_smoothing,
        "positions": "learned" if learned else "sinusoidal",
    }


def _both(args: Namespace, **names: str) -> dict:
    """Of encoder and decoder; a set where they differ."""
    pairs = {new: {getattr(args, f"{side}_{name}") for side in ("encoder", "decoder")} for new, name in names.items()}
    return {name: pair.pop() if len(pair) == 1 else pair for name, pair in pairs.items()}


def _language(args: Namespace) -> dict:
    return {
        "layers": args.decoder_layers,
        "width": args.decoder_embed_dim,
        "mlp": args.decoder_ffn_embed_dim,
        "heads": args.decoder_attention_heads,
        "tied": args.adaptive_input and args.tie_adaptive_weights,
        "block": args.tokens_per_sample,
        "break_mode": args.sample_break_mode,
        "min_lr": args.min_lr,
        "stop_min_lr": args.stop_min_lr,
        "period": args.lr_period_updates,
        "period_factor": args.t_mult,
        "lr_shrink": args.lr_shrink,
    }


def _translated_by_fairseq(words: list[str]) -> dict:
    args = options.parse_args_and_arch(options.get_generation_parser(), words)
    return {"split": args.gen_subset, "beam": args.beam, "checkpoint": Path(args.path).name}


def _scored_by_fairseq(words: list[str]) -> dict:
    args = options.parse_args_and_arch(options.get_eval_lm_parser(), words)
    return {"split": args.gen_subset, "block": args.tokens_per_sample, "context": args.context_window}


# ------------------------------------------------------------------------------------------------------------------ GPT


def _nanogpt(words: list[str]) -> dict:
    given = dict(NANOGPT)
    for word in check(words)[1]:
        name, _, value = word.removeprefix("--").partition("=")
        given |= {name: _value(value)} if word.startswith("--") else _assigned(Path(word).read_text())
    model = GPTConfig(**{field.name: given[field.name] for field in fields(GPTConfig) if field.name in given})
    return {
        **_gpt(model),
        "tau_factor": model.tau_scale * stable_tau(model.block_size) / log2(model.block_size),
        "updates": given["max_iters"],
        "decay_updates": given["lr_decay_iters"],
        "lr": given["learning_rate"],
        "min_lr": given["min_lr"],
        "weight_decay": given["weight_decay"],
        "beta1": given["beta1"],
        "beta2": given["beta2"],
        "warmup_updates": given["warmup_iters"],
        "batch_size": given["batch_size"] * given["gradient_accumulation_steps"],
        "precision": given["dtype"],
        "clip_norm": given["grad_clip"],
    }


def _hugging_face(words: list[str]) -> dict:
    given = tyro.cli(HuggingFace, args=words)
    model = given.config()
    return {
        **_gpt(model),
        "tau_scale": model.tau_scale,
        "updates": given.steps,
        "decay_updates": getattr(given, "decay_steps", None) or given.steps,
        "lr": given.lr,
        "weight_decay": given.weight_decay,
        "beta1": given.betas[0],
        "beta2": given.betas[1],
        "warmup_updates": given.warmup,
        "batch_size": given.batch_tokens / model.block_size,
        "clip_norm": given.grad_clip,
    }


def _gpt(model: GPTConfig | PreTrainedConfig) -> dict:
    return {
        "layers": model.n_layer,
        "width": model.n_embd,
        "heads": model.n_head,
        "norm": model.norm,
        "alpha": model.alpha,
        "attention": model.attention,
        "init": model.init,
        "sequence_length": model.block_size,
        "dropout": model.dropout,
    }


READERS = {
    "recipes.vision.train": _vision,
    "recipes.simclr.pretrain": _simclr,
    "recipes.hf_clm.train": _hugging_face,
    "nanogpt_patch": _nanogpt,
    "fairseq-train": _trained_by_fairseq,
    "fairseq-generate": _translated_by_fairseq,
    "fairseq-eval-lm": _scored_by_fairseq,
}
