"""σReparam in Triton kernels: power iteration of all weights together, W_hat in one pass, the backward pass in two.

For a block of rows W (out, in) of a weight, with u (out,) of length 1 [σ, Algorithm 1]:

    z = W^T u, s = |z|, W_hat = gamma/s W;    dW = gamma/s (G - c u (z/s)^T), dgamma = c = <G, W>/s, where G = dL/dW_hat

Sums are in fp32 whatever the weight is in, in a fixed order and without atomics: a resumed run is bitwise the run that never
stopped. Triton comes with torch's CUDA builds; nothing here imports it before it is used. On the CPU the kernels run under
Triton's interpreter alone, that is with TRITON_INTERPRET=1 from the start of the process, to be tested.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """What a program reads at a time, how many warps it has, and how many strips one below the other make a matrix at most."""

    rows: int = 16
    columns: int = 256
    warps: int = 4
    down: int = 128


TILE = Tile()
CHUNK, PARTS = 256, 32  # entries of a vector that a program adds up, and how many parts at a time


class _Plan(NamedTuple):
    """Where the programs find their work, on the device.

    Attributes:
        table: a line for each matrix (kernels_sigma.py names the columns).
        strips: the matrix that each strip is of; `outs` and `ins`: that each chunk of a vector (out,) or (in,) is of.
        partials: how many partial sums the largest product leaves; `n_out` and `n_in`: the entries of all those vectors.
    """

    table: Tensor
    strips: Tensor
    outs: Tensor
    ins: Tensor
    partials: int
    n_out: int
    n_in: int


class _Matrix(NamedTuple):
    """Where a block of rows (out, in) is, and its u, in elements; `ld` from one contiguous row (or column) to the next."""

    weight: int
    shape: tuple[int, int]
    ld: int
    transposed: bool
    aligned: bool
    u: int


def available(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    if device.type not in ("cpu", "cuda") or find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return _kernels().INTERPRETED
    return not _kernels().INTERPRETED and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _kernels() -> ModuleType:
    from . import kernels_sigma

    return kernels_sigma


@torch.no_grad()
def power_iteration_(weights: Sequence[Tensor], us: Sequence[Tensor], n: int) -> None:
    """n times v = W^T u / |W^T u|, u <- W v / |W v|, in place, in 5 n launches however many weights there are.

    Args:
        weights: (out, in), row-major or transposed, in fp32, bf16 or fp16; each device and type takes its own launches.
        us: (out,), fp32.
        n: how many times.

    Raises:
        ValueError: a weight or a u is none of these.
    """
    groups: dict[tuple[torch.device, torch.dtype], list] = {}
    for W, u in zip(weights, us, strict=True):
        if u.dtype != torch.float32 or u.shape != W.shape[:1] or u.stride() != (1,):
            raise ValueError(
                f"u {u.dtype} {tuple(u.shape)}: allowed is a contiguous one in fp32 of {W.shape[0]} entries"
            )
        groups.setdefault((W.device, W.dtype), []).append((W.data_ptr(), W.shape, W.stride(), u.data_ptr()))
    for (device, dtype), found in groups.items():
        plan = _plan_of_models(tuple(found), device, dtype, TILE)
        with on_device(device):
            _advance(plan, dtype, n)


def _advance(plan: _Plan, dtype: torch.dtype, n: int) -> None:
    k, like = _kernels(), {"dtype": torch.float32, "device": plan.table.device}
    partials, z, y = (torch.empty(size, **like) for size in (plan.partials, plan.n_in, plan.n_out))
    z_norms, y_norms = (torch.empty(2 * len(chunks), **like) for chunks in (plan.ins, plan.outs))
    for _ in range(n):
        for to_out, chunks, result, norms in ((False, plan.ins, z, z_norms), (True, plan.outs, y, y_norms)):
            _products(plan, partials, z, z_norms, 0, 0, to_out, dtype)
            _add_up(plan, chunks, partials, result, norms, to_out)
        k.normalise[(len(plan.outs),)](plan.outs, plan.table, y, y_norms, CHUNK=CHUNK)


def scale(
    W: Tensor, u: Tensor, gamma: Tensor, rows: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """W_hat (out, in) in `dtype`, z (blocks, in) and s (blocks,) in fp32, of a weight in blocks of `rows`; three launches."""
    W = W if _is_dense(W) else W.contiguous()
    like = {"dtype": torch.float32, "device": W.device}
    W_hat, z, s = (
        torch.empty_like(W, dtype=dtype),
        torch.empty(len(rows), W.shape[1], **like),
        torch.empty_like(gamma, **like),
    )
    plan = _plan_of_weight(W.shape, W.stride(), rows, _are_aligned(W, W_hat), W.device, TILE)
    partials, z_norms = torch.empty(plan.partials, **like), torch.empty(2 * len(plan.ins), **like)
    k = _kernels()
    with on_device(W.device):
        _products(plan, partials, z, z_norms, W.data_ptr(), u.data_ptr(), False, W.dtype)
        _add_up(plan, plan.ins, partials, z, z_norms, False)
        k.scale[(len(plan.strips),)](
            plan.strips, plan.table, z_norms, gamma, s, W.data_ptr(), W_hat.data_ptr(),
            DTYPE=k.DTYPES[W.dtype], TO=k.DTYPES[dtype], CHUNK=CHUNK, **_tile(),
        )  # fmt: skip
    return W_hat, z, s


def scale_backward(
    G: Tensor, W: Tensor, u: Tensor, z: Tensor, s: Tensor, gamma: Tensor, rows: tuple[int, ...], stop_gradient: bool
) -> tuple[Tensor, Tensor]:
    """dW (out, in) in W's type and dgamma (blocks,) in gamma's, from G (out, in) in any; two launches.

    With `stop_gradient` s is a constant: dW = gamma/s G.
    """
    W = W if _is_dense(W) else W.contiguous()
    if G.stride() != W.stride():
        G = torch.empty_like(W, dtype=G.dtype).copy_(G)
    d_W, d_gamma = torch.empty_like(W), torch.empty_like(gamma)
    plan = _plan_of_weight(W.shape, W.stride(), rows, _are_aligned(W, G), W.device, TILE)
    sums = torch.empty(len(plan.strips), dtype=torch.float32, device=W.device)
    k = _kernels()
    with on_device(W.device):
        k.overlaps[(len(plan.strips),)](
            plan.strips, plan.table, sums, G.data_ptr(), W.data_ptr(),
            G_DTYPE=k.DTYPES[G.dtype], DTYPE=k.DTYPES[W.dtype], **_tile(),
        )  # fmt: skip
        k.gradient[(len(plan.strips),)](
            plan.strips, plan.table, sums, z, s, gamma, d_gamma, G.data_ptr(), u.data_ptr(), d_W.data_ptr(),
            STOP=stop_gradient, G_DTYPE=k.DTYPES[G.dtype], TO=k.DTYPES[W.dtype], **_tile(),
        )  # fmt: skip
    return d_W, d_gamma


def _products(
    plan: _Plan, partials: Tensor, z: Tensor, z_norms: Tensor, W: int, u: int, to_out: bool, dtype: torch.dtype
) -> None:
    k = _kernels()
    k.products[(len(plan.strips),)](
        plan.strips, plan.table, partials, z, z_norms, W, u, TO_OUT=to_out, DTYPE=k.DTYPES[dtype], CHUNK=CHUNK, **_tile()
    )  # fmt: skip


def _add_up(plan: _Plan, chunks: Tensor, partials: Tensor, y: Tensor, norms: Tensor, to_out: bool) -> None:
    _kernels().add_up[(len(chunks),)](
        chunks, plan.table, partials, y, norms, TO_OUT=to_out, BM=TILE.rows, CHUNK=CHUNK, PARTS=PARTS
    )


def _tile() -> dict[str, int]:
    return {"BM": TILE.rows, "BN": TILE.columns, "num_warps": TILE.warps}


def on_device(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _is_dense(W: Tensor) -> bool:
    return W.is_contiguous() or W.T.is_contiguous()


def _are_aligned(*tensors: Tensor) -> bool:
    return all(x.data_ptr() % 16 == 0 for x in tensors)


def _layout(shape: tuple[int, int], stride: tuple[int, int]) -> tuple[bool, int]:
    """Whether a matrix is kept transposed, and how far its contiguous rows (columns) are apart."""
    if stride[1] == 1 or shape[1] == 1:
        return False, stride[0]
    if stride[0] == 1 or shape[0] == 1:
        return True, stride[1]
    raise ValueError(f"a weight {tuple(shape)} of strides {stride}: rows or columns must be contiguous")


@lru_cache(maxsize=1024)
def _plan_of_weight(
    shape: tuple[int, int],
    stride: tuple[int, int],
    rows: tuple[int, ...],
    aligned: bool,
    device: torch.device,
    tile: Tile,
) -> _Plan:
    transposed, ld = _layout(shape, stride)
    matrices, start = [], 0
    for size in rows:
        at = start if transposed else start * ld
        matrices.append(_Matrix(at, (size, shape[1]), ld, transposed, aligned and at % 16 == 0, start))
        start += size
    if start != shape[0]:
        raise ValueError(f"rows = {rows}: their sum must be {shape[0]}, as the weight is {tuple(shape)}")
    return _plan(matrices, device, tile)


@lru_cache(maxsize=16)
def _plan_of_models(found: tuple, device: torch.device, dtype: torch.dtype, tile: Tile) -> _Plan:
    """Of tuples (address of W, its shape, its stride, address of u)."""
    if dtype not in _kernels().DTYPES:
        raise ValueError(f"a weight in {dtype}: allowed are {', '.join(map(str, _kernels().DTYPES))}")
    matrices = []
    for W, shape, stride, u in found:
        transposed, ld = _layout(shape, stride)
        matrices.append(_Matrix(W // dtype.itemsize, tuple(shape), ld, transposed, W % 16 == 0, u // 4))
    return _plan(matrices, device, tile)


def _plan(matrices: list[_Matrix], device: torch.device, tile: Tile) -> _Plan:
    table, strips, outs, ins = [], [], [], []
    partials = n_out = n_in = 0
    for i, matrix in enumerate(matrices):
        out_size, in_size = matrix.shape
        m, n = (in_size, out_size) if matrix.transposed else (out_size, in_size)
        aligned = matrix.aligned and matrix.ld % 16 == 0 and n % 16 == 0
        down, across = _ceil(m, tile.rows), _ceil(n, tile.columns)
        steps = _ceil(down, tile.down)
        down = _ceil(down, steps)
        place = matrix.weight, m, n, matrix.ld, matrix.transposed, aligned
        table.append((*place, len(strips), across, steps, partials, matrix.u, n_out, n_in, len(outs), len(ins)))
        strips += [i] * (down * across)
        outs += [i] * _ceil(out_size, CHUNK)
        ins += [i] * _ceil(in_size, CHUNK)
        partials, n_out, n_in = partials + max(down * n, across * m), n_out + out_size, n_in + in_size
    to = {"dtype": torch.int32, "device": device}
    lists = (torch.tensor(x, **to) for x in (strips, outs, ins))
    return _Plan(torch.tensor(table, dtype=torch.int64, device=device), *lists, partials, n_out, n_in)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
