"""σReparam by Triton kernels: power iteration and sigma for all weights together, and the backward pass, two kernels a weight.

For a block of rows W (out, in) of a weight, with u (out,) [σ, Algorithm 1]:

    z = W^T u, s = |z|/|u|, W_hat = gamma/s W;    dW = gamma/s (G - c w z^T), w = u/(|u|^2 s), dgamma = c = <G, W>/s

where G = dL/dW_hat. W_hat itself is one multiplication, for which torch is as fast.

Sums are in fp32 for every weight dtype, in a fixed order and without atomics, so that a resumed run is bitwise the run that
never stopped. Triton comes with torch's CUDA builds; it is imported only when a kernel is needed. On a CPU the kernels run, for
tests, only in Triton's interpreter: set TRITON_INTERPRET=1 before the process starts.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """How a kernel reads a matrix.

    Attributes:
        rows, columns: size of a tile, which a program reads at a time.
        warps: warps per program.
        down: the most strips of tiles that a matrix is cut into along its rows.
    """

    rows: int = 16
    columns: int = 256
    warps: int = 4
    down: int = 128


TILE = Tile()
CHUNK, PARTS = 256, 32  # entries of a vector per program, and partial sums that it adds at a time


class Plan(NamedTuple):
    """Tensors on the device that tell each program of a kernel which part of which matrix is its own.

    A matrix is a block of rows of a weight. Its tiles make strips, and the vectors (out,) and (in,) are cut into chunks; a
    program takes a strip or a chunk.

    Attributes:
        table: (matrices, 16), int64: a line for each matrix (kernels_sigma.py names the columns).
        strips, outs, ins: int32, the matrix of each strip, of each chunk of vectors (out,), and of each chunk of vectors (in,).
        partials: length of the buffer for the partial sums of a product.
        n_out, n_in: total lengths of the vectors (out,) and of the vectors (in,) of all matrices.
        blocks, outs_of, ins_of: for each weight its number of blocks, and the total lengths of their vectors (out,) and (in,).
    """

    table: Tensor
    strips: Tensor
    outs: Tensor
    ins: Tensor
    partials: int
    n_out: int
    n_in: int
    blocks: list[int]
    outs_of: list[int]
    ins_of: list[int]


class _Matrix(NamedTuple):
    """A block of rows (out, in) of a weight.

    `weight`, `u` and `gamma` are offsets of their first elements, in elements. `ld` is the stride between contiguous rows, or
    between columns where `transposed`. `aligned`: the block starts at a multiple of 16 (bytes and elements).
    """

    weight: int
    shape: tuple[int, int]
    ld: int
    transposed: bool
    aligned: bool
    u: int
    gamma: int


def available(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    return not why_not(device, torch.float32)


@cache
def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """The reason why the kernels cannot take weights of this dtype on this device, for an error; empty where they can."""
    if device.type not in ("cpu", "cuda"):
        return f"a weight is on {device}; allowed is a GPU of CUDA"
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        k = _kernels()
    except ModuleNotFoundError:
        return "a model's copy of this source has no kernels"
    if device.type == "cpu" and not k.INTERPRETED:
        return "a weight is on the CPU; allowed is a GPU of CUDA"
    if device.type == "cuda" and k.INTERPRETED:
        return "TRITON_INTERPRET is set, which is for the CPU"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return "" if dtype in k.DTYPES else f"a weight is in {dtype}; allowed are {', '.join(map(str, k.DTYPES))}"


@cache
def _kernels() -> ModuleType:
    # By import_module, because transformers reads the import statements in the source that a saved model ships, and would
    # then require Triton of everybody who loads it.
    return import_module(".kernels_sigma", __package__)


class Place(NamedTuple):
    """Addresses in bytes of a weight (out, in), which is cut into blocks of `rows`, and of its u (out,) and gamma (blocks,)."""

    weight: int
    shape: tuple[int, int]
    stride: tuple[int, int]
    rows: tuple[int, ...]
    u: int
    gamma: int = 0


class Measured(NamedTuple):
    """Of a weight, in fp32: z = W^T u (blocks, in), w = u / (|u|^2 s) (out,), s = |z| / |u| and factor = gamma/s (blocks,)."""

    z: Tensor
    w: Tensor
    s: Tensor
    factor: Tensor


@torch.no_grad()
def power_iteration_(weights: Sequence[Tensor], us: Sequence[Tensor], n: int) -> None:
    """v = W^T u / |W^T u|, u <- W v / |W v|, n times and in place [σ, Algorithm 1], for many weights in 5 n kernel launches.

    Args:
        weights: (out, in), row-major or transposed, in fp32, bf16 or fp16. Each device and dtype has its own 5 n launches.
        us: (out,), fp32 and contiguous.
        n: number of iterations.

    Raises:
        ValueError: a weight or a u has another dtype, shape or layout.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Place]] = {}
    for W, u in zip(weights, us, strict=True):
        if u.dtype != torch.float32 or u.shape != W.shape[:1] or u.stride() != (1,):
            raise ValueError(
                f"u {u.dtype} {tuple(u.shape)}: allowed is a contiguous one in fp32 of {W.shape[0]} entries"
            )
        (out, into), (down, across) = W.shape, W.stride()
        place = Place(W.data_ptr(), (out, into), (down, across), (out,), u.data_ptr())
        groups.setdefault((W.device, W.dtype), []).append(place)
    for (device, dtype), found in groups.items():
        advance(plan(tuple(found), device, dtype), dtype, n)


