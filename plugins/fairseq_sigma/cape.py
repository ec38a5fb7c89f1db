"""CAPE: continuous augmented positional embeddings.

Source: Likhomanenko et al., "CAPE: Encoding Relative Positions with Continuous Augmented Positional Embeddings" (2021).
Positions are seconds. In training the whole utterance is shifted, each position is jittered, and time is stretched, so
that a model learns to use differences of positions.
"""

import math

import torch
from torch import Tensor, nn

FREQUENCY_SCALE = 30.0  # the paper's for speech, whose positions are 30 ms apart


class Cape(nn.Module):
    """Embedding k of position t: cos(w_k t) and sin(w_k t), w_k = 30 * 10000^(-2k/dim).

    Args:
        dim: of the embedding, even.
        step: seconds from one position to the next.
        global_shift: in training t -> t + d, one d in U(-global_shift, global_shift) seconds for an utterance.
        local_shift: in training t_i -> t_i + e_i, e_i in U(-local_shift, local_shift) * step / 2; up to 1 keeps the order.
        scale: in training t -> s t, log s in U(-log scale, log scale), one s for an utterance.

    Raises:
        ValueError: an odd dim, a negative shift, or a scale below 1.
    """

    def __init__(self, dim: int, step: float, global_shift: float, local_shift: float, scale: float) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim = {dim}: CAPE takes even numbers")
        for name, value, least in (
            ("global-shift", global_shift, 0),
            ("local-shift", local_shift, 0),
            ("scale", scale, 1),
        ):
            if not least <= value < math.inf:
                raise ValueError(f"--cape-{name} {value}: allowed are numbers from {least}")
        self.step, self.global_shift, self.local_shift, self.log_scale = (
            step,
            global_shift,
            local_shift,
            math.log(scale),
        )
        exponents = -2 * torch.arange(dim // 2, dtype=torch.float64) / dim
        self.register_buffer("frequencies", (FREQUENCY_SCALE * 10000**exponents).float(), persistent=False)

    def positions(self, lengths: Tensor, longest: int) -> Tensor:
        """(batch,) -> (batch, longest) seconds from the middle of each utterance, augmented in training."""
        index = torch.arange(longest, device=lengths.device)
        t = self.step * (index - (lengths[:, None] - 1) / 2)
        if self.training:
            each = t.new_empty(len(t), 1)
            t = t + each.uniform_(-self.global_shift, self.global_shift)
            t = t + torch.empty_like(t).uniform_(-self.local_shift, self.local_shift) * self.step / 2
            t = t * each.uniform_(-self.log_scale, self.log_scale).exp()
        return t

    def forward(self, lengths: Tensor, longest: int) -> Tensor:
        """(batch,) -> (batch, longest, dim): cosines at even, sines at odd places."""
        angles = self.positions(lengths, longest)[..., None] * self.frequencies
        return torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(2)
