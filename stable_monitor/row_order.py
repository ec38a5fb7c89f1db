"""In which order a packed projection has its rows: what its name stands for, [q; k; v], may not be what the model does.

Two models with a layer `qkv` of the same shape may cut it into three and then into heads, or into heads and then into three.
A forward pass tells them apart, as it has both the rows and the queries that attention gets: their sizes, head by head, are the
same, also after a rotation of positions, and in proportion after a scale.
"""

from collections.abc import Iterable
from itertools import permutations
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stable_core.layers import find_projections, matrix_shape, num_heads, rows_of

from .calls import Call, FusedCall

# Relative. The order that a name stands for is doubted only where it is clearly off, and another only taken where it fits to
# rounding: normed queries have nearly the same size in all heads, and nearly fit any order.
ALIKE, EQUAL = 1e-2, 1e-3


class RowOrder:
    """Watches the packed projections of attentions, until `close`, or `leave` of one.

    Only attentions of as many key heads as query heads are looked at, whose rows are thirds of q, k and v.
    """

    def __init__(self, attentions: Iterable[nn.Module]) -> None:
        # By the id of a packed layer: the sum of squares of each of its rows.
        self._squares: dict[int, Tensor] = {}
        self._handles: dict[int, RemovableHandle] = {}
        for attention in attentions:
            layer, tensor = find_projections(attention).get("qkv", (None, ""))
            if isinstance(layer, nn.Module) and layer is not attention and tensor == "weight":
                self._handles[id(layer)] = layer.register_forward_hook(self._keep)

    def close(self) -> None:
        for handle in self._handles.values():
            handle.remove()

    def leave(self, attention: nn.Module) -> None:
        layer, _ = find_projections(attention).get("qkv", (None, ""))
        if handle := self._handles.pop(id(layer), None):
            handle.remove()

    def _keep(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._squares[id(layer)] = output.detach().double().square().flatten(0, -2).sum(0)

    def error(self, call: Call) -> str:
        """What is wrong with the order that is assumed for an attention; "" where it fits, or where nothing fits better."""
        attention = call.site.module
        layer, tensor = find_projections(attention).get("qkv", (None, ""))
        squares = self._squares.pop(id(layer), None)
        if not isinstance(layer, nn.Module) or squares is None or not isinstance(call, FusedCall) or call.q.ndim != 4:
            return ""
        sizes = [x.detach().double().square().sum((0, 2, 3)) for x in (call.q, call.k)]
        heads, rows = len(sizes[0]), rows_of(attention, "qkv", matrix_shape(layer, tensor))
        if rows is None or len(squares) % (3 * heads) or len(sizes[1]) != heads:
            return ""
        if all(
            _in_proportion(squares[rows[role].flatten()].view(heads, -1).sum(1), x, ALIKE)
            for role, x in zip("qk", sizes, strict=True)
        ):
            return ""
        by_part = {
            "three, heads": squares.view(3, heads, -1).sum(2),
            "heads, three": squares.view(heads, 3, -1).sum(2).T,
        }
        for order, parts in by_part.items():
            for q, k, _ in permutations(range(3)):
                if _in_proportion(parts[q], sizes[0], EQUAL) and _in_proportion(parts[k], sizes[1], EQUAL):
                    names = [name for _, name in sorted(zip((q, k, 3 - q - k), "qkv", strict=True))]
                    if order == "heads, three" and names == ["q", "k", "v"] and num_heads(attention) == heads:
                        return "its packed rows are (heads, q k v, head_dim); say so, module.head_first = True"
                    return f"its packed rows are ({order}, head_dim) of {', '.join(names)}; give q, k and v layers of their own"
        return ""


def _in_proportion(some: Tensor, others: Tensor, within: float) -> bool:
    ratios = some / others
    return bool(ratios.isfinite().all() and ratios.max() - ratios.min() < within * ratios.mean())