def advance(plan: Plan, dtype: torch.dtype, n: int) -> Tensor:
    """`power_iteration_` for all weights of a plan, of the dtype `dtype`.

    Returns |W v| of the last iteration, v of length 1, for the blocks of all weights one after the other, (blocks,), fp32.
    """
    k, like = _kernels(), _on(plan)
    partials, z, y = (torch.empty(size, **like) for size in (plan.partials, plan.n_in, plan.n_out))
    z_norms, y_norms = (torch.empty(2 * chunks.numel(), **like) for chunks in (plan.ins, plan.outs))
    lengths = torch.empty(plan.table.shape[0], **like)
    with on_device(plan.table.device):
        for _ in range(n):
            for to_out, chunks, result, norms in ((False, plan.ins, z, z_norms), (True, plan.outs, y, y_norms)):
                _products(plan, partials, z, z_norms, 0, 0, to_out, dtype)
                _add_up(plan, chunks, partials, result, norms, to_out)
            k.normalise[(plan.outs.numel(),)](plan.outs, plan.table, y, y_norms, lengths, CHUNK=CHUNK)
    return lengths


def measure_all(plan: Plan, dtype: torch.dtype) -> list[Measured]:
    """`measure` for all weights of a plan in three launches, with bitwise the same results."""
    found, sizes = _measure(plan, 0, 0, 0, dtype), (plan.ins_of, plan.outs_of, plan.blocks, plan.blocks)
    return [
        Measured(z.view(blocks, -1), w, s, factor)
        for blocks, z, w, s, factor in zip(
            plan.blocks, *(x.split(n) for x, n in zip(found, sizes, strict=True)), strict=True
        )
    ]


def measure(W: Tensor, u: Tensor, gamma: Tensor, rows: tuple[int, ...]) -> Measured:
    """z, w, s and gamma/s of one dense weight W (out, in), in three launches; u (out,) and gamma (blocks,) are fp32."""
    plan = keep_if_captured(_plan_of_weight(W.shape, W.stride(), rows, _are_aligned(W), W.device, TILE))
    z, *rest = _measure(plan, W.data_ptr(), u.data_ptr(), gamma.data_ptr(), W.dtype)
    return Measured(z.view(len(rows), -1), *rest)


