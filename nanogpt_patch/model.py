"""nanoGPT's GPT with StableNorm, StableAtten, StableInit and σReparam, or the baselines they are held against [ST, Table 2].

The same constructor, methods and names in the state dict as upstream's model.py, for which it stands in. With
`norm="layernorm", attention="dot", init="stock"` it is upstream's model: the same numbers from the same seed.
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_core.attentions import build_attention, stable_tau
from stable_core.init_std import gpt_init_std
from stable_core.inits import init_
from stable_core.norms import build_norm
from stable_core.options import NAMES, Options
from stable_core.reparams import reparametrise
from stable_core.residuals import build_residuals, scale_branches_
from stable_core.unfolding import is_plain, reparametrised_in, unfold_state_dict
from stable_core.z_loss import check_coefficient, z_loss
from stable_monitor.resume import reparametrise_named

STOCK = {"norm": "layernorm", "attention": "dot", "init": "stock", "residual": "pre-ln", "reparam": "none"}


@dataclass(frozen=True)
class GPTConfig(Options):
    """Upstream's fields, and the methods' (`stable_core.options.Options`), by default StableGPT's.

    Attributes:
        alpha: the paper's example for GPT is 0.475.
        init: "stock" is GPT-2's, N(0, 0.02^2), smaller into the residual stream; with a `reparam`, at other widths than
            GPT-2's, what has the spectral norm that 0.02 has there (`stable_core.init_std`).
        reparam: of every Linear layer of the blocks.
        z_loss: coefficient of log(Z)^2 of the output softmax in the loss that is trained on (`stable_core.z_loss`); 0 is none.
    """

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    norm: str = field(default="stable", kw_only=True)
    attention: str = field(default="stable", kw_only=True)
    init: str = field(default="stable", kw_only=True)
    z_loss: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: allowed are whole numbers from 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head = {self.n_head}: allowed are divisors of n_embd = {self.n_embd}")
        check_coefficient(self.z_loss, "z_loss")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout!r}: allowed are numbers from 0 to below 1")


SETTINGS = {
    option.name: option.default for option in fields(GPTConfig) if option.name in (*NAMES, "z_loss")
}  # upstream has none of them


class CausalSelfAttention(nn.Module):
    """Each token attends to itself and those before it: (batch, tokens, n_embd) to the same."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        made = build_attention(config.n_embd // config.n_head, config, config.block_size)
        self.q_norm, self.k_norm, self.features, self.tied = made

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.config.n_head, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.config.dropout if self.training else 0.0
        q, k = self.q_norm(q), self.k_norm(q if self.tied else k)
        scale = None  # 1 / sqrt(head_dim), also where features are longer
        if self.features is not None:
            scale = q.shape[-1] ** -0.5
            q, k = self.features(q, k)
        y = F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two layers with a GELU between them, four times as wide inside: (batch, tokens, n_embd) to the same."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then the MLP, each with a norm and a residual: (batch, tokens, n_embd) to the same."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.residual = build_residuals(config, 0, config.n_layer)[1]
        self.ln_1 = build_norm(config.n_embd, config, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = build_norm(config.n_embd, config, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual.connect(x, self.ln_1, self.attn)
        return self.residual.connect(x, self.ln_2, self.mlp)


class GPT(nn.Module):
    """Tokens (batch, sequence) to logits (batch, sequence, vocab_size), the head tied to the token embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config, norm_first = config, build_residuals(config, 0, config.n_layer)[1].norm_first
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            # After post-LN, which has normed its last output already, none.
            "ln_f": build_norm(config.n_embd, config, bias=config.bias) if norm_first else nn.Identity(),
        })  # fmt: skip
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self._init_weights()
        reparametrise(self.transformer.h, config)
        print(f"number of parameters: {self.get_num_params() / 1e6:.2f}M")

    def _init_weights(self) -> None:
        """Draws in upstream's order, for the same numbers from the same seed."""
        std, blocks = 0.02, {*self.transformer.h.modules()}
        if self.config.reparam != "none":
            std = gpt_init_std(self.config.n_embd)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std if module in blocks else 0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        if self.config.init == "stock":
            for name, weight in self.transformer.h.named_parameters():
                if name.endswith("c_proj.weight"):
                    nn.init.normal_(weight, std=std / math.sqrt(2 * self.config.n_layer))
        init_(self.transformer.h, self.config)
        for block in self.transformer.h:
            scale_branches_(block, block.residual.beta)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters, by default without the position embedding's; the token embedding's are the head's too."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The logits and, with targets (-1 is left out), their mean loss in nats; without, the last position's logits only.

        The loss has z-loss in it while training.

        Raises:
            ValueError: a sequence longer than block_size.
        """
        length = idx.shape[1]
        if length > self.config.block_size:
            raise ValueError(f"a sequence of {length} tokens: block_size = {self.config.block_size} is the longest")
        positions = torch.arange(length, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        if self.training and self.config.z_loss:
            loss = loss + z_loss(logits, self.config.z_loss, targets != -1)
        return logits, loss

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False):
        """torch's; a plain state dict goes into a model with σReparam too (`stable_core.unfold_state_dict`).

        Layers that a rescue has reparametrised, which the state dict alone knows of, are so here afterwards.
        """
        reparametrise_named(self, reparametrised_in(state_dict))
        if is_plain(state_dict):
            state_dict = unfold_state_dict(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def crop_block_size(self, block_size: int) -> None:
        """Keeps the first `block_size` positions. tau stays what it was: tau_scale grows by what log2(block_size) loses.

        Raises:
            ValueError: a block_size above the present one.
        """
        if block_size > self.config.block_size:
            raise ValueError(f"block_size = {block_size}: allowed are sizes up to {self.config.block_size}")
        kept = stable_tau(self.config.block_size) / stable_tau(block_size) if block_size > 1 else 1.0
        self.config = replace(self.config, block_size=block_size, tau_scale=self.config.tau_scale * kept)
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict | None = None) -> Self:
        """OpenAI's weights, from transformers; the model has stock settings.

        Raises:
            ValueError: another model than gpt2, gpt2-medium, gpt2-large and gpt2-xl; another override than dropout.
        """
        sizes = {
            "gpt2": (12, 12, 768),
            "gpt2-medium": (24, 16, 1024),
            "gpt2-large": (36, 20, 1280),
            "gpt2-xl": (48, 25, 1600),
        }
        if model_type not in sizes:
            raise ValueError(f"model_type = {model_type!r}: allowed are {', '.join(map(repr, sizes))}")
        override_args = override_args or {}
        if override_args.keys() - {"dropout"}:
            raise ValueError(f"override_args = {override_args}: allowed is dropout")
        from transformers import GPT2LMHeadModel  # only here is it needed

        theirs = GPT2LMHeadModel.from_pretrained(model_type)
        size = dict(zip(("n_layer", "n_head", "n_embd"), sizes[model_type], strict=True))
        model = cls(GPTConfig(**size, vocab_size=50257, **STOCK, **override_args))
        transposed = ("c_attn.weight", "attn.c_proj.weight", "c_fc.weight", "mlp.c_proj.weight")  # theirs are (in, out)
        model.load_state_dict({k: x.T if k.endswith(transposed) else x for k, x in theirs.state_dict().items()})
        return model

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """AdamW that decays matrices and embeddings, not biases, norms or gammas."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        for group, what in zip(groups, ("decayed", "non-decayed"), strict=True):
            n = sum(p.numel() for p in group["params"])
            print(f"num {what} parameter tensors: {len(group['params'])}, with {n:,} parameters")
        fused = {"fused": True} if device_type == "cuda" else {}
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, **fused)

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float) -> float:
        """Sequences per iteration and seconds to a share of an A100's 312 TFLOPS in bfloat16 (PaLM, App. B)."""
        c = self.config
        flops_per_token = 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size
        return flops_per_token * c.block_size * fwdbwd_per_iter / dt / 312e12

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """Samples `max_new_tokens` after idx (batch, sequence), of which the model sees the last block_size."""
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1] / temperature
            if top_k is not None:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            idx = torch.cat([idx, torch.multinomial(logits.softmax(-1), 1)], dim=1)
        return idx
