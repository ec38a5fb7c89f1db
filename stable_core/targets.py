"""Finds the weights of a model that `sigma_reparam` changes, and groups those that share a sigma."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .layers import PACKED_QKV_NAMES, QKV_NAMES, equal_blocks, is_transposed, rows_of

if dist.is_available():
    from torch.distributed.tensor import DTensor

FilterFn = Callable[[nn.Module, str], bool]
Model = TypeVar("Model", bound=nn.Module)  # functions that change a model return the same type


@dataclass(frozen=True)
class Target:
    """One weight tensor of one layer."""

    module: nn.Module
    module_name: str
    tensor_name: str = "weight"
    transposed: bool = False  # HF's Conv1D keeps (in, out)

    @property
    def name(self) -> str:
        """Such as `encoder.layers.0.fc1`; with the tensor's name where that is not "weight", as in `attn.in_proj_weight`."""
        tail = "" if self.tensor_name == "weight" else self.tensor_name
        return ".".join(part for part in (self.module_name, tail) if part) or type(self.module).__name__

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.tensor_name)

    @property
    def matrix(self) -> Tensor:
        return matrix(self.weight.detach(), self.transposed)


@dataclass(frozen=True)
class Group:
    """Weights that are stacked along their outputs and then cut into blocks of `rows` outputs, with a sigma for each block.

    The member `leader` holds the state (u, gamma) of the group. It is the last of them in the model, so that loading a state
    dict has filled the other weights when the leader's state is loaded.
    """

    members: list[Target]
    rows: list[int]
    leader: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Last parts of the members' names, such as "q_proj"; empty for a weight by itself."""
        return tuple(target.name.rpartition(".")[2] for target in self.members) if len(self.members) > 1 else ()


def matrix(W: Tensor, transposed: bool) -> Tensor:
    """W as (out, in): a convolution's kernel is flattened into `in`, HF's Conv1D is transposed."""
    return W.T if transposed else W.flatten(1)


