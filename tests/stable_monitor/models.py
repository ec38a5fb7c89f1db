"""Small models of the kinds people train, for the tests beside this file."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class CausalSelfAttention(nn.Module):
    """nanoGPT's attention: packed c_attn, and attention written out where `flash` is off."""

    def __init__(self, width: int = 32, heads: int = 4, flash: bool = True) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.n_head, self.dropout, self.flash = heads, 0.1, flash

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(~torch.ones(att.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
            y = F.dropout(F.softmax(att, dim=-1), self.dropout, self.training) @ v
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, pre-LN."""

    def __init__(self, width: int, flash: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, flash=flash)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A nanoGPT of two blocks: (logits, loss) = model(tokens, targets)."""

    def __init__(self, width: int = 32, flash: bool = True, checkpoint: bool = False) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50, width), nn.Embedding(16, width)
        self.h = nn.ModuleList([Block(width, flash) for _ in range(2)])
        self.lm_head, self.checkpoint = nn.Linear(width, 50), checkpoint

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.checkpoint else block(x)
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt(seed: int = 0, **settings) -> GPT:
    torch.manual_seed(seed)
    return GPT(**settings)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(step)) % (5 + step % 40)
    return tokens[:, :16], tokens[:, 1:]


def train(model, steps: int, monitor=None, optimizer=None, called=None, first: int = 0) -> list[float]:
    """nanoGPT's loop; monitor(called, optimizer) makes the monitor. Returns the losses."""
    called = model if called is None else called
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    watching = monitor and monitor(called, optimizer)
    losses = []
    for step in range(first, first + steps):
        torch.manual_seed(step)  # dropout
        _, loss = called(*batch(step))
        loss.backward()
        optimizer.step()
        if watching:
            watching.step(loss)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
