"""The part of a weight that lies on this process: all of it, or its shard under FSDP2 or tensor parallelism."""

import math
from dataclasses import dataclass
from typing import TypeGuard

import torch.distributed as dist
from torch import Tensor

from .targets import matrix

if dist.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Piece:
    """A part of a matrix W (out, in): `weight` is W[row : row + height, column : column + width]."""

    weight: Tensor
    row: int = 0
    column: int = 0

    def rows(self, u: Tensor) -> Tensor:
        """The entries of u (out,) at the rows of this part, as a view."""
        return _part(u, self.row, self.weight.shape[0])

    def columns(self, v: Tensor) -> Tensor:
        """The entries of v (in,) at the columns of this part, as a view."""
        return _part(v, self.column, self.weight.shape[1])

    def of_block(self, start: int, size: int) -> "Piece | None":
        """The rows of this part in the block W[start : start + size], as a Piece of that block; None where there are none."""
        first, last = max(start, self.row), min(start + size, self.row + self.weight.shape[0])
        if first >= last:
            return None
        return Piece(self.weight[first - self.row : last - self.row], first - start, self.column)


def _part(x: Tensor, start: int, size: int) -> Tensor:
    return x if size == x.shape[0] else x.narrow(0, start, size)


def pieces(weights: list[Tensor], transposed: bool) -> "tuple[list[Piece], dist.ProcessGroup | None]":
    """(the parts of W on this process, the process group that has the rest or None); W is `weights` stacked along `out`.

    Weights are gathered, with the group None, where one is sharded over several mesh dimensions or along a convolution's
    kernel, or where they are sharded differently.
    """
    found_shards = [_shard(W) for W in weights]
    shards = [shard for shard in found_shards if shard is not None]
    if len(shards) < len(weights) or len({(dimension, group) for dimension, group, _ in shards}) > 1:
        weights = [gathered(W) for W in weights]
        shards = [(0, None, 0)] * len(weights)
    found, row = [], 0
    for W, (dimension, _, start) in zip(weights, shards, strict=True):
        local = matrix(W.to_local() if is_sharded(W) else W, transposed)
        along_rows = (dimension == 0) != transposed
        found.append(Piece(local, row + start, 0) if along_rows else Piece(local, row, start))
        row += W.shape[1] if transposed else W.shape[0]
    return found, shards[0][1]


def gathered(W: Tensor) -> Tensor:
    """W as a whole tensor: a sharded weight is gathered, in which all of its processes must take part."""
    return W.full_tensor() if is_sharded(W) else W


def beside(W: Tensor, x: Tensor) -> Tensor:
    """x, which is whole on every process, as an operand for W: a replicated DTensor where W is sharded, else x itself."""
    if not is_sharded(W):
        return x
    return DTensor.from_local(x, W.device_mesh, [Replicate()] * W.device_mesh.ndim, run_check=False)


def is_sharded(W: Tensor) -> "TypeGuard[DTensor]":
    return dist.is_available() and isinstance(W, DTensor)


def _shard(W: Tensor) -> "tuple[int, dist.ProcessGroup | None, int] | None":
    """(dimension it is sharded along, process group, start of this process's part); None where it must be gathered."""
    if not is_sharded(W):
        return 0, None, 0
    cuts = [(i, placement) for i, placement in enumerate(W.placements) if not placement.is_replicate()]
    if len(cuts) != 1:
        return None
    (mesh_dim, placement), mesh = cuts[0], W.device_mesh
    if type(placement) is not Shard or placement.dim > (W.ndim == 2):
        return None
    size = W.shape[placement.dim]
    chunk = math.ceil(size / mesh.size(mesh_dim))  # as torch.chunk cuts
    return placement.dim, mesh.get_group(mesh_dim), min(mesh.get_local_rank(mesh_dim) * chunk, size)