def _measure(plan: Plan, W: int, u: int, gamma: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    like = _on(plan)
    sizes = plan.partials, 2 * plan.ins.numel(), plan.n_in, plan.n_out, plan.table.shape[0], plan.table.shape[0]
    partials, z_norms, z, w, s, factor = (torch.empty(size, **like) for size in sizes)
    with on_device(plan.table.device):
        _products(plan, partials, z, z_norms, W, u, False, dtype)
        _add_up(plan, plan.ins, partials, z, z_norms, False)
        _kernels().measured[(plan.table.shape[0],)](plan.table, z_norms, w, s, factor, u, gamma, CHUNK=CHUNK)
    return z, w, s, factor


def scale_backward(
    G: Tensor, W: Tensor, found: Measured, rows: tuple[int, ...], stop_gradient: bool
) -> tuple[Tensor, Tensor]:
    """dW (out, in) in W's dtype and dgamma (blocks,) in fp32, from G = dL/dW_hat (out, in) of any dtype; two launches.

    With `stop_gradient` s is a constant: dW = gamma/s G.
    """
    W = W if is_dense(W) else W.contiguous()
    stride = W.stride()
    if G.stride() != stride:
        G = torch.empty_like(W, dtype=G.dtype).copy_(G)
    z, w, s, factor = found
    d_W, d_gamma = torch.empty_like(W), torch.empty_like(s)
    plan = keep_if_captured(_plan_of_weight(W.shape, stride, rows, _are_aligned(W, G), W.device, TILE))
    sums = torch.empty(plan.strips.numel(), dtype=torch.float32, device=W.device)
    k, grid, at, tile = _kernels(), (plan.strips.numel(),), G.data_ptr(), _tile()
    low, full = k.DTYPES[G.dtype], k.DTYPES[W.dtype]
    with on_device(W.device):
        k.overlaps[grid](plan.strips, plan.table, sums, at, W.data_ptr(), G_DTYPE=low, DTYPE=full, **tile)
        k.gradient[grid](
            plan.strips, plan.table, sums, z, w, s, factor, d_gamma, at, d_W.data_ptr(),
            STOP=stop_gradient, G_DTYPE=low, TO=full, **tile,
        )  # fmt: skip
    return d_W, d_gamma


def _on(plan: Plan) -> dict[str, Any]:
    return {"dtype": torch.float32, "device": plan.table.device}


def _products(
    plan: Plan, partials: Tensor, z: Tensor, z_norms: Tensor, W: int, u: int, to_out: bool, dtype: torch.dtype
) -> None:
    k = _kernels()
    k.products[(plan.strips.numel(),)](
        plan.strips, plan.table, partials, z, z_norms, W, u, TO_OUT=to_out, DTYPE=k.DTYPES[dtype], CHUNK=CHUNK, **_tile()
    )  # fmt: skip


def _add_up(plan: Plan, chunks: Tensor, partials: Tensor, y: Tensor, norms: Tensor, to_out: bool) -> None:
    _kernels().add_up[(chunks.numel(),)](
        chunks, plan.table, partials, y, norms, TO_OUT=to_out, BM=TILE.rows, CHUNK=CHUNK, PARTS=PARTS
    )


def _tile() -> dict[str, int]:
    return {"BM": TILE.rows, "BN": TILE.columns, "num_warps": TILE.warps}


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which this is the current device, as Triton launches kernels on that one."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def is_dense(W: Tensor) -> bool:
    """Whether W (out, in) is contiguous, or the transpose of a contiguous matrix."""
    return W.is_contiguous() or W.T.is_contiguous()


def _are_aligned(*tensors: Tensor) -> bool:
    return all(x.data_ptr() % 16 == 0 for x in tensors)


def _layout(shape: tuple[int, int], stride: tuple[int, int]) -> tuple[bool, int]:
    """(whether a matrix is stored transposed, the stride between its contiguous rows, or columns where transposed)."""
    if stride[1] == 1 or shape[1] == 1:
        return False, stride[0]
    if stride[0] == 1 or shape[0] == 1:
        return True, stride[1]
    raise ValueError(f"a weight {tuple(shape)} of strides {stride}: rows or columns must be contiguous")


def plan(places: tuple[Place, ...], device: torch.device, dtype: torch.dtype) -> Plan:
    """The plan of weights of one device and dtype; it is cached.

    Raises:
        ValueError: a dtype or a layout that the kernels cannot take.
    """
    return keep_if_captured(_plan_of_model(places, device, dtype, TILE))


def keep_if_captured(plan: Plan) -> Plan:
    """Returns the plan. During the capture of a CUDA graph it is kept for good, as each replay of the graph reads it."""
    if plan.table.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured[id(plan)] = plan
    return plan


_captured: dict[int, Plan] = {}


@lru_cache(maxsize=1024)
def _plan_of_weight(
    shape: tuple[int, int],
    stride: tuple[int, int],
    rows: tuple[int, ...],
    aligned: bool,
    device: torch.device,
    tile: Tile,
) -> Plan:
    return _plan([_cut(0, shape, stride, rows, 0, 0, aligned)], device, tile)


@lru_cache(maxsize=16)
def _plan_of_model(places: tuple[Place, ...], device: torch.device, dtype: torch.dtype, tile: Tile) -> Plan:
    if dtype not in _kernels().DTYPES:
        raise ValueError(f"a weight in {dtype}: allowed are {', '.join(map(str, _kernels().DTYPES))}")
    size = dtype.itemsize
    return _plan(
        [
            _cut(W // size, shape, stride, rows, u // 4, gamma // 4, W % 16 == 0)
            for W, shape, stride, rows, u, gamma in places
        ],
        device,
        tile,
    )


def _cut(
    weight: int,
    shape: tuple[int, int],
    stride: tuple[int, int],
    rows: tuple[int, ...],
    u: int,
    gamma: int,
    aligned: bool,
) -> list[_Matrix]:
    """The blocks of a weight. Raises ValueError where `rows` do not add up to its outputs."""
    if sum(rows) != shape[0]:
        raise ValueError(f"rows = {rows}: their sum must be {shape[0]}, as the weight is {tuple(shape)}")
    transposed, ld = _layout(shape, stride)
    matrices, start = [], 0
    for i, size in enumerate(rows):
        at = start if transposed else start * ld
        matrices.append(
            _Matrix(weight + at, (size, shape[1]), ld, transposed, aligned and at % 16 == 0, u + start, gamma + i)
        )
        start += size
    return matrices


def _plan(weights: list[list[_Matrix]], device: torch.device, tile: Tile) -> Plan:
    table: list[tuple[int, ...]] = []
    strips: list[int] = []
    outs: list[int] = []
    ins: list[int] = []
    partials = n_out = n_in = 0
    for i, matrix in enumerate(matrix for matrices in weights for matrix in matrices):
        out_size, in_size = matrix.shape
        m, n = (in_size, out_size) if matrix.transposed else (out_size, in_size)
        aligned = matrix.aligned and matrix.ld % 16 == 0 and n % 16 == 0
        down, across = _ceil(m, tile.rows), _ceil(n, tile.columns)
        steps = _ceil(down, tile.down)
        down = _ceil(down, steps)
        place = matrix.weight, m, n, matrix.ld, matrix.transposed, aligned
        starts = n_out, n_in, len(outs), len(ins)
        table.append((*place, len(strips), across, steps, partials, matrix.u, *starts, matrix.gamma))
        strips += [i] * (down * across)
        outs += [i] * _ceil(out_size, CHUNK)
        ins += [i] * _ceil(in_size, CHUNK)
        partials, n_out, n_in = partials + max(down * n, across * m), n_out + out_size, n_in + in_size

    def there(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    return Plan(
        table=torch.tensor(table, dtype=torch.int64, device=device),
        strips=there(strips),
        outs=there(outs),
        ins=there(ins),
        partials=partials,
        n_out=n_out,
        n_in=n_in,
        blocks=[len(matrices) for matrices in weights],
        outs_of=[sum(block.shape[0] for block in matrices) for matrices in weights],
        ins_of=[sum(block.shape[1] for block in matrices) for matrices in weights],
    )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
