"""The Triton kernels of σReparam beside plain torch operators and torch.compile of these: `python -m benchmarks.kernels`.

For the weights of a model: one power iteration, W_hat of each weight, and the gradients of each, as they are called (which a
GPU with much to launch waits for) and replayed as a CUDA graph (which is the GPU's own time; a small weight has none else).
GB/s are of W read twice and what is written, for every method, so that they may exceed those of the copy where a second
reading finds W in the cache. Then entropy and largest logit of attention. On the CPU there is `--tiny` alone, under Triton's
interpreter: it shows that everything runs, and measures nothing.
"""

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.paired import Report, arguments, interleave, seconds
from stable_core import attention_statistics, kernels
from stable_core.kernels import (
    Measured,
    Place,
    Plan,
    Tile,
    measure,
    measure_all,
    plan,
    power_iteration_,
    scale_backward,
)
from stable_core.scale_by_sigma import scaled

Rows = tuple[int, ...]
EAGER, COMPILED, KERNELS = "torch", "torch.compile", "σ kernels"


def transformer(width: int, layers: int) -> list[tuple[Rows, int]]:
    """The rows of the blocks, and the columns, of the weights of so many layers; queries, keys and values are packed."""
    layer = [((width,) * 3, width), ((width,), width), ((4 * width,), width), ((width,), 4 * width)]
    return layers * layer


def many_small(width: int, count: int) -> list[tuple[Rows, int]]:
    layer = [((width,), width), ((width,), width), ((4 * width,), width), ((width,), 4 * width)]
    return count // 4 * layer


MODELS = {  # and the types of W_hat
    "GPT-2 124M": (transformer(768, 12), (torch.float32, torch.bfloat16)),
    "ViT-S": (transformer(384, 12), (torch.bfloat16,)),
    "1,600 weights of width 64": (many_small(64, 1600), (torch.bfloat16,)),
}
TINY = {"tiny": (transformer(16, 1), (torch.float32, torch.bfloat16))}
TILES = (Tile(16, 128, 4), Tile(32, 128, 4), Tile(32, 256, 4), Tile(32, 256, 8), Tile(64, 128, 8), Tile(8, 512, 4))


def advance(weights: list[Tensor], us: list[Tensor]) -> None:
    """u <- W v / |W v|, v = W^T u / |W^T u|, lengths for all weights at once."""
    vs = _normalise([torch.mv(W.T, u) for W, u in zip(weights, us, strict=True)])
    torch._foreach_copy_(us, _normalise([torch.mv(W, v) for W, v in zip(weights, vs, strict=True)]))


def _normalise(vectors: list[Tensor]) -> list[Tensor]:
    torch._foreach_div_(vectors, list(torch.stack(torch._foreach_norm(vectors)).unbind()))
    return vectors


def advance_one(W: Tensor, u: Tensor) -> None:
    v = torch.mv(W.T, u)
    y = torch.mv(W, v / v.norm())
    u.copy_(y / y.norm())


def forward(W: Tensor, u: Tensor, gamma: Tensor, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.stack([torch.mv(block.T, x) for block, x in zip(W.split(rows), u.split(rows), strict=True)])
    s = z.norm(dim=1)
    factor = _per_row(gamma / s, rows)
    if torch.compiler.is_compiling():
        return (W * factor).to(dtype), z, s
    return torch.mul(W, factor, out=torch.empty_like(W, dtype=dtype)), z, s


def backward(G: Tensor, W: Tensor, u: Tensor, z: Tensor, s: Tensor, gamma: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    G = G.float()
    blocks = zip(G.split(rows), W.split(rows), strict=True)
    c = torch.stack([torch.dot(g.reshape(-1), w.reshape(-1)) for g, w in blocks]) / s
    d_W = G * _per_row(gamma / s, rows)
    factors = -c * gamma / s / s
    for block, x, y, factor in zip(d_W.split(rows), u.split(rows), z, factors, strict=True):
        block.addr_(factor * x, y)
    return d_W, c


def _per_row(x: Tensor, rows: Rows) -> Tensor:
    return x if len(rows) == 1 else torch.cat([one.expand(n) for one, n in zip(x, rows, strict=True)])[:, None]


class Weights:
    """The weights of a model with all that the three operations take, and the operations by each method."""

    def __init__(self, shapes: list[tuple[Rows, int]], dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.dtype, self.device = [rows for rows, _ in shapes], dtype, device
        with device:
            self.W = [0.02 * torch.randn(sum(rows), columns) for rows, columns in shapes]
            self.G = [1e-3 * torch.randn_like(W, dtype=dtype) for W in self.W]
            self.u = [torch.cat([normalize(torch.randn(n), dim=0) for n in rows]) for rows in self.rows]
            self.u_joint = [normalize(torch.randn(len(W)), dim=0) for W in self.W]
            self.gamma = [torch.linspace(0.5, 2, len(rows)) for rows in self.rows]
        self.found: list[Measured] = []
        self.scaled = [forward(*some, self.dtype) for some in zip(self.W, self.u, self.gamma, self.rows, strict=True)]

    def bytes(self, operation: str) -> int:
        """Read and written: W twice; W twice and W_hat; G twice, W, and dW."""
        W, low = (sum(x.numel() * x.element_size() for x in some) for some in (self.W, self.G))
        return {"power iteration": 2 * W, "W_hat": 2 * W + low, "gradients": 2 * low + 2 * W}[operation]

    def operations(self) -> dict[str, dict[str, Callable[[], object]]]:
        backend = "inductor" if self.device.type == "cuda" else "aot_eager"
        one, there, back = (torch.compile(f, backend=backend, dynamic=False) for f in (advance_one, forward, backward))
        return {
            "power iteration": {
                EAGER: partial(advance, self.W, self.u_joint),
                COMPILED: lambda: [one(*some) for some in zip(self.W, self.u_joint, strict=True)],
                KERNELS: partial(power_iteration_, self.W, self.u_joint, 1),
            },
            "W_hat": {
                EAGER: partial(self.forward, forward),
                COMPILED: partial(self.forward, there),
                KERNELS: self.forward_by_kernels,
            },
            "gradients": {
                EAGER: partial(self.backward, backward),
                COMPILED: partial(self.backward, back),
                KERNELS: self.backward_by_kernels,
            },
        }

    def forward_by_kernels(self) -> Tensor:
        for W, found, rows in zip(self.W, measure_all(self.plan(), torch.float32), self.rows, strict=True):
            last = scaled(W, found.factor, rows, False, self.dtype)
        return last

    def plan(self) -> Plan:
        places = (
            Place(W.data_ptr(), W.shape, W.stride(), rows, u.data_ptr(), gamma.data_ptr())
            for W, rows, u, gamma in zip(self.W, self.rows, self.u, self.gamma, strict=True)
        )
        return plan(tuple(places), self.device, torch.float32)

    def backward_by_kernels(self) -> Tensor:
        self.found = self.found or measure_all(self.plan(), torch.float32)
        for G, W, found, rows in zip(self.G, self.W, self.found, self.rows, strict=True):
            last = scale_backward(G, W, found, rows, False)
        return last

    def forward(self, function: Callable) -> Tensor:
        for some in zip(self.W, self.u, self.gamma, self.rows, strict=True):
            last = function(*some, self.dtype)
        return last

    def backward(self, function: Callable) -> Tensor:
        for G, W, u, (_, z, s), gamma, rows in zip(
            self.G, self.W, self.u, self.scaled, self.gamma, self.rows, strict=True
        ):
            last = function(G, W, u, z, s, gamma, rows)
        return last


def largest_errors(weights: Weights) -> dict[str, float]:
    """Of each operation by the kernels, on a weight of each shape, against plain torch in fp64."""
    worst = dict.fromkeys(("u", "W_hat", "dW", "dgamma"), 0.0)
    shapes = {W.shape: i for i, W in enumerate(weights.W)}
    for i in shapes.values():
        W, u, gamma, G, rows = weights.W[i], weights.u[i], weights.gamma[i], weights.G[i], weights.rows[i]
        joint, joint_64 = weights.u_joint[i].clone(), weights.u_joint[i].double()
        power_iteration_([W], [joint], 1)
        advance_one(W.double(), joint_64)
        found = measure(W, u, gamma, rows)
        W_hat = scaled(W, found.factor, rows, False, weights.dtype)
        ours = joint, W_hat, *scale_backward(G, W, found, rows, False)
        W64, u64, gamma64 = W.double(), u.double(), gamma.double()
        W_hat, z, s = forward(W64, u64, gamma64, rows, torch.float64)
        truth = joint_64, W_hat, *_backward_64(G.double(), W64, u64, z, s, gamma64, rows)
        for name, x, y in zip(worst, ours, truth, strict=True):
            error = ((x.double() - y).norm() / y.norm()).item()
            worst[name] = error if not error <= worst[name] else worst[name]  # NaN too
    return worst


def _backward_64(G: Tensor, *rest) -> tuple[Tensor, Tensor]:
    W, u, z, s, gamma, rows = rest
    parts = []
    for g, w, x, y, length, own in zip(G.split(rows), W.split(rows), u.split(rows), z, s, gamma, strict=True):
        c = (g * w).sum() / length
        parts.append((own / length * (g - c * torch.outer(x, y / length)), c))
    return torch.cat([d for d, _ in parts]), torch.stack([c for _, c in parts])


def dense(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Entropy and largest logit of causal attention from the whole matrix."""
    q, k = (x if x.dtype == torch.float64 else x.float() for x in (q, k))
    x = scale * q @ k.mT
    x = x.masked_fill(torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1), -torch.inf)
    log_p = x.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1), x.amax(-1)


def attention(report: Report, rounds: int, device: torch.device, shape: tuple[int, int, int, int]) -> None:
    """Entropy and largest logit, causal; shape (batch, heads, tokens, head_dim)."""
    compiled = torch.compile(dense, backend="inductor" if device.type == "cuda" else "aot_eager", dynamic=False)
    for dtype in (torch.float32, torch.bfloat16):
        q, k = torch.randn(2, *shape, device=device).to(dtype)
        scale = shape[-1] ** -0.5
        work = {
            "torch's operators": partial(attention_statistics, q, k, scale=scale, is_causal=True, kernels="torch"),
            "dense": partial(dense, q, k, scale),
            "dense, torch.compile": partial(compiled, q, k, scale),
            "σ kernel": partial(attention_statistics, q, k, scale=scale, is_causal=True, kernels="triton"),
        }
        title = f"entropy and largest logit, {shape}, {str(dtype).removeprefix('torch.')}"
        truth, ours = dense(q[:1].double(), k[:1].double(), scale), work["σ kernel"]()
        errors = [(y[:1] - x).abs().max().item() for x, y in zip(truth, ours[:2], strict=True)]
        report.add(f"{title}: largest errors", {"entropy": errors[:1], "largest logit": errors[1:]}, [], "nats", 1)
        times = interleave(work, rounds, device, title, warm_up=2)
        report.add(title, times, ["torch's operators", "dense, torch.compile"], "ms", 1000)


def captured(work: Callable[[], object]) -> Callable[[], object]:
    """The same as a CUDA graph, warmed up before."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def copy_rate(device: torch.device, size: int) -> list[float]:
    """GB/s, read and written, of copies of so many floats."""
    x, y = torch.randn(2, size, device=device)
    return [8e-9 * size / seconds(partial(y.copy_, x), device) for _ in range(12)][2:]


def with_tile(tile: Tile, work: Callable[[], object]) -> None:
    before, kernels.TILE = kernels.TILE, tile
    try:
        work()
    finally:
        kernels.TILE = before


def main() -> None:
    parser = arguments("kernels", __doc__, rounds=20)
    parser.add_argument("--tiny", action="store_true", help="one small layer: does everything run?")
    parser.add_argument("--tiles", action="store_true", help="the kernels with tiles of several sizes too")
    args = parser.parse_args()
    on_gpu = args.device.type == "cuda"
    if not (on_gpu or args.tiny):
        parser.error("--device cpu: allowed with --tiny alone, as the interpreter is a thousand times slower")
    if not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"
    if not kernels.available(args.device):
        parser.error(f"--device {args.device}: Triton has no kernels for it here")
    torch._dynamo.config.recompile_limit = 64  # every shape is compiled for itself
    report = Report("kernels", args.device)
    copies = copy_rate(args.device, 1 << 28 if on_gpu else 1 << 20)
    report.add("a copy", {"copy": copies}, [], "GB/s", 1)
    for model, (shapes, dtypes) in (TINY if args.tiny else MODELS).items():
        for dtype in dtypes:
            torch.manual_seed(0)
            weights = Weights(shapes, dtype, args.device)
            label = f"{model}, W_hat in {str(dtype).removeprefix('torch.')}"
            errors = {name: [error] for name, error in largest_errors(weights).items()}
            report.add(f"{label}: the kernels' largest errors against fp64", errors, [], "relative", 1)
            for operation, work in weights.operations().items():
                if operation == "power iteration" and dtype != dtypes[0]:
                    continue
                title = f"{label}: {operation}"
                times = interleave(work, args.rounds, args.device, title, warm_up=2)
                report.add(f"{title}, as called", times, [EAGER], "ms", 1000)
                if args.tiles:
                    tiles = {f"σ kernels {tuple(tile)}": tile for tile in TILES}
                    work |= {name: partial(with_tile, tile, work[KERNELS]) for name, tile in tiles.items()}
                graphs = {name: captured(one) if on_gpu else one for name, one in work.items()}
                times = interleave(graphs, args.rounds, args.device, title, warm_up=2)
                report.add(f"{title}, {'a CUDA graph' if on_gpu else 'again'}", times, [EAGER], "ms", 1000)
                rates = {name: [1e-9 * weights.bytes(operation) / t for t in own] for name, own in times.items()}
                report.add(f"{title}, bytes over time", rates, [], "GB/s", 1)
            del weights
    attention(report, args.rounds, args.device, (1, 2, 70, 16) if args.tiny else (8, 12, 1024, 64))
    report.save(args.out)


if __name__ == "__main__":
    main()