def join(parts: list[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`, but a single part is returned as it is, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def cut(whole: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """`whole.split(sizes)` by slices, because split copies in its backward pass and its parts cannot be written to."""
    return [whole] if len(sizes) == 1 else [whole.narrow(0, sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def find_groups(model: nn.Module, filter_fn: FilterFn | None, qkv: str) -> list[Group]:
    """Groups of the weights that filter_fn(module, fully_qualified_name) picks; without it, of every weight that is not tied.

    `qkv` is "separate", "joint" or "qk_joint", as for `SigmaReparamConfig`. Packed projections have one sigma together where
    they are not three square blocks one after the other (`layers.equal_blocks`).

    Raises:
        ValueError: filter_fn cannot be called so; nothing is picked; a picked layer is reparametrised already, tied to another
            one, sharded, or lazy; qkv asks for a joint sigma where no projection has a known name, where only some of those
            that would share it are picked, where their inputs differ in size, or where v cannot be told from q and k.
    """
    targets = _picked(model, filter_fn)
    by_name = {target.name: target for target in targets}
    groups: list[Group] = []
    done: set[str] = set()
    met_attention = False
    for target in targets:
        if target.name in done:
            continue
        parent, dot, leaf = target.name.rpartition(".")
        out_features, in_features = target.matrix.shape
        group = Group([target], [out_features])
        names = next((names for names in QKV_NAMES if leaf in names), ())
        packed = leaf in PACKED_QKV_NAMES
        thirds = packed and len(equal_blocks(_attention(model, target), "qkv", (out_features, in_features))) == 3
        if packed:
            met_attention = True
            if not thirds and qkv == "qk_joint":
                raise ValueError(
                    f"{target.name}: qkv = 'qk_joint' cannot tell v from q and k, which are not packed as three equal parts; "
                    "use qkv = 'joint'"
                )
        if thirds:
            sizes = {"separate": (1, 1, 1), "joint": (3,), "qk_joint": (2, 1)}[qkv]
            group = Group([target], [size * in_features for size in sizes])
        elif names:
            met_attention = True
            sharing = {"separate": (), "joint": names, "qk_joint": names[:2]}[qkv]
            if leaf in sharing:
                siblings = [f"{parent}{dot}{name}" for name in sharing]
                for sibling in siblings:
                    if sibling not in by_name:
                        raise ValueError(f"{sibling}: qkv = {qkv!r} needs it too, but filter_fn leaves it out")
                members = [by_name[sibling] for sibling in siblings]
                if len({member.matrix.shape[1] for member in members}) > 1:
                    raise ValueError(f"{target.name}: qkv = {qkv!r} needs inputs of one size; use qkv = 'separate'")
                leader = max(range(len(members)), key=lambda i: targets.index(members[i]))
                group = Group(members, [sum(member.matrix.shape[0] for member in members)], leader)
        groups.append(group)
        done.update(member.name for member in group.members)
    if qkv != "separate" and not met_attention:
        known = ", ".join("/".join(names) for names in QKV_NAMES)
        raise ValueError(f"qkv = {qkv!r}: no attention found; known are {known} and {', '.join(PACKED_QKV_NAMES)}")
    return groups


def rows_beside_qk(model: nn.Module, target: Target) -> Tensor | slice:
    """The outputs of a layer that are neither queries nor keys, as an index: all, none, or the values of packed projections.

    Raises:
        ValueError: q, k and v are packed in an unknown order.
    """
    leaf, shape = target.name.rpartition(".")[2], tuple(target.matrix.shape)
    if leaf in PACKED_QKV_NAMES:
        rows = rows_of(_attention(model, target), "qkv", shape)
        if rows is None:
            raise ValueError(
                f"{target.name}: it packs q, k and v in an unknown order, so that v cannot be told from q and k"
            )
        return rows["v"].flatten()
    return slice(0) if any(leaf in names[:2] for names in QKV_NAMES) else slice(None)


def _attention(model: nn.Module, target: Target) -> nn.Module:
    """The attention module of a packed weight: an nn.MultiheadAttention itself, else the parent of its layer."""
    if isinstance(target.module, nn.MultiheadAttention):
        return target.module
    return model.get_submodule(target.module_name.rpartition(".")[0])


def check_values(group: Group, every_row: bool = False) -> None:
    """Raises ValueError where a weight holds NaN or inf, or where a block is all zeros, so that its sigma is 0.

    With `every_row` no single row may be all zeros, as weight norm divides by the norm of each row.
    """
    for target in group.members:
        if not target.weight.is_meta and not _is_finite(target.weight):
            raise ValueError(f"{target.name}: its weight holds NaN or inf; start from a sound checkpoint")
    stacked = join([target.matrix for target in group.members])
    blocks = stacked.split(1 if every_row else group.rows)
    if not all(block.is_meta or block[0].any() or block.any() for block in blocks):
        what = "has a row of zeros" if every_row else "is zero, so sigma = 0"
        raise ValueError(f"{group.members[0].name}: its weight {what}; initialise it, or leave it out with filter_fn")


def _is_finite(weight: Tensor) -> bool:
    """Whether all entries are finite. A finite sum proves it in a tenth of the time; a sum that is not may have overflowed."""
    return bool(weight.sum(dtype=torch.float32).isfinite() or weight.isfinite().all())


def _picked(model: nn.Module, filter_fn: FilterFn | None) -> list[Target]:
    candidates, tied = list(layers(model)), _tied(model)
    if filter_fn is None:
        picked = [target for target in candidates if id(target.weight) not in tied]
    else:
        try:
            picked = [target for target in candidates if filter_fn(target.module, target.module_name)]
        except TypeError as error:
            allowed = "allowed are functions filter_fn(module, name) -> bool"
            raise ValueError(f"filter_fn = {filter_fn!r}: {allowed} ({error})") from error
    if not picked:
        what = "no layer to reparametrise" if filter_fn is None else "filter_fn matches nothing"
        names = ", ".join([target.name for target in candidates[:3]] + ["..."] * (len(candidates) > 3)) or "none"
        raise ValueError(f"{type(model).__name__}: {what}; its Linear, Conv and attention layers: {names}")
    for target in picked:
        if target.tensor_name not in target.module._parameters:
            raise ValueError(f"{target.name}: already reparametrised; fold it first, or leave it out with filter_fn")
        if isinstance(target.weight, UninitializedParameter):
            raise ValueError(f"{target.name}: a lazy layer without a weight yet; run the model once before")
        if dist.is_available() and isinstance(target.weight.data, DTensor):
            raise ValueError(
                f"{target.name}: its weight is sharded already; call sigma_reparam before fully_shard, and leave layers under "
                "tensor parallelism out with filter_fn"
            )
        if id(target.weight) in tied:
            raise ValueError(f"{target.name}: its weight is tied to another layer's; leave it out with filter_fn")
    return picked


def layers(model: nn.Module) -> Iterator[Target]:
    """The weights of every Linear, Conv1d, Conv2d, HF Conv1D and attention layer of a model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            if module._qkv_same_embed_dim:
                yield Target(module, name, "in_proj_weight")
            else:
                yield from (Target(module, name, tensor_name) for tensor_name in QKV_NAMES[-1])
        elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            if module.weight.is_floating_point():  # skips quantized layers, whose weights are packed integers
                yield Target(module, name)
        elif is_transposed(module):
            yield Target(module, name, transposed=True)


def those_left(model: nn.Module) -> FilterFn:
    """A filter_fn that picks what `sigma_reparam` takes by default, without layers that are reparametrised already."""
    tied = _tied(model)
    left = {
        id(target.module)
        for target in layers(model)
        if target.tensor_name in target.module._parameters and id(target.weight) not in tied
    }
    return lambda module, name: id(module) in left


def _tied(model: nn.Module) -> set[int]:
    """Ids of parameters that more than one module holds, such as an output projection that shares the embedding's weight."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied
