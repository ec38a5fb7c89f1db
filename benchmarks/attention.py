"""StableAtten against its listing in the paper, and the entropy against its formula: `python -m benchmarks.attention`.

Forward and backward pass of one attention layer of 12 heads of 64, beside dot-product attention on torch's kernel; then
`attention_entropy`, which never holds the attention matrix, beside the formula that does.
"""

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.paired import Report, arguments, interleave
from stable_core import StableAttention, attention_entropy
from stable_core.reference import ListedStableAttention

HEADS, HEAD_DIM, ALPHA = 12, 64, 0.475


class DotProductAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = (
            nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM),
            nn.Linear(HEADS * HEAD_DIM, HEADS * HEAD_DIM),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def dense_entropy(q: Tensor, k: Tensor) -> Tensor:
    return torch.special.entr((HEAD_DIM**-0.5 * q @ k.transpose(-2, -1)).softmax(-1)).sum(-1)


def train(layer: nn.Module, x: Tensor) -> None:
    layer(x).sum().backward()
    layer.zero_grad()


def main() -> None:
    parser = arguments("attention", __doc__, rounds=15)
    parser.add_argument("--batch", type=int, default=4, help="sequences (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[197, 1024], help="tokens (default: 197 1024)")
    args = parser.parse_args()
    report = Report("attention", args.device)
    for length in args.lengths:
        torch.manual_seed(0)
        with args.device:
            x = torch.randn(args.batch, length, HEADS * HEAD_DIM)
            dot = DotProductAttention()
            stable = StableAttention(HEADS * HEAD_DIM, HEADS, length, ALPHA)
            norms = stable.q_norm.weight, stable.k_norm.weight
            listed = ListedStableAttention(stable.qkv, stable.proj, *norms, HEADS, length, ALPHA)
            q, k = torch.randn(2, args.batch, HEADS, length, HEAD_DIM)
        layers = {"the paper's listing": listed, "StableAttention": stable, "dot product": dot}
        work = {name: partial(train, layer, x) for name, layer in layers.items()}
        title = f"{args.batch} sequences of {length} tokens"
        times = interleave(work, args.rounds, args.device, title)
        report.add(f"forward and backward, {title}", times, list(layers)[::2], "ms", 1000)
        entropy = {
            "dense formula": partial(dense_entropy, q, k),
            "attention_entropy (stable)": partial(attention_entropy, q, k, scale=HEAD_DIM**-0.5),
        }
        times = interleave(entropy, args.rounds, args.device, title)
        report.add(f"entropy, {title}", times, ["dense formula"], "ms", 1000)
    report.save(args.out)


if __name__ == "__main__":
    main()
